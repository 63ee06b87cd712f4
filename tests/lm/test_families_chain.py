"""Models of other families than GPT-2, and sites beside the stream, through the commands from end to end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_gpt2 import build_tokenizer
from tiny_models import TINY

from command import nsae


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join("".join(draw.choices("abcdefgh", k=draw.randrange(1, 6))) for _ in range(2500)))
    return path


@pytest.mark.parametrize(
    ("family", "site", "dtype"),
    [("pythia", "attn_out", "fp16"), ("gemma2", "resid_mid", "bf16"), ("opt", "mlp_out", "fp16")],
)
def test_from_a_model_to_features(family: str, site: str, dtype: str, text: Path, tmp_path: Path) -> None:
    folder = TINY[family].save(tmp_path / family)
    runs, hook = tmp_path / "runs", f"blocks.1.hook_{site}"

    def run(*arguments: object) -> dict[str, object]:
        outcome = nsae("--workspace", runs, "--json", *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.json

    run(
        "collect", "--model", folder, "--corpus", text, "--context", 16, "--site", site, "--layers", 1,
        "--dtype", dtype, "--device", "cpu", "--name", "store",
    )  # fmt: skip
    run("train", "store", "--d-sae", 32, "--batch-size", 128, "--tokens", "8k", "--device", "cpu", "--name", "sae")
    evaluated = run("eval", "sae", "--model", folder, "--tokens", "2k", "--device", "cpu")["result"]
    assert isinstance(evaluated, dict)
    assert evaluated["hook"] == hook
    behaviour = evaluated["behaviour"]
    assert behaviour["ce_clean"]["value"] != pytest.approx(behaviour["ce_with_sae"]["value"], abs=1e-6)
    outcome = nsae("--workspace", runs, "report", "sae", "--name", "page")
    assert outcome.code == 0, outcome.err
    assert list(runs.rglob("*.html"))
    live = nsae(
        "--workspace", runs, "train", "--from-model", folder, "--corpus", text, "--context", 16, "--site", site,
        "--layers", 1, "--dtype", dtype, "--d-sae", 32, "--batch-size", 128, "--tokens", "8k", "--device", "cpu",
        "--name", "live",
    )  # fmt: skip
    assert live.code == 0, live.err
    # The whole text is one window and one shard, so both saw the same rows in the same order.
    one, two = (load_file(runs / "saes" / name / "sae_weights.safetensors") for name in ("sae", "live"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_values_too_large_for_fp16(text: Path, tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by √d_model, and its residuals outgrow fp16."""
    model = TINY["gemma"].build()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e5)
    model.save_pretrained(tmp_path / "gemma")
    build_tokenizer().save_pretrained(tmp_path / "gemma")
    collect = (
        "--workspace", tmp_path / "runs", "collect", "--model", tmp_path / "gemma", "--corpus", text, "--context", 16,
        "--tokens", "1k", "--device", "cpu",
    )  # fmt: skip
    outcome = nsae(*collect)
    assert outcome.code == 5
    assert "is too large for fp16 (at most 65,504); use --dtype bf16" in outcome.message
    assert nsae(*collect, "--dtype", "bf16").code == 0


def test_what_a_model_does_not_have(text: Path, tmp_path: Path) -> None:
    folder = TINY["pythia"].save(tmp_path / "pythia")
    collect = ("--workspace", tmp_path / "runs", "collect", "--model", folder, "--corpus", text, "--device", "cpu")
    outcome = nsae(*collect, "--site", "resid_mid")
    assert outcome.code == 2
    assert outcome.message == "--site resid_mid: pythia has resid_post, resid_pre, attn_out, mlp_out only"
    assert nsae(*collect, "--context", 16, "--name", "store").code == 0
    probed = nsae("--workspace", tmp_path / "runs", "norms", "store", "--probe", "--model", folder, "--device", "cpu")
    assert probed.code == 2
    assert "pythia has none (rotary positions)" in probed.message
    assert not list((tmp_path / "runs").rglob("norms.json"))

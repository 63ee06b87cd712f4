"""`nsae eval` on the models that ship with nsae: what it writes, when it starts again, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hand_store
from command import Outcome, contents, nsae
from nsae_cli import interrupt
from nsae_cli.analysis.behaviour import BehaviourStudy
from nsae_cli.errors import Interrupted
from nsae_cli.store.workspace import Kind
from sealed_json import edit_json

COLUMNS = {
    "context", "predicted", "ce_clean", "ce_with_sae", "ce_ns", "ce_zero", "ce_mean", "kl", "rows_ns", "l0_ns",
    "error_sq_ns", "variance_ns", "rho_ns", "nbi_moments",
}  # fmt: skip


def evaluate(workspace: Path, *arguments: object) -> Outcome:
    return nsae("--workspace", workspace, "eval", *arguments, "--device", "cpu")


def cells(workspace: Path) -> list[str]:
    return sorted(
        mark.parent.relative_to(workspace / "saes").as_posix() for mark in workspace.glob("saes/*/*/run.json")
    )


def document(workspace: Path, name: str) -> dict[str, object]:
    found = json.loads((workspace / "evals" / name / Kind.EVAL.mark).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_every_number_is_there_and_consistent(finished: Path, store: str) -> None:
    for cell in cells(finished):
        name = cell.replace("/", "-")
        made = document(finished, name)
        tensors = load_file(finished / "evals" / name / "contexts.safetensors")
        assert set(tensors) == COLUMNS
        assert {tensor.dtype for key, tensor in tensors.items() if key != "context"} == {torch.float64}
        assert made["sae"]["name"] == cell
        rows = made["rows"]
        assert rows["source"] == "store"
        assert rows["activations"]["name"] == store
        assert (rows["contexts"], rows["tokens"]) == (7, 7 * 128)
        assert tensors["context"].tolist() == list(range(19, 140, 20))
        assert made["behaviour"]["bins"] is None
        total = {key: float(value.sum()) for key, value in tensors.items() if key != "nbi_moments"}
        behaviour = {key: part["value"] for key, part in made["behaviour"].items() if part is not None}
        assert behaviour["ce_clean"] == pytest.approx(total["ce_clean"] / total["predicted"])
        assert behaviour["delta_ce_ns"] == pytest.approx((total["ce_ns"] - total["ce_clean"]) / total["predicted"])
        for part in made["behaviour"].values():
            if part is not None:
                assert part["low"] <= part["value"] <= part["high"]
        ns = made["metrics"]["ns"]
        assert ns["l0"] == pytest.approx(total["l0_ns"] / total["rows_ns"])
        assert ns["fvu_p0"] == pytest.approx(total["error_sq_ns"] / total["variance_ns"])
        assert ns["mre"] == pytest.approx(total["rho_ns"] / total["rows_ns"])
        # What training found on the stored, rounded rows of the same contexts.
        run = json.loads((finished / "saes" / cell / "run.json").read_text(encoding="utf-8"))
        assert made["edges"] == run["edges"]
        assert ns["tokens"] == run["metrics"]["ns"]["tokens"]
        assert ns["fvu_p0"] == pytest.approx(run["metrics"]["ns"]["fvu_p0"], rel=0.01)
        assert ns.keys() == run["metrics"]["ns"].keys()
        assert made["sae_lens"]["model_performance_preservation/ce_loss_score"] == behaviour["ce_recovered_zero"]


def test_the_result_is_a_table_and_sentences(chain: tuple[Path, dict[str, Outcome]]) -> None:
    outcome = chain[1]["eval"]
    assert "Effect on the model's predictions" in outcome.out
    assert "At non-sinks the reconstruction costs" in outcome.out
    assert "placed" in outcome.out, "a placed sink is said to be placed wherever it shows"


def test_bins_of_one_sae(workspace: Path) -> None:
    cell = cells(workspace)[0]
    outcome = evaluate(workspace, cell, "--bins", "--tokens", "300", "--name", "binned")
    assert outcome.code == 0, outcome.err
    assert "ΔCE by norm" in outcome.out
    made = document(workspace, "binned")
    assert made["rows"]["tokens"] == 256
    groups = [*made["behaviour"]["bins"], made["behaviour"]["sinks"]]
    assert sum(group["rows"] for group in groups) == 256
    assert made["behaviour"]["sinks"]["rows"] == 2
    tensors = load_file(workspace / "evals" / "binned" / "contexts.safetensors")
    assert set(tensors) == COLUMNS | {"ce_groups", "rows_groups"}


def test_a_second_run_finds_it_and_another_is_refused(workspace: Path) -> None:
    before = contents(workspace / "evals")
    outcome = evaluate(workspace)
    assert outcome.code == 0
    assert "already complete" in outcome.err
    assert contents(workspace / "evals") == before
    cell = cells(workspace)[0]
    outcome = evaluate(workspace, cell, "--tokens", "300")
    assert outcome.code == 2
    assert "--tokens none -> 300" in outcome.message
    outcome = evaluate(workspace, cell, "--corpus", "builtin")
    assert outcome.code == 2
    assert "holds another evaluation (source store -> corpus" in outcome.message


def test_an_interrupted_run_goes_on_with_what_is_left(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(workspace / "evals")
    shutil.rmtree(workspace / "evals")
    original = BehaviourStudy._evaluate_chunk

    def stopped(self: BehaviourStudy, subjects: object) -> object:
        yield next(iter(original(self, subjects)))  # type: ignore[call-overload,arg-type]
        raise Interrupted(2, "stopped; the same command goes on")

    monkeypatch.setattr(BehaviourStudy, "_evaluate_chunk", stopped)
    assert evaluate(workspace).code == 130
    assert len(list(workspace.glob("evals/*/eval.json"))) == 1
    monkeypatch.setattr(BehaviourStudy, "_evaluate_chunk", original)
    outcome = evaluate(workspace)
    assert outcome.code == 0
    assert "1 of 2 evaluations are already complete" in outcome.err
    assert contents(workspace / "evals") == expected


def test_a_signal_ends_it_without_an_artifact(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(workspace / "evals")
    monkeypatch.setattr(interrupt, "clear", lambda: None)
    monkeypatch.setattr(interrupt, "_signum", 2)
    assert evaluate(workspace).code == 130
    assert not list(workspace.glob("evals/*/eval.json"))


def test_text_of_a_corpus_with_rules_fitted_on_it(workspace: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "text.jsonl"
    lines = [{"body": f"def f{i}(x): return x + {i}\n" * (i + 1)} for i in range(12)]
    corpus.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    arguments = ("--corpus", corpus, "--text-column", "body", "--context", "48", "--no-packing", "--name", "mine")
    outcome = evaluate(workspace, cells(workspace)[0], *arguments)
    assert outcome.code == 0, outcome.err
    made = document(workspace, "mine")
    rows = made["rows"]
    assert rows["source"] == "corpus"
    assert rows["activations"] is None
    assert rows["corpus"]["name"] == "text.jsonl"
    assert (rows["context_size"], rows["packing"], rows["bos"], rows["held_out"]) == (48, False, True, False)
    assert made["sinks"]["rules_from"] == "rows"
    assert made["sinks"]["position"] == rows["contexts"]
    tensors = load_file(workspace / "evals" / "mine" / "contexts.safetensors")
    assert len(set(tensors["predicted"].tolist())) > 2, "contexts are of unequal length"
    assert float(tensors["predicted"].sum()) == rows["tokens"] - rows["contexts"]


def test_the_corpus_that_was_trained_on_is_said_to_be(workspace: Path) -> None:
    outcome = evaluate(workspace, cells(workspace)[0], "--corpus", "builtin", "--tokens", "300", "--name", "seen")
    assert outcome.code == 0, outcome.err
    assert "text that it has seen is among what is evaluated" in outcome.err
    outcome = evaluate(
        workspace, cells(workspace)[0], "--corpus", "builtin", "--split", "heldout", "--tokens", "300", "--name", "new"
    )
    assert outcome.code == 0, outcome.err
    assert "has seen" not in outcome.err


def test_another_store_has_rules_of_its_own(workspace: Path, store: str) -> None:
    other = nsae("--workspace", workspace, "collect", "--model", "mini-sink", "--tokens", "6k", "--context", "64",
                 "--device", "cpu", "--name", "other")  # fmt: skip
    assert other.code == 0, other.err
    outcome = evaluate(workspace, cells(workspace)[0], "--activations", "other", "--name", "elsewhere")
    assert outcome.code == 0, outcome.err
    made = document(workspace, "elsewhere")
    assert made["rows"]["activations"]["name"] == "other"
    assert (made["context_size"], made["sinks"]["rules_from"]) == (64, "store")


def test_an_sae_trained_from_a_model_uses_its_held_out_text(tmp_path: Path) -> None:
    trained = nsae("--workspace", tmp_path, "train", "--from-model", "mini-sink", "--d-sae", "32", "--tokens", "4k",
                   "--batch-size", "256", "--buffer", "8k", "--device", "cpu", "--name", "live")  # fmt: skip
    assert trained.code == 0, trained.err
    outcome = evaluate(tmp_path, "live", "--tokens", "400")
    assert outcome.code == 0, outcome.err
    made = document(tmp_path, "live")
    assert made["rows"]["held_out"] is True
    assert made["sinks"]["rules_from"] == "run.json"
    tensors = load_file(tmp_path / "evals" / "live" / "contexts.safetensors")
    assert tensors["context"].tolist() == [19, 39, 59]


def test_a_store_without_text_asks_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "activations" / "foreign"
    hand_store.write_foreign(folder, hand_store.make_rows(d_in=64), [480], model="mini-sink")
    trained = nsae("--workspace", tmp_path, "train", "--d-sae", "32", "--tokens", "2k", "--batch-size", "64",
                   "--device", "cpu", "--name", "foreign")  # fmt: skip
    assert trained.code == 0, trained.err
    outcome = evaluate(tmp_path, "foreign")
    assert outcome.code == 2
    assert "holds no tokens and positions" in outcome.message
    assert "--corpus" in outcome.message
    outcome = evaluate(tmp_path, "foreign", "--corpus", "builtin", "--tokens", "300")
    assert outcome.code == 0, outcome.err


def test_an_altered_store_is_not_what_the_model_makes(workspace: Path) -> None:
    altered = nsae("--workspace", workspace, "alter", "--stretch-norms", "2", "--name", "stretched")
    assert altered.code == 0, altered.err
    outcome = evaluate(workspace, cells(workspace)[0], "--activations", "stretched", "--name", "fresh")
    assert outcome.code == 2
    assert "stretched: its norms were altered" in outcome.message
    assert "--corpus" in outcome.message


def test_sae_and_model_that_do_not_fit(tmp_path: Path) -> None:
    for name, d_in, hook in (("narrow", 12, hand_store.HOOK), ("deep", 64, hand_store.HOOKS[1])):
        folder = tmp_path / "activations" / name
        hand_store.write_foreign(folder, hand_store.make_rows(d_in=d_in, hooks=(hook,)), [480])
        trained = nsae("--workspace", tmp_path, "train", name, "--d-sae", "32", "--tokens", "2k", "--batch-size",
                       "64", "--device", "cpu", "--name", name)  # fmt: skip
        assert trained.code == 0, trained.err
    outcome = evaluate(tmp_path, "narrow", "--corpus", "builtin")
    assert outcome.code == 2
    assert "--model" in outcome.message
    outcome = evaluate(tmp_path, "narrow", "--corpus", "builtin", "--model", "mini-sink")
    assert outcome.code == 3
    assert "width 12" in outcome.message
    assert "mini-sink has width 64" in outcome.message
    outcome = evaluate(tmp_path, "deep", "--corpus", "builtin", "--model", "mini-sink")
    assert outcome.code == 3
    assert "blocks.4.hook_resid_post: mini-sink has layers 0-3" in outcome.message


def test_a_local_model_that_has_moved(tmp_path: Path) -> None:
    from nsae_cli.assets import model_dir

    shutil.copytree(model_dir("mini-sink"), tmp_path / "models" / "my-model")
    common = ("--device", "cpu", "--name")
    collected = nsae("--workspace", tmp_path, "collect", "--model", tmp_path / "models" / "my-model", "--corpus",
                     "builtin", "--tokens", "4k", *common, "a")  # fmt: skip
    assert collected.code == 0, collected.err
    trained = nsae("--workspace", tmp_path, "train", "--d-sae", "32", "--tokens", "2k", "--batch-size", "64", *common,
                   "b")  # fmt: skip
    assert trained.code == 0, trained.err
    outcome = evaluate(tmp_path, "b")
    assert outcome.code == 4
    assert "'my-model'" in outcome.message
    assert "--model DIR" in outcome.message
    outcome = evaluate(tmp_path, "b", "--model", "mini")
    assert outcome.code == 3
    assert "their weights differ" in outcome.message
    outcome = evaluate(tmp_path, "b", "--model", tmp_path / "models" / "my-model")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--context", "64"), 2, "--context: only with --corpus"),
        (("--corpus", "builtin", "--context", "129"), 2, "mini-sink reads at most 128 tokens"),
        (("--corpus", "builtin", "--activations", "x"), 2, "both say what text to use"),
        (("--corpus", "nothing.txt"), 2, "no such file"),
        (("--tokens", "100"), 2, "--tokens 100: expected at least 128"),
        (("--tokens", "0"), 2, "--tokens 0: expected at least 1"),
        (("--model-dtype", "fp8"), 2, "--model-dtype fp8"),
        (("--model", "nowhere/"), 4, "--model nowhere/"),
        (("--activations", "nowhere"), 2, "no activations named 'nowhere'"),
    ],
)
def test_options_that_do_not_fit(workspace: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    outcome = evaluate(workspace, cells(workspace)[0], *arguments, "--name", "fresh")
    assert outcome.code == code, outcome.err
    assert said in outcome.message


def test_an_sae_with_infinite_values(workspace: Path) -> None:
    from safetensors.torch import save_file

    from nsae_cli.store.commit import tensor_sha256

    folder = workspace / "saes" / cells(workspace)[0]
    weights = load_file(folder / "sae_weights.safetensors")
    weights["b_dec"][0] = float("nan")
    save_file(weights, folder / "sae_weights.safetensors")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run["weights_sha256"]["b_dec"] = tensor_sha256(weights["b_dec"])
    edit_json(folder / "run.json", weights_sha256=run["weights_sha256"])
    outcome = evaluate(workspace, cells(workspace)[0], "--name", "fresh")
    assert outcome.code == 5
    assert "NaN or infinity" in outcome.message


def test_as_a_stage_of_a_configuration(workspace: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    cell = cells(workspace)[0]
    config.write_text(
        f"stages:\n  - eval: {{saes: {cell}, corpus: builtin, split: heldout, tokens: 300, name: staged}}\n",
        encoding="utf-8",
    )
    outcome = nsae("--workspace", workspace, "run", config)
    assert outcome.code == 0, outcome.err
    assert "Effect on the model's predictions" in outcome.out
    assert document(workspace, "staged")["rows"]["corpus"]["split"] == "heldout"

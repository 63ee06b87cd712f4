"""What `nsae export` writes, read again by nsae's readers (which are tested on the peers' own files)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exported_saes import D_IN, D_SAE, HOOK, K, assert_same, made, rows
from golden_saes import GOLDEN
from safetensors.torch import load_file

from command import contents, nsae
from nsae_cli.errors import UsageError
from nsae_cli.interop.export_formats import WRITERS
from nsae_cli.interop.opening import open_sae

EXPRESSED = [
    ("relu", "saelens"), ("topk", "saelens"), ("jumprelu", "saelens"), ("tanh-relu", "saelens"),
    ("relu", "sparsify"), ("topk", "sparsify"),
    ("relu", "dictionary-learning"), ("topk", "dictionary-learning"), ("jumprelu", "dictionary-learning"),
    ("relu", "saebench"), ("topk", "saebench"), ("jumprelu", "saebench"), ("tanh-relu", "saebench"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "target"), EXPRESSED)
def test_what_is_written_reads_back_as_the_same_sae(tmp_path, act, target):
    found, x = made(tmp_path / "sae", act), rows()
    (tmp_path / "out").mkdir()
    written = WRITERS[target](found, tmp_path / "out")
    again = open_sae(str(written.folder))
    acts, x_hat = again.sae.reconstruct(x)
    if target == "saebench" and act in ("relu", "jumprelu"):
        norms = load_file(tmp_path / "sae" / "sae_weights.safetensors")["W_dec"].norm(dim=1)
        unit = load_file(written.folder / "sae_weights.safetensors")["W_dec"].norm(dim=1)
        torch.testing.assert_close(unit, torch.ones(D_SAE))
        acts = acts / norms
        assert "decoder norms" in written.exactness
    assert_same(found, x, acts, x_hat)
    assert (again.hook, again.model, again.context_size) == (HOOK, "gpt2", 128)


def test_saelens_gets_the_very_weights(tmp_path):
    found = made(tmp_path / "sae", "jumprelu")
    (tmp_path / "out").mkdir()
    WRITERS["saelens"](found, tmp_path / "out")
    before, after = (load_file(folder / "sae_weights.safetensors") for folder in (tmp_path / "sae", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("act", "target", "why"),
    [
        ("tanh-relu", "sparsify", "it has no tanh"),
        ("jumprelu", "sparsify", "it has no thresholds"),
        ("tanh-relu", "dictionary-learning", "it has no tanh"),
    ],
)
def test_what_a_package_cannot_compute_is_refused(tmp_path, act, target, why):
    found = made(tmp_path / "sae", act)
    with pytest.raises(UsageError, match=why):
        WRITERS[target](found, tmp_path)


def test_rows_that_are_normalised_one_by_one(tmp_path):
    """OpenAI's TopK goes to SAELens, which has its layer norm, and nowhere else."""
    found = open_sae(str(GOLDEN / "openai-topk"))
    expected = load_file(GOLDEN / "openai-topk" / "expected.safetensors")
    for target in ("sparsify", "dictionary-learning"):
        with pytest.raises(UsageError, match=r"normalises each row by itself \(layer_norm\)"):
            WRITERS[target](found, tmp_path)
    WRITERS["saelens"](found, tmp_path)
    again = open_sae(str(tmp_path))
    acts, x_hat = again.sae.reconstruct(expected["x"])
    torch.testing.assert_close(acts, expected["acts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, expected["x_hat"], rtol=1e-5, atol=1e-3)
    assert again.hook == "blocks.8.hook_resid_post"


@pytest.mark.parametrize(
    ("hook", "model", "folder"),
    [
        ("blocks.6.hook_resid_post", "gpt2", "h.6"),
        ("blocks.6.hook_resid_pre", "gpt2", "h.5"),
        ("blocks.0.hook_resid_post", "EleutherAI/pythia-70m", "layers.0"),
    ],
)
def test_sparsify_names_the_folder_after_the_hookpoint(tmp_path, hook, model, folder):
    found = made(tmp_path / "sae", "relu", hook_name=hook, model_name=model)
    (tmp_path / "out").mkdir()
    assert WRITERS["sparsify"](found, tmp_path / "out").folder.name == folder


def test_what_sparsify_and_saebench_must_be_told(tmp_path):
    found = made(tmp_path / "embeddings", "relu", hook_name="blocks.0.hook_resid_pre")
    with pytest.raises(UsageError, match="it reads the embeddings"):
        WRITERS["sparsify"](found, tmp_path)
    found = made(tmp_path / "nowhere", "relu", hook_name=None, model_name=None)
    with pytest.raises(UsageError, match="does not say that it reads the residual stream"):
        WRITERS["sparsify"](found, tmp_path)
    with pytest.raises(UsageError, match="does not name its model"):
        WRITERS["saebench"](found, tmp_path)


def test_saebench_finds_what_it_looks_for(tmp_path):
    """SAEBench 0.6 takes hook_name, model_name and hook_layer from a SAELens SAE's metadata."""
    found = made(tmp_path / "sae", "topk")
    (tmp_path / "out").mkdir()
    WRITERS["saebench"](found, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    wanted = {"hook_name": HOOK, "hook_layer": 6, "model_name": "gpt2", "context_size": 128, "prepend_bos": True}
    assert wanted.items() <= config["metadata"].items()
    assert config["architecture"] == "topk"
    assert config["k"] == K
    # topk compares features with each other: longer or shorter decoder rows would make it choose others.
    assert torch.equal(
        load_file(tmp_path / "out" / "sae_weights.safetensors")["W_dec"],
        load_file(tmp_path / "sae" / "sae_weights.safetensors")["W_dec"],
    )


# The command ----------------------------------------------------------------------------------------------------------


def test_a_group_a_cell_and_the_same_again(workspace: Path, tmp_path):
    [group] = (workspace / "saes").iterdir()
    said = nsae("--workspace", workspace, "--json", "export", group.name, "--to", "saelens")
    assert said.code == 0, said.err
    saes = said.json["result"]["saes"]
    assert [Path(one["path"]).relative_to(workspace / "exports").as_posix() for one in saes] == [
        f"{group.name}-saelens/L2-relu", f"{group.name}-saelens/L2-tanh-relu",
    ]  # fmt: skip
    for one, cell in zip(saes, ("L2-relu", "L2-tanh-relu"), strict=True):
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert (Path(one["path"]) / file).read_bytes() == (group / cell / file).read_bytes()
    assert "register()" in saes[1]["code"]
    before = contents(workspace / "exports")
    again = nsae("--workspace", workspace, "export", group.name, "--to", "saelens")
    assert again.code == 0
    assert "already exported" in again.err
    assert contents(workspace / "exports") == before
    cell = f"{group.name}/L2-relu"
    out = tmp_path / "made"
    assert nsae("--workspace", workspace, "export", cell, "--to", "dictionary-learning", "--out", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == ["ae.pt", "ae.safetensors", "config.json"]
    first = contents(out)
    assert nsae("--workspace", workspace, "export", cell, "--to", "dictionary-learning", "--out", out).code == 0
    assert contents(out) == first
    taken = nsae("--workspace", workspace, "export", cell, "--to", "saelens", "--out", out)
    assert (taken.code, "holds something else" in taken.message) == (2, True)


def test_a_group_with_one_that_cannot_be_expressed_leaves_nothing(workspace: Path):
    [group] = (workspace / "saes").iterdir()
    said = nsae("--workspace", workspace, "export", group.name, "--to", "sparsify")
    assert said.code == 2
    assert "L2-tanh-relu (tanh-relu) cannot be expressed in sparsify" in said.message
    assert not (workspace / "exports").exists()


def test_a_folder_of_another_package(tmp_path):
    """From OpenAI's ReLU to dictionary_learning: what nsae reads it can pass on."""
    said = nsae("--workspace", tmp_path / "runs", "--json", "export", GOLDEN / "openai-relu", "--to",
                "dictionary-learning", "--out", tmp_path / "out")  # fmt: skip
    assert said.code == 0, said.err
    expected = load_file(GOLDEN / "openai-relu" / "expected.safetensors")
    again = open_sae(str(tmp_path / "out"))
    assert again.sae.d_in == D_IN
    acts, x_hat = again.sae.reconstruct(expected["x"])
    torch.testing.assert_close(acts, expected["acts"], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(x_hat, expected["x_hat"], rtol=1e-5, atol=1e-3)

"""What nsae cannot compute, or must not open, is refused with the reason and the way out."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_saes import GOLDEN, change_config, change_tensors, copied
from safetensors.torch import load_file

from nsae_cli.errors import ArtifactError, NsaeError, NumericalError, ResourceError, UsageError
from nsae_cli.interop import hub
from nsae_cli.interop.conversion import dictionary_learning_snippet, openai_snippet
from nsae_cli.interop.opening import open_sae
from nsae_cli.lm.hub import HubRepository


@pytest.mark.parametrize(
    ("golden", "file", "changes", "message"),
    [
        ("saelens6-standard", "cfg.json", {"architecture": "transcoder"}, "architecture 'transcoder' is not one"),
        ("saelens6-standard", "cfg.json", {"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ("saelens6-standard", "cfg.json", {"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        (
            "saelens6-standard",
            "cfg.json",
            {"rescale_acts_by_decoder_norm": True},
            "is true with standard, expected only with topk",
        ),
        ("saelens6-standard", "cfg.json", {"d_in": 9}, r"W_enc has shape \[8, 16\], expected \[9, 16\]"),
        ("saelens6-standard", "cfg.json", {"d_in": None}, "d_in is None"),
        ("saelens6-standard", "cfg.json", {"sae_lens_version": "new"}, "sae_lens_version is 'new'"),
        ("saelens6-standard", "cfg.json", {"apply_b_dec_to_input": "yes"}, "expected true or false"),
        ("saelens6-topk", "cfg.json", {"k": 17}, "k is 17, expected a whole number from 1 to 16"),
        ("saelens5-relu", "cfg.json", {"activation_fn_str": "gelu"}, "with activation 'gelu'"),
        ("saelens5-relu", "cfg.json", {"normalize_activations": True}, "does not say by how much"),
        ("sparsify/h.6", "cfg.json", {"activation": "groupmax"}, "the largest of each group"),
        ("sparsify/h.6", "cfg.json", {"transcode": True}, "transcoder predicts"),
        ("sparsify/h.6", "cfg.json", {"skip_connection": True}, "skip connection"),
        ("sparsify/h.6", "cfg.json", {"signed": True}, "can be negative"),
        ("dictionary_learning-AutoEncoder", "config.json", {"trainer": {"dict_class": "IdentityDict"}}, "IdentityDict"),
        ("dictionary_learning-AutoEncoder", "config.json", {"trainer": None}, "has no trainer"),
        ("openai-topk", "openai.json", {"activation": "Identity"}, "activation 'Identity' is not one"),
        ("openai-topk", "openai.json", {"activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, "'Identity'"),
        ("openai-topk", "openai.json", {"location": "resid"}, "location 'resid'"),
        ("openai-topk", "openai.json", {"n_inputs": "8"}, "n_inputs is '8'"),
    ],
)
def test_configurations_that_nsae_does_not_compute(tmp_path, golden, file, changes, message):
    folder = copied(golden, tmp_path)
    change_config(folder, file, **changes)
    with pytest.raises(ArtifactError, match=message):
        open_sae(str(folder))


def test_nan_names_the_tensor(tmp_path):
    folder = copied("saelens6-standard", tmp_path)
    W_dec = load_file(folder / "sae_weights.safetensors")["W_dec"]
    W_dec[3, 2] = torch.nan
    change_tensors(folder, W_dec=W_dec)
    with pytest.raises(NumericalError, match=r"W_dec holds 1 values that are not finite, the first at \[3, 2\]"):
        open_sae(str(folder))


def test_tensors_that_nsae_does_not_know_are_not_passed_over(tmp_path):
    folder = copied("sparsify/h.6", tmp_path)
    change_tensors(folder, "sae.safetensors", W_skip=torch.zeros(8, 8))
    with pytest.raises(ArtifactError, match="does not know the tensor 'W_skip'"):
        open_sae(str(folder))


def test_scaling_factors_that_nobody_says_are_to_be_applied(tmp_path):
    folder = copied("saelens5-relu", tmp_path)
    change_tensors(folder, scaling_factor=torch.full((16,), 1.1))
    with pytest.raises(ArtifactError, match="make it true if they are to be applied"):
        open_sae(str(folder))


def test_damaged_weights(tmp_path):
    folder = copied("saelens6-standard", tmp_path)
    (folder / "sae_weights.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        open_sae(str(folder))


def test_a_folder_of_several_saes_lists_them():
    with pytest.raises(UsageError, match=r"holds 1 SAEs: h\.6; name one, as .*h\.6"):
        open_sae(str(GOLDEN / "sparsify"))


@pytest.mark.parametrize(("reference", "message"), [("nowhere", "no such SAE"), ("a/b/c", "not a hub id")])
def test_names_that_stand_for_nothing(reference, message):
    with pytest.raises(UsageError, match=message):
        open_sae(reference)


def test_a_folder_without_an_sae(tmp_path):
    with pytest.raises(ArtifactError, match="holds no SAE"):
        open_sae(str(tmp_path))


# Pickles --------------------------------------------------------------------------------------------------------------


def test_the_command_that_the_refusal_of_ae_pt_names_works(tmp_path):
    folder = copied("dictionary_learning-AutoEncoder", tmp_path)
    tensors = load_file(folder / "ae.safetensors")
    torch.save(tensors, folder / "ae.pt")
    (folder / "ae.safetensors").unlink()
    with pytest.raises(ArtifactError, match="nsae reads safetensors only") as refused:
        open_sae(str(folder))
    code = re.search(r'python -c "(.*)" in its folder', str(refused.value))
    assert code is not None
    subprocess.run([sys.executable, "-c", code[1]], cwd=folder, check=True)
    expected = load_file(folder / "expected.safetensors")
    torch.testing.assert_close(open_sae(str(folder)).sae.reconstruct(expected["x"])[0], expected["acts"])


def test_the_documented_conversion_of_openai_works(tmp_path):
    """On a state dict as theirs: tensors, the activation's name and its settings."""
    tensors = load_file(GOLDEN / "openai-topk" / "openai.safetensors")
    options = {"k": 4, "postact_fn": "ReLU"}
    torch.save({**tensors, "activation": "TopK", "activation_state_dict": options}, tmp_path / "8.pt")
    with pytest.raises(ArtifactError, match=r"docs/formats\.md, 'OpenAI'"):
        open_sae(str(tmp_path / "8.pt"))
    with pytest.raises(ArtifactError, match="safetensors only"):
        open_sae(str(tmp_path))
    snippet = openai_snippet(str(tmp_path / "8.pt"), str(tmp_path), "resid_post_mlp", 8)
    subprocess.run([sys.executable, "-c", snippet], check=True)
    expected = load_file(GOLDEN / "openai-topk" / "expected.safetensors")
    found = open_sae(str(tmp_path))
    torch.testing.assert_close(found.sae.reconstruct(expected["x"])[0], expected["acts"], rtol=1e-5, atol=1e-5)
    assert found.hook == "blocks.8.hook_resid_post"


def test_the_documentation_shows_these_conversions():
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert openai_snippet("8.pt", "sae-8", "resid_post_mlp", 8) in text
    assert dictionary_learning_snippet("ae.pt", "ae.safetensors").replace("; ", "\n") in text


@pytest.mark.parametrize("name", ["sae.pkl", "pytorch_model.bin"])
def test_other_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(ArtifactError, match="is a pickle"):
        open_sae(str(tmp_path / name))


# The hub --------------------------------------------------------------------------------------------------------------


def on_hub(monkeypatch, *files: str, reachable: bool = True) -> None:
    """A hub that knows one repository with these files, and has nothing cached."""

    def cached(*_, **__):
        raise hub.LocalEntryNotFoundError("not cached")

    answer = HubRepository(reachable, "abc" if reachable else None, files if reachable else None)
    monkeypatch.setattr(hub, "ask_hub", lambda *_, **__: answer)
    monkeypatch.setattr(hub, "snapshot_download", cached)


def test_without_network_or_cache(monkeypatch):
    on_hub(monkeypatch, reachable=False)
    with pytest.raises(
        ResourceError, match=r"SAE org/repo:blocks\.8: there is no such folder here, the Hugging Face hub"
    ):
        open_sae("org/repo:blocks.8")


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        (("l0/sae_weights.safetensors", "l1/sae_weights.safetensors"), UsageError, "name one, as org/repo:l0"),
        (("resid/ae.pt", "resid/config.json"), ArtifactError, "resid/ae.pt is a pickle"),
        (("README.md",), UsageError, "no SAE is there"),
        (("ae.pt", "config.json"), ArtifactError, r"--include '\*' --local-dir DIR`, then convert"),
    ],
)
def test_repositories_that_hold_several_saes_none_or_a_pickle(monkeypatch, files, kind, message):
    on_hub(monkeypatch, *files)
    with pytest.raises(kind, match=message):
        open_sae("org/repo")


def test_an_sae_on_the_hub(monkeypatch, tmp_path):
    on_hub(monkeypatch, "h.6/sae.safetensors", "h.6/cfg.json", "config.json")
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(GOLDEN / "sparsify")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_sae("org/repo:h.6").context_size == 512
    assert asked["repository"] == "org/repo"
    assert asked["revision"] is None  # by its name: the cache knows it then without a network
    assert {"h.6/sae.safetensors", "h.6/cfg.json", "config.json"} <= set(asked["allow_patterns"])


# Hostile configurations -----------------------------------------------------------------------------------------------


def paths_of(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of nested mappings, as a path."""
    if not isinstance(value, dict):
        return [path]
    return [found for key, inner in value.items() for found in [(*path, key), *paths_of(inner, (*path, key))]]


@pytest.mark.parametrize("golden", ["saelens6-topk", "saelens5-topk", "sparsify/h.6", "openai-topk",
                                    "dictionary_learning-AutoEncoderTopK"])  # fmt: skip
def test_nonsense_in_a_configuration_is_an_error_of_nsae_or_none(tmp_path, golden):
    folder = copied(golden, tmp_path)
    file = next(path for path in folder.glob("*.json"))
    original = json.loads(file.read_text())
    for path in dict.fromkeys(paths_of(original)):
        for value in ([], [1], {}, {"k": []}, None, True, -1, 0, 10**30, 1.5, "", "x", "\ud83d"):
            changed = json.loads(json.dumps(original))
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            file.write_text(json.dumps(changed))
            with contextlib.suppress(NsaeError):
                found = open_sae(str(folder))
                assert found.hook is None or isinstance(found.hook, str)
                assert found.context_size is None or found.context_size > 0
    for text in ("", "[]", "3", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ArtifactError):
            open_sae(str(folder))

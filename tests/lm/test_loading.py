from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.hf_api import HfApi
from safetensors.torch import load_file, save_file
from tiny_gpt2 import D_MODEL, MAX_CONTEXT, N_LAYERS, build_model

from nsae_cli import assets
from nsae_cli.errors import ArtifactError, ResourceError, UsageError
from nsae_cli.lm.loading import choose_model_dtype, inspect_model, load_model
from nsae_cli.lm.tokenizing import load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "tiny-gpt2"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_local_model_from_its_config(folder: Path) -> None:
    info = inspect_model(str(folder))
    assert (info.n_layers, info.d_model, info.max_context) == (N_LAYERS, D_MODEL, MAX_CONTEXT)
    assert (info.name, info.model_type, info.revision) == ("tiny-gpt2", "gpt2", None)
    assert info.model_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert not info.embedded


def test_config_alone_is_read_before_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert inspect_model(str(folder)).n_layers == N_LAYERS


@pytest.mark.parametrize("name", assets.EMBEDDED_MODELS)
def test_embedded_models(name: str) -> None:
    info = inspect_model(name)
    assert info.embedded
    assert (info.name, info.revision) == (name, None)


def test_loaded_model_is_ready_to_read(folder: Path) -> None:
    model = load_model(inspect_model(str(folder)), CPU, torch.bfloat16)
    assert not model.training
    assert type(model).__name__ == "GPT2Model"
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"


def test_model_with_head_has_the_same_weights(folder: Path) -> None:
    model = load_model(inspect_model(str(folder)), CPU, torch.float32, with_head=True)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(model(ids).logits, build_model()(ids).logits)


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    info = inspect_model(str(folder))
    load_model(info, CPU, torch.float32, with_head=True)
    load_tokenizer(info)
    assert capfd.readouterr() == ("", "")


def test_unknown_family_names_the_table(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    known = "gpt2, gpt_neox, llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, opt"
    with pytest.raises(UsageError, match=rf"family 'mamba' is not supported; known families: {known} .*FAMILIES"):
        inspect_model(str(folder))


def test_models_that_read_more_than_text(folder: Path) -> None:
    edit_config(folder, model_type="gemma3", text_config={"model_type": "gemma3_text"})
    with pytest.raises(UsageError, match=r"'gemma3' reads more than text, .*save its language model on its own"):
        inspect_model(str(folder))


@pytest.mark.parametrize("option", [{"use_bidirectional_attention": True}, {"is_causal": False}])
def test_models_that_look_ahead(folder: Path, option: dict[str, object]) -> None:
    edit_config(folder, **option)
    with pytest.raises(UsageError, match="no causal language model"):
        inspect_model(str(folder))


@pytest.mark.parametrize("model_type", [None, 3, ["gpt2"]])
def test_nonsense_family(folder: Path, model_type: object) -> None:
    edit_config(folder, model_type=model_type)
    with pytest.raises(UsageError, match="is not supported"):
        inspect_model(str(folder))


def test_revision_of_a_local_model(folder: Path) -> None:
    with pytest.raises(UsageError, match="--revision main"):
        inspect_model(str(folder), "main")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no config.json"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "\\udc80"])
def test_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"config.json is not"):
        inspect_model(str(folder))


def test_config_with_impossible_values(folder: Path) -> None:
    edit_config(folder, n_layer="many")
    with pytest.raises(ArtifactError, match=r"config.json is not usable"):
        inspect_model(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"only there as pickle \(pytorch_model.bin\).*save_pretrained"):
        inspect_model(str(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no weights"):
        inspect_model(str(folder))


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="the weights are damaged"):
        load_model(inspect_model(str(folder)), CPU, torch.float32)


def test_missing_weights_are_never_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor.clone() for name, tensor in weights.items() if "h.1.mlp" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"weights are missing, the first is h\.1\.mlp"):
        load_model(inspect_model(str(folder)), CPU, torch.float32)


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, n_embd=2 * D_MODEL)
    with pytest.raises(ArtifactError, match=r"do not fit config.json"):
        load_model(inspect_model(str(folder)), CPU, torch.float32)


# The hub, without a network ------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub does not answer; returns its (empty) local cache."""

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "model_info", fail)
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("name", ["gpt2", "owner/model"])
@pytest.mark.usefixtures("no_network")
def test_unreachable_hub_names_mini(name: str) -> None:
    with pytest.raises(ResourceError, match=r"not reachable.*use --model mini"):
        inspect_model(name)


def test_cached_hub_model_works_without_a_network(folder: Path, no_network: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = no_network / "models--owner--model"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    info = inspect_model("owner/model")
    assert (info.name, info.revision, info.cached_only) == ("owner/model", commit, True)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "a/b/c", "no model"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(ResourceError, match="no such folder, and not a hub id"):
        inspect_model(name)


def test_hub_model_with_pickles_only_is_refused_before_any_download(monkeypatch: pytest.MonkeyPatch) -> None:
    class File:
        rfilename = "pytorch_model.bin"

    class Info:
        sha = "c0ffee"
        siblings = (File(),)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: Info())
    with pytest.raises(ArtifactError, match="only there as pickle"):
        inspect_model("owner/model")


# Tokenizer -----------------------------------------------------------------------------------------------------------


def test_special_tokens_in_text_are_ordinary_text(folder: Path) -> None:
    tokenizer = load_tokenizer(inspect_model(str(folder)))
    [[ids]] = list(tokenizer.encode_batches(["a<|endoftext|>b"]))
    assert tokenizer.separator == 0
    assert tokenizer.special_token_ids == [0]
    assert 0 not in ids
    assert "".join(tokenizer.text_of(int(i)) for i in ids) == "a<|endoftext|>b"


def test_batches_keep_order_and_count(folder: Path) -> None:
    tokenizer = load_tokenizer(inspect_model(str(folder)))
    texts = ["x" * n for n in (0, 1, 5, 2_000_000, 3, 0)] + ["y"] * 600
    batches = list(tokenizer.encode_batches(texts))
    assert [len(ids) for batch in batches for ids in batch] == [len(text) for text in texts]
    assert max(len(batch) for batch in batches) <= 256
    assert [len(batch) for batch in batches[:2]] == [3, 1], "a long document is a batch of its own"


def test_tokenizer_identity_is_its_content(folder: Path) -> None:
    first = load_tokenizer(inspect_model(str(folder))).identity
    assert first == load_tokenizer(inspect_model(str(folder))).identity
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert load_tokenizer(inspect_model(str(folder))).identity["sha256"] != first["sha256"]


def test_tokenizer_of_another_model(folder: Path) -> None:
    edit_config(folder, vocab_size=100)
    with pytest.raises(ArtifactError, match="makes token 256, the model has 0-99"):
        load_tokenizer(inspect_model(str(folder)))


def test_no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="no tokenizer"):
        load_tokenizer(inspect_model(str(folder)))


def test_model_dtype_follows_the_device() -> None:
    assert choose_model_dtype("auto", torch.device("cuda")) == "bf16"
    assert choose_model_dtype("auto", CPU) == "fp32"
    assert choose_model_dtype("fp16", CPU) == "fp16"

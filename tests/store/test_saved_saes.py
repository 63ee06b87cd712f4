"""Saved SAEs: what is read back, what is refused, and what SAELens makes of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsae_cli import load_sae
from nsae_cli.errors import ArtifactError
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store import commit
from nsae_cli.store.sae_folder import write_run, write_sae
from sealed_json import edit_json, seal_again

ACTS = ("relu", "tanh-relu", "topk", "jumprelu")


def make_sae(act: str) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(4)
    weights = Weights(*(torch.randn(size, generator=generator) * 0.4 for size in ((8, 24), (24,), (24, 8), (8,))))
    threshold = torch.rand(24, generator=generator) + 0.2
    return SparseAutoencoder(act, weights, 5 if act == "topk" else None, threshold if act == "jumprelu" else None)


def save(folder: Path, act: str = "relu") -> SparseAutoencoder:
    folder.mkdir()
    sae = make_sae(act)
    write_sae(folder, sae, {"model_name": "gpt2", "hook_name": "blocks.2.hook_resid_post"})
    hashes = {name: commit.tensor_sha256(tensor) for name, tensor in sae.named().items()}
    write_run(folder, {"format_version": 1, "hook": "blocks.2.hook_resid_post", "weights_sha256": hashes})
    return sae


@pytest.mark.parametrize("act", ACTS)
def test_an_sae_comes_back_bit_for_bit(tmp_path, act):
    sae = save(tmp_path / "sae", act)
    back = load_sae(tmp_path / "sae")
    assert back.act == act
    assert back.named().keys() == sae.named().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.named().values(), sae.named().values(), strict=True))
    assert back.k == sae.k
    x = torch.randn(5, 8)
    assert torch.equal(back(x), sae.decode(sae.encode(x)))


def test_the_layout_is_saelens(tmp_path):
    save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["architecture"] == "standard"
    assert config["apply_b_dec_to_input"] is False
    assert config["normalize_activations"] == "none"
    assert config["metadata"]["sae_lens_version"] == "6.0.0"
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "sae" / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}


def test_topk_and_jumprelu_are_laid_out_as_in_saelens(tmp_path):
    for act in ("topk", "jumprelu"):
        save(tmp_path / act, act)
        assert json.loads((tmp_path / act / "cfg.json").read_text())["architecture"] == act
    config = json.loads((tmp_path / "topk" / "cfg.json").read_text())
    assert (config["k"], config["rescale_acts_by_decoder_norm"]) == (5, False)
    assert load_file(tmp_path / "jumprelu" / "sae_weights.safetensors")["threshold"].shape == (24,)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"k": 0}, "k is 0"), ({"k": 25}, "k is 25"), ({"k": None}, "k is None"), ({"k": "5"}, "k is '5'"),
     ({"rescale_acts_by_decoder_norm": True}, "rescale")],
)  # fmt: skip
def test_a_topk_sae_that_cannot_be_what_it_says(tmp_path, change, said):
    save(tmp_path / "sae", "topk")
    edit_json(tmp_path / "sae" / "cfg.json", **change)
    seal_again(tmp_path / "sae" / "run.json")
    with pytest.raises(ArtifactError, match=said):
        load_sae(tmp_path / "sae")


def test_a_jumprelu_sae_without_thresholds(tmp_path):
    save(tmp_path / "sae", "jumprelu")
    break_weights(tmp_path / "sae", threshold=None)
    with pytest.raises(ArtifactError, match="threshold is missing"):
        load_sae(tmp_path / "sae")


def test_encoding_by_hand():
    """pre_acts = (3, 1, 2, −1) and (1, 1, 1, 1)."""
    identity = Weights(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4))
    x = torch.tensor([[[3.0, 1.0, 2.0, -1.0]], [[1.0, 1.0, 1.0, 1.0]]])
    topk = SparseAutoencoder("topk", identity, k=2)
    assert topk.encode(x).tolist() == [[[3, 0, 2, 0]], [[1, 1, 0, 0]]]
    jump = SparseAutoencoder("jumprelu", identity, threshold=torch.tensor([0.5, 1.0, 2.5, 0.0]))
    assert jump.encode(x).tolist() == [[[3, 0, 0, 0]], [[1, 0, 0, 1]]]


def break_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"W_enc": torch.zeros(8, 23)}, r"W_enc is \[8, 23\]"),
        ({"W_dec": torch.zeros(24, 8, dtype=torch.float16)}, "W_dec"),
        ({"b_enc": None}, "b_enc is missing"),
        ({"b_dec": torch.zeros(8)}, "SHA-256"),
    ],
)
def test_damaged_weights(tmp_path, changes, said):
    save(tmp_path / "sae")
    break_weights(tmp_path / "sae", **changes)
    with pytest.raises(ArtifactError, match=said):
        load_sae(tmp_path / "sae")


def test_a_tanh_relu_sae_is_never_read_as_relu_nor_any_unknown_one(tmp_path):
    save(tmp_path / "sae", "tanh-relu")
    path = tmp_path / "sae" / "cfg.json"
    assert json.loads(path.read_text())["architecture"] == "nsae_tanh_relu"
    path.write_text(path.read_text().replace("nsae_tanh_relu", "gated"))
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        load_sae(tmp_path / "sae")
    seal_again(tmp_path / "sae" / "run.json")
    with pytest.raises(ArtifactError, match="unknown architecture"):
        load_sae(tmp_path / "sae")


@pytest.mark.parametrize("name", ["run.json", "cfg.json"])
@pytest.mark.parametrize("text", ["[]", "null", '{"format_version": 2}', "{"])
def test_damaged_descriptions(tmp_path, name, text):
    save(tmp_path / "sae")
    (tmp_path / "sae" / name).write_text(text)
    with pytest.raises(ArtifactError):
        load_sae(tmp_path / "sae")


def test_unfinished_and_truncated_saes(tmp_path):
    save(tmp_path / "sae")
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_sae(tmp_path / "sae")
    (tmp_path / "sae" / "run.json").unlink()
    with pytest.raises(ArtifactError, match="not finished"):
        load_sae(tmp_path / "sae")


class _Canary:
    def __reduce__(self):
        return (Path.touch, (Path("canary"),))


def test_pickles_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps(_Canary())
    (tmp_path / "sae.pt").write_bytes(payload)
    with pytest.raises(ArtifactError, match="safetensors only"):
        load_sae(tmp_path / "sae.pt")
    save(tmp_path / "sae")
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(payload)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_sae(tmp_path / "sae")
    assert not (tmp_path / "canary").exists()


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
def test_saelens_opens_an_sae_and_reconstructs_alike(tmp_path, act):
    sae_lens = pytest.importorskip("sae_lens", reason="the peer sae_lens is not installed")
    sae = save(tmp_path / "sae", act)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae", device="cpu")
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * 5
    with torch.no_grad():
        acts, x_hat = theirs.encode(x), theirs(x)
    assert float(acts.sum()) > 0
    torch.testing.assert_close(acts, sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, sae(x), rtol=1e-5, atol=1e-5)
    print(f"sae_lens {sae_lens.__version__}: largest difference {float((x_hat - sae(x)).abs().max()):.3g}")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_saelens_refuses_a_tanh_relu_sae(tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="the peer sae_lens is not installed")
    save(tmp_path / "sae", "tanh-relu")
    with pytest.raises(Exception, match="nsae_tanh_relu"):
        sae_lens.SAE.load_from_disk(tmp_path / "sae", device="cpu")

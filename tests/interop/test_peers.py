"""With the peers' packages installed: they open what nsae saves, and the golden folders are what they compute."""

from __future__ import annotations

import pytest
import torch
from golden_saes import FOLDERS, GOLDEN
from safetensors.torch import load_file

from nsae_cli.interop.opening import open_sae
from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store.sae_folder import write_sae

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

HOOK = "blocks.1.hook_resid_pre"
CONTEXTS, CONTEXT = 6, 20


@pytest.fixture
def sae_lens(monkeypatch):
    """The package, which forgets after the test what was registered in it."""
    package = pytest.importorskip("sae_lens", reason="the peer sae_lens is not installed")
    monkeypatch.setattr(package.registry, "SAE_CLASS_REGISTRY", dict(package.registry.SAE_CLASS_REGISTRY))
    return package


def saved(folder, act: str) -> SparseAutoencoder:
    """An SAE as `nsae train` saves it."""
    generator = torch.Generator().manual_seed(5)
    W_dec, b_enc, b_dec = (torch.randn(shape, generator=generator) * 0.4 for shape in ((32, 8), (32,), (8,)))
    sae = SparseAutoencoder(act, Weights(W_dec.T.contiguous(), b_enc, W_dec, b_dec))
    write_sae(folder, sae, {"model_name": "gpt2", "hook_name": HOOK, "context_size": CONTEXT, "prepend_bos": True})
    return sae


def activations() -> torch.Tensor:
    """x [contexts, context, 8] with a sink at position 0."""
    x = torch.randn(CONTEXTS, CONTEXT, 8, generator=torch.Generator().manual_seed(6)) + 0.5
    x[:, 0] *= 60
    return x


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith("saelens") and "scale" not in name])
def test_saelens_still_computes_the_golden_numbers(sae_lens, name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    theirs = sae_lens.SAE.load_from_disk(GOLDEN / name)
    torch.testing.assert_close(theirs.encode(expected["x"]), expected["acts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(expected["x"]), expected["x_hat"], rtol=1e-5, atol=1e-3)


def test_sparsify_still_computes_the_golden_numbers():
    sparsify = pytest.importorskip("sparsify", reason="the peer eai-sparsify is not installed")
    expected = load_file(GOLDEN / "sparsify/h.6/expected.safetensors")
    theirs = sparsify.SparseCoder.load_from_disk(GOLDEN / "sparsify/h.6")
    top_acts, top_indices, _ = theirs.encode(expected["x"])
    torch.testing.assert_close(theirs.decode(top_acts, top_indices), expected["x_hat"], rtol=1e-5, atol=1e-3)


def test_a_registered_tanh_relu_sae_opens_exactly(sae_lens, tmp_path):
    from nsae_cli.interop import saelens

    sae = saved(tmp_path, "tanh-relu")
    with pytest.raises(KeyError, match="nsae_tanh_relu"):
        sae_lens.SAE.load_from_disk(tmp_path)
    saelens.register()
    saelens.register()
    theirs, x = sae_lens.SAE.load_from_disk(tmp_path), activations()
    acts, x_hat = sae.reconstruct(x)
    assert float(acts.max()) > 0.99
    torch.testing.assert_close(theirs.encode(x), acts, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(theirs(x), x_hat, rtol=1e-6, atol=1e-6)
    # SAEBench folds inside try/except NotImplementedError: the SAE must come out of that unchanged.
    with pytest.raises(NotImplementedError, match="not homogeneous"):
        theirs.fold_W_dec_norm()
    torch.testing.assert_close(theirs(x), x_hat, rtol=1e-6, atol=1e-6)
    # What SAELens saves of it opens again, here and there.
    theirs.save_model(tmp_path / "again")
    torch.testing.assert_close(sae_lens.SAE.load_from_disk(tmp_path / "again")(x), x_hat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(open_sae(str(tmp_path / "again")).sae.reconstruct(x)[1], x_hat, rtol=1e-6, atol=1e-6)


class _Model:
    """Stands for a language model whose residual stream is known."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    def run_with_cache(self, tokens, **_):
        return None, {HOOK: self._x[tokens[:, 0]]}


class _Store:
    """Contexts 0, 1, …, each batch the next ones."""

    def __init__(self) -> None:
        self._next = 0

    def get_batch_tokens(self, count):
        first, self._next = self._next, self._next + count
        return torch.arange(first, self._next).unsqueeze(1).expand(count, CONTEXT)


@pytest.mark.parametrize("act", ["relu", "tanh-relu"])
def test_saelens_own_evaluation_agrees_with_nsaes_metrics(sae_lens, tmp_path, act):
    from sae_lens.evals import get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    from nsae_cli.interop import saelens

    saelens.register()
    saved(tmp_path, act)
    theirs, x = sae_lens.SAE.load_from_disk(tmp_path), activations()
    with torch.no_grad():
        scores, _ = get_sparsity_and_variance_metrics(
            theirs, _Model(x), _Store(), ActivationScaler(), n_batches=1, compute_l2_norms=True,
            compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=False,
            eval_batch_size_prompts=CONTEXTS, model_kwargs={},
        )  # fmt: skip
    rows = x.reshape(-1, 8)
    acts, x_hat = open_sae(str(tmp_path)).sae.reconstruct(rows)
    ours = ReconstructionAccumulator(8, rows.double().mean(dim=0))
    group = torch.zeros(len(rows), dtype=torch.int64)
    ours.update(rows, x_hat, rows.norm(dim=1), group, (acts > 0).sum(dim=1), acts.sum(dim=1), acts.sum(dim=1))
    scope = ours.compute(0, 0)["all"]
    same = {
        "explained_variance": "saelens_explained_variance",
        "explained_variance_legacy": "saelens_explained_variance_legacy",
        "mse": "mse",
        "cossim": "cosine",
        "l0": "l0",
        "l1": "l1",
        "relative_reconstruction_bias": "shrinkage",
    }
    for peer_name, own_name in same.items():
        assert scores[peer_name] == pytest.approx(scope[own_name], rel=2e-5), peer_name

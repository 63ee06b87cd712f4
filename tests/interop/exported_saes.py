"""SAEs to export, activations to put in, and how far rounding may take the outputs of two ways to compute them."""

from __future__ import annotations

from pathlib import Path

import torch

from nsae_cli.interop.foreign import ForeignSae
from nsae_cli.interop.opening import open_sae
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store.sae_folder import write_sae

HOOK = "blocks.6.hook_resid_post"
D_IN, D_SAE, K = 8, 32, 5
METADATA = {"model_name": "gpt2", "hook_name": HOOK, "context_size": 128, "prepend_bos": True, "dataset_path": "text"}
_EPS = torch.finfo(torch.float32).eps


def made(folder: Path, act: str, **metadata: object) -> ForeignSae:
    """An SAE in nsae's own layout: b_dec, b_enc and decoder rows that are far from nothing in particular."""
    generator = torch.Generator().manual_seed(17)
    W_enc, W_dec, b_enc, b_dec = (
        torch.randn(shape, generator=generator) * 0.4 for shape in ((D_IN, D_SAE), (D_SAE, D_IN), (D_SAE,), (D_IN,))
    )
    threshold = torch.rand(D_SAE, generator=generator) if act == "jumprelu" else None
    sae = SparseAutoencoder(act, Weights(W_enc, b_enc, W_dec, b_dec * 5), K if act == "topk" else None, threshold)
    folder.mkdir(parents=True, exist_ok=True)
    write_sae(folder, sae, METADATA | metadata)
    return open_sae(str(folder))


def rows() -> torch.Tensor:
    """x [200, 8] with norms from 0.3 to 3000, as between ordinary tokens and a sink."""
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(18))
    return x * torch.logspace(-1, 3, 200).unsqueeze(1)


def rounding(found: ForeignSae, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far acts [B, d_sae] and x̂ [B, d_in] may be apart: 16 roundings of every term of their sums."""
    sae = found.sae
    assert isinstance(sae, SparseAutoencoder)
    weights = sae.weights
    terms = (x.abs() + weights.b_dec.abs()) @ weights.W_enc.abs() + weights.b_enc.abs()
    acts = 16 * _EPS * terms
    x_hat = 16 * _EPS * (terms @ weights.W_dec.abs() + weights.b_dec.abs())
    return acts, x_hat


def assert_same(found: ForeignSae, x: torch.Tensor, acts: torch.Tensor, x_hat: torch.Tensor) -> None:
    """The outputs of another implementation are nsae's own, but for rounding."""
    own_acts, own_x_hat = found.sae.reconstruct(x)
    assert (own_acts > 0).any()
    assert (own_acts == 0).any()
    for theirs, own, allowed in zip((acts, x_hat), (own_acts, own_x_hat), rounding(found, x), strict=True):
        assert theirs.shape == own.shape
        worst = float(((theirs - own).abs() / allowed).max())
        assert worst <= 1, f"{worst:.3g} times what rounding explains"

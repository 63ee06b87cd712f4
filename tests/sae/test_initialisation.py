"""Where training starts."""

from __future__ import annotations

import pytest
import torch

from nsae_cli.kernels.reference import step_gradients
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.sae.init import INITIAL_THRESHOLD, geometric_median, initialise
from nsae_cli.sae.nonlinearity import BatchTopK, JumpRelu, TopK, make_nonlinearity
from nsae_cli.sae.penalty import PENALTIES


def rows(count: int = 1500, d_in: int = 24, sinks: int = 12) -> torch.Tensor:
    """Rows off the origin; some are 25 × as long."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, d_in, generator=generator) + torch.linspace(-1, 1, d_in)
    x[:sinks] = 25 * x[0]
    return x


def start(act: str, decoder: str, d_sae: int = 192, seed: int = 0) -> tuple[SparseAutoencoder, torch.Tensor]:
    x = rows()
    median = geometric_median(x[12:])
    weights = initialise(make_nonlinearity(act), decoder, d_sae, x, median, torch.Generator().manual_seed(seed))
    return SparseAutoencoder(act, weights), x


SELECTING = [TopK(6), BatchTopK(6), JumpRelu(0.05)]


@pytest.mark.parametrize("decoder", ["unit", "free", "bounded"])
@pytest.mark.parametrize("nonlinearity", SELECTING, ids=lambda act: act.name)
def test_selecting_activations_start_at_the_right_length(nonlinearity, decoder):
    """The same by the reference kernel, which selects in its own way; two blocks of rows in the initialisation."""
    x = rows()
    median = geometric_median(x[12:])
    weights = initialise(nonlinearity, decoder, 192, x, median, torch.Generator().manual_seed(0))
    one = torch.ones(len(x))
    result = step_gradients(
        x, weights, weights.zeros_like(), activation=nonlinearity, penalty=PENALTIES["l1"], error_weight=one,
        sparsity_weight=one,
    )  # fmt: skip
    x_hat, norm = x + result.error, torch.linalg.vector_norm
    assert 0.8 <= float(norm(x_hat, dim=1).sum() / norm(x, dim=1).sum()) <= 1.25
    centred = norm(x_hat - weights.b_dec, dim=1).sum() / norm(x - weights.b_dec, dim=1).sum()
    assert float(centred) == pytest.approx(1.0, abs=2e-3)
    lengths = norm(weights.W_dec, dim=1)
    if decoder != "free":
        torch.testing.assert_close(lengths, torch.ones(192))
    if nonlinearity.name == "jumprelu":
        torch.testing.assert_close(weights.log_threshold.exp(), torch.full((192,), INITIAL_THRESHOLD))
    else:
        assert weights.log_threshold is None
        assert float(result.l0.mean()) == pytest.approx(6, abs=1e-6)


ALLOWED = [
    ("relu", "unit"), ("relu", "free"), ("relu", "bounded"), ("tanh-relu", "free"), ("tanh-relu", "bounded"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "decoder"), ALLOWED)
def test_reconstructions_start_at_the_right_length(act, decoder):
    sae, x = start(act, decoder)
    x_hat = sae(x)
    ratio = float(torch.linalg.vector_norm(x_hat, dim=1).sum() / torch.linalg.vector_norm(x, dim=1).sum())
    assert 0.8 <= ratio <= 1.25
    b_dec = sae.weights.b_dec
    centred = torch.linalg.vector_norm(x_hat - b_dec, dim=1).sum() / torch.linalg.vector_norm(x - b_dec, dim=1).sum()
    assert float(centred) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("act", "decoder"), ALLOWED)
def test_encoder_is_the_decoder_transposed_times_one_factor(act, decoder):
    sae, _ = start(act, decoder)
    W = sae.weights
    factors = W.W_enc.T / W.W_dec
    torch.testing.assert_close(factors, torch.full_like(factors, float(factors.median())), rtol=1e-4, atol=0)
    lengths = torch.linalg.vector_norm(W.W_dec, dim=1)
    if decoder == "free":
        torch.testing.assert_close(torch.linalg.vector_norm(W.W_enc, dim=0), torch.ones(192))
        torch.testing.assert_close(lengths, lengths[:1].expand(192), rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(lengths, torch.ones(192))
    torch.testing.assert_close(W.b_enc, -(W.b_dec @ W.W_enc), rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    first, again, other = start("relu", "unit")[0], start("relu", "unit")[0], start("relu", "unit", seed=1)[0]
    assert torch.equal(first.weights.W_enc, again.weights.W_enc)
    assert not torch.equal(first.weights.W_enc, other.weights.W_enc)


def test_a_bounded_decoder_too_short_for_the_rows_is_nearly_saturated():
    """One feature of length 1 cannot reach rows of norm 5: the factor goes to 99 % of what can be had."""
    sae, x = start("tanh-relu", "bounded", d_sae=2)
    acts = sae.encode(x)
    assert 0.97 < float(acts[acts > 0].mean()) < 1.0
    assert all(tensor.isfinite().all() for tensor in sae.weights.tensors())


@pytest.mark.parametrize(("act", "decoder"), ALLOWED)
def test_rows_that_are_all_equal_or_never_fire_give_finite_weights(act, decoder):
    x = torch.ones(10, 4)
    weights = initialise(make_nonlinearity(act), decoder, 8, x, geometric_median(x), torch.Generator().manual_seed(0))
    assert all(tensor.isfinite().all() for tensor in weights.tensors())
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(1, 4, generator=generator, dtype=torch.float64).float()
    weights = initialise(
        make_nonlinearity(act), decoder, 1, -direction, torch.zeros(4), torch.Generator().manual_seed(0)
    )
    assert all(tensor.isfinite().all() for tensor in weights.tensors())


def test_geometric_median_of_a_line_is_the_middle_and_ignores_an_outlier():
    line = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [1000.0, 2000.0]])
    torch.testing.assert_close(geometric_median(line), torch.tensor([2.0, 4.0]).double(), rtol=1e-4, atol=1e-4)


def test_geometric_median_has_balanced_unit_vectors():
    """The gradient of the summed distance vanishes: Σ (x − m)/‖x − m‖ = 0."""
    x = rows().double()
    away = x - geometric_median(x)
    assert float((away / away.norm(dim=1, keepdim=True)).sum(0).norm()) < 1e-3 * len(x)

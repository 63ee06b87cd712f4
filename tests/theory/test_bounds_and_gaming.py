"""What acts and decoder rows can do together: bounds, gaming, and what stops it."""

import pytest
import torch
from small_saes import (
    ACTS,
    D_SAE,
    L1_POWERS,
    L2_POWERS,
    ROWS,
    generator,
    make,
    map_weights,
    random_rows,
    random_weights,
    run,
    unit_rows,
)

from nsae_cli.kernels.decoder import bound_rows_
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.sae.objective import DECODERS, L2_POWER, refused_combination
from nsae_cli.sae.penalty import PENALTIES

every_pq = [pytest.param(p, q, id=f"p{p}-q{q}") for p in L2_POWERS for q in L1_POWERS]


@pytest.mark.parametrize("act", ACTS)
def test_the_reconstruction_is_no_longer_than_the_sum_of_f_times_decoder_norm(act: str) -> None:
    sae, x = SparseAutoencoder(act, random_weights()), 20 * random_rows()
    acts = sae.encode(x)
    length = (sae.decode(acts) - sae.weights.b_dec).norm(dim=1)
    assert bool((length <= PENALTIES["l1-decoder-norm"].value(acts, sae.weights.W_dec.norm(dim=1)).sum(1)).all())


@pytest.mark.parametrize("rows", ["unit", "bounded"])
def test_tanh_relu_with_rows_of_norm_1_reconstructs_less_than_its_l0(rows: str) -> None:
    weights = random_weights()
    if rows == "unit":
        weights.W_dec = unit_rows(weights.W_dec)
    else:
        weights.W_dec *= torch.linspace(0.1, 2, D_SAE).double()[:, None]
        bound_rows_(weights.W_dec)
        assert weights.W_dec.norm(dim=1).min() < 0.9
    sae = SparseAutoencoder("tanh-relu", weights)
    x = 3 * random_rows(200)
    acts = sae.encode(x)
    length = (sae.decode(acts) - weights.b_dec).norm(dim=1)
    l0 = (acts > 0).sum(1)
    assert bool((length < l0)[l0 > 0].all())
    # Whatever the weights are: a token that is longer than F away from b_dec keeps an error.
    far = 10 * D_SAE * x / x.norm(dim=1, keepdim=True)
    assert bool(((sae(far) - far).norm(dim=1) > 8 * D_SAE).all())
    # relu has no such bound.
    relu = SparseAutoencoder("relu", weights)
    assert bool(((relu(far) - weights.b_dec).norm(dim=1) > D_SAE).any())


@pytest.mark.parametrize(("p", "q"), every_pq)
def test_relu_free_l1_has_no_minimum(p: int, q: int) -> None:
    """Acts divided by k and rows multiplied by k: the same x̂, and a strictly smaller loss, for ever."""
    x, weights = random_rows(), random_weights()
    first = run(make(p=p, q=q), x, weights)
    previous = float(first.loss.sum())
    for k in (1.5, 10.0, 1e3, 1e6):
        rescaled = run(make(p=p, q=q), x, map_weights(weights, 1 / k, 1 / k, k, 1))
        torch.testing.assert_close(rescaled.result.error, first.result.error, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rescaled.sparsity_term, first.sparsity_term / k, rtol=1e-9, atol=0)
        assert float(rescaled.loss.sum()) < previous
        previous = float(rescaled.loss.sum())
    assert previous == pytest.approx(float(first.error_term.sum()), rel=1e-5)


@pytest.mark.parametrize("sparsity", ["l1-decoder-norm", "tanh"])
def test_a_penalty_of_f_times_decoder_norm_does_not_see_that_rescaling(sparsity: str) -> None:
    x, weights = random_rows(), random_weights()
    losses = [run(make(sparsity=sparsity), x, map_weights(weights, 1 / k, 1 / k, k, 1)).loss for k in (1.0, 50.0)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)


def longer_rows(k: float) -> tuple:
    """A tanh-relu SAE with acts about k times smaller and rows k times longer."""
    x = random_rows(spread=0.1)
    return x, map_weights(random_weights(bias=0.1), 0.4 / k, 0.4 / k, 0.1 * k, 1)


def test_tanh_relu_with_a_free_decoder_games_l1() -> None:
    """As k grows it becomes the relu SAE without any penalty: L1 → 0 at that SAE's error."""
    l1, loss = [], []
    for k in (1.0, 4.0, 30.0, 1e3):
        x, weights = longer_rows(k)
        step = run(make("tanh-relu", beta=5.0), x, weights)
        l1.append(float(step.result.l1.sum()))
        loss.append(float(step.loss.sum()))
    assert l1 == sorted(l1, reverse=True)
    assert l1[-1] < 2e-3 * l1[0]
    x, weights = longer_rows(1.0)
    without_penalty = float(run(make("relu", beta=0.0), x, weights).loss.sum())
    assert loss[-1] == pytest.approx(without_penalty, rel=1e-2)
    assert loss[-1] < 0.8 * loss[0]


@pytest.mark.parametrize("sparsity", ["l1-decoder-norm", "tanh"])
def test_penalties_of_f_times_decoder_norm_rise_when_rows_grow(sparsity: str) -> None:
    penalty = []
    for k in (1.0, 2.0, 4.0, 30.0):
        x, weights = longer_rows(k)
        penalty.append(float(run(make("tanh-relu", sparsity=sparsity), x, weights).result.penalty.sum()))
    assert penalty == sorted(penalty)
    assert penalty[-1] > 1.01 * penalty[0]


def test_noise_makes_long_rows_expensive() -> None:
    noise = 0.1 * torch.randn(ROWS, D_SAE, generator=generator(8), dtype=torch.float64)
    for sigma, gaming_pays in ((0.0, True), (1.0, False)):
        losses = [float(run(make("tanh-relu", beta=5.0), *longer_rows(k), sigma * noise).loss.sum()) for k in (1, 100)]
        assert (losses[1] < losses[0]) is gaming_pays


def test_the_cost_of_noise_is_its_variance_times_slope2_times_decoder_norm2() -> None:
    """Σ_i σ²·(1 − f_i²)²·‖d_i‖² for features that are on: rows pay for their length, saturated features do not."""
    g = generator(2)
    weights = random_weights()
    weights.b_enc += 3 * torch.linspace(0.2, 1, D_SAE).double()
    x = 0.05 * random_rows(1)
    sigma = 0.02
    error = run(
        make("tanh-relu"),
        x.expand(20_000, -1),
        weights,
        sigma * torch.randn(20_000, D_SAE, generator=g, dtype=torch.float64),
    ).result.error  # x is constant: x̂ varies as the error does
    acts = SparseAutoencoder("tanh-relu", weights).encode(x)[0]
    assert acts.min() > 5 * sigma
    predicted = float((sigma**2 * (1 - acts**2) ** 2 * weights.W_dec.square().sum(1)).sum())
    assert float((error - error.mean(0)).square().sum(1).mean()) == pytest.approx(predicted, rel=0.05)


def test_a_bound_on_the_rows_ends_the_gaming() -> None:
    _, weights = longer_rows(50.0)
    bound_rows_(weights.W_dec)
    assert weights.W_dec.norm(dim=1).max() <= 1 + 1e-12
    # relu with bounded rows and l1: a row that is in use and shorter than 1 can always be traded for a longer one.
    x, weights = random_rows(), random_weights()
    weights.W_dec = 0.5 * unit_rows(weights.W_dec)
    full = map_weights(weights, 0.5, 0.5, 2, 1)
    assert full.W_dec.norm(dim=1).max() == pytest.approx(1)
    assert float(run(make(), x, full).loss.sum()) < float(run(make(), x, weights).loss.sum())


def test_the_tanh_penalty_leaves_large_contributions_alone() -> None:
    contribution = torch.tensor([[0.01, 0.25, 1.0, 3.0]], dtype=torch.float64)
    slope, _ = PENALTIES["tanh"].slopes(contribution, torch.ones(4, dtype=torch.float64))
    assert isinstance(slope, torch.Tensor)
    assert slope[0, 0] == pytest.approx(4, rel=0.01)
    assert slope[0, 2] < 0.006
    assert slope[0, 3] < 1e-9
    # So it counts: eight equal contributions cost eight times one, where l1 sees their sum only.
    assert PENALTIES["tanh"].value(torch.ones(1, 8).double(), torch.ones(8).double()).sum() == pytest.approx(
        8, rel=1e-2
    )


def test_exactly_these_combinations_are_refused() -> None:
    refused = {
        (act, decoder, sparsity)
        for act in ACTS
        for decoder in DECODERS
        for sparsity in PENALTIES
        for l2_norm in L2_POWER
        if refused_combination(act, decoder, sparsity, l2_norm) is not None
    }
    unbounded = {("tanh-relu", "unit", sparsity) for sparsity in PENALTIES} | {("relu", "free", "l1")}
    assert refused == unbounded | {(act, decoder, "l0") for act in ACTS for decoder in DECODERS}

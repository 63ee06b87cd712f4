"""The error 2(1 − c) of `--l2-norm cosine`: its degree, what it does not see, and where it has no minimum."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small_saes import (
    D_SAE,
    geometric_mean,
    make,
    make_cosine,
    map_weights,
    random_rows,
    random_weights,
    run,
    unit_rows,
)

from nsae_cli.kernels.decoder import bound_rows_
from nsae_cli.kernels.distance import COSINE_DISTANCE
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.autoencoder import SparseAutoencoder, fold_input_scale
from nsae_cli.sae.nonlinearity import ACTS, is_homogeneous
from nsae_cli.sae.objective import DECODERS, ERROR_TERMS, Objective, beta_from_alpha, refused_combination

#: Every loss that is offered with the cosine, by activation and penalty.
OFFERED = [("tanh-relu", "l1"), ("topk", "l1"), ("batchtopk", "l1"), ("jumprelu", "l0")]


def weights_of(act: str) -> Weights:
    weights = random_weights()
    if act == "jumprelu":
        weights.log_threshold = torch.linspace(-2, 0, D_SAE).double()
    return weights


def scaled_along(act: str, weights: Weights, k: float) -> Weights:
    """The SAE that does on k·x what these weights do on x."""
    return Weights(*(tensor.double() for tensor in fold_input_scale(act, weights, 1 / k).tensors()))


def error_terms(objective: Objective, x: torch.Tensor, weights: Weights) -> torch.Tensor:
    return run(objective, x, weights).error_term


def test_the_cosine_error_is_the_squared_distance_of_unit_vectors() -> None:
    x, weights = random_rows(), random_weights()
    x_hat = SparseAutoencoder("relu", weights)(x)
    between = unit_rows(x_hat) - unit_rows(x)
    cosine = torch.nn.functional.cosine_similarity(x, x_hat)
    torch.testing.assert_close(between.square().sum(1), 2 * (1 - cosine))
    torch.testing.assert_close(error_terms(make_cosine(), x, weights), 2 * (1 - cosine))
    # Of rho only the direction's part is seen: with D = 2(1 − c), 1 − c² = D − D²/4.
    distance = 2 * (1 - cosine)
    torch.testing.assert_close(1 - cosine**2, distance - distance**2 / 4)


def test_the_cosine_error_is_that_of_sq_where_x_hat_is_as_long_as_x() -> None:
    x, weights = random_rows(), random_weights()
    x_hat = SparseAutoencoder("relu", weights)(x)
    as_long = x_hat * (x.norm(dim=1) / x_hat.norm(dim=1))[:, None]
    relative = (as_long - x).square().sum(1) / x.norm(dim=1) ** 2
    torch.testing.assert_close(error_terms(make_cosine(), x, weights), relative)


@pytest.mark.parametrize(("act", "sparsity"), [("relu", "l1"), *OFFERED])
@pytest.mark.parametrize("k", [0.25, 8.0])
def test_the_cosine_error_has_degree_0_as_that_of_sq(act: str, sparsity: str, k: float) -> None:
    x, weights = random_rows(), weights_of(act)
    before = error_terms(make_cosine(act, sparsity), x, weights)
    after = error_terms(make_cosine(act, sparsity), k * x, scaled_along(act, weights, k))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)  # jumprelu's thresholds go through a float32 log
    assert ERROR_TERMS["cosine"][0] == ERROR_TERMS["sq"][0] == 2


@pytest.mark.parametrize("act", ["tanh-relu", "jumprelu"])
@pytest.mark.parametrize("alpha_scale", ["layer-norm", "note", "none"])
def test_with_the_cosine_alpha_needs_no_power_of_the_norm(act: str, alpha_scale: str) -> None:
    """β = α at every layer for what is offered (h = 0), and β' = β at every input scale."""
    assert not is_homogeneous("tanh-relu")
    sparsity = "l0" if act == "jumprelu" else "l1"
    objective = make_cosine(act, sparsity, beta=0.03, scale=0.07)
    p, h = objective.l2_power, objective.degree
    assert (p, h) == (2, 0)
    mean_power = float((random_rows().norm(dim=1) ** (2 - p)).mean())
    for norm_scale in (0.5, 30.0):
        assert beta_from_alpha(0.03, alpha_scale, (p, 0, h), norm_scale, mean_power) == pytest.approx(0.03)
    assert (objective.beta_scaled, objective.loss_scale) == (0.03, 1.0)
    # With --l1-norm norm one power is left, as at (2, 1).
    assert beta_from_alpha(0.03, "layer-norm", (p, 1, h), 30.0, 1.0) == pytest.approx(0.9)


@pytest.mark.parametrize(("act", "sparsity"), OFFERED)
def test_the_cosine_loss_is_the_same_in_scaled_and_raw_units(act: str, sparsity: str) -> None:
    x, scaled = random_rows(), weights_of(act)
    s = math.sqrt(6) / geometric_mean(x.norm(dim=1))
    raw = Weights(*(tensor.double() for tensor in fold_input_scale(act, scaled, s).tensors()))
    here, there = (run(make_cosine(act, sparsity, scale=scale), x, w) for scale, w in ((s, scaled), (1.0, raw)))
    torch.testing.assert_close(here.loss, there.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 0.5, 40.0])
def test_the_cosine_does_not_see_how_long_x_hat_is(factor: float) -> None:
    x, weights = random_rows(), random_weights()
    longer = map_weights(weights, 1, 1, factor, factor)
    torch.testing.assert_close(error_terms(make_cosine(), x, longer), error_terms(make_cosine(), x, weights))
    # Its gradient is perpendicular to x̂ and grows like 1/‖x̂‖.
    x_hat = SparseAutoencoder("relu", weights)(x)
    slopes = []
    for rows in (x_hat, factor * x_hat):
        measured = COSINE_DISTANCE.measure_(x, rows.clone())
        slopes.append(measured.slope * torch.as_tensor(measured.factor)[:, None])
        torch.testing.assert_close((slopes[-1] * rows).sum(1), torch.zeros(len(x)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(slopes[1] * factor, slopes[0])


@pytest.mark.parametrize("sparsity", ["l1", "l1-decoder-norm", "tanh"])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("act", ["relu", "tanh-relu"])
def test_a_penalty_that_falls_as_x_hat_shrinks_has_no_minimum_with_the_cosine(
    act: str, decoder: str, sparsity: str
) -> None:
    """Every loss that is refused for it: along one path of weights the error stays and the penalty falls to 0."""
    reason = refused_combination(act, decoder, sparsity, "cosine")
    if act == "tanh-relu" and (sparsity == "l1" or decoder == "unit"):
        assert (reason is None) == (decoder != "unit")  # whose rows are refused with any error
        return
    assert reason is not None
    assert "no minimum" in reason
    x, weights = random_rows(), random_weights()
    if decoder == "unit":
        weights.W_dec = unit_rows(weights.W_dec)
    elif decoder == "bounded":
        bound_rows_(weights.W_dec)
    # relu: acts shrink, which any decoder allows; tanh-relu: rows do, which free and bounded ones may.
    paths = {"relu": (lambda k: (k, k, 1, k)), "tanh-relu": (lambda k: (1, 1, k, k))}
    losses, penalties = [], []
    for k in (1.0, 0.5, 0.1, 1e-3, 1e-6):
        at = run(make_cosine(act, sparsity), x, map_weights(weights, *paths[act](k)))
        losses.append(float(at.loss.mean()))
        penalties.append(float(at.sparsity_term.mean()))
        torch.testing.assert_close(at.error_term, error_terms(make_cosine(act, sparsity), x, weights))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert penalties[-1] < 1e-4 * penalties[0]
    if sparsity != "tanh":
        # The squared error stops the same path: there is a best length.
        at_none = run(make(act, 2, 0, sparsity), x, map_weights(weights, *paths[act](1e-9))).loss.mean()
        assert at_none == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("act", ["topk", "batchtopk", "jumprelu"])
def test_what_selects_entries_has_a_loss_without_scale(act: str) -> None:
    """Neither error nor penalty sees how long x̂ is, so nothing pushes it: these are offered with any decoder."""
    sparsity = "l0" if act == "jumprelu" else "l1"
    objective = make_cosine(act, sparsity, beta=0.3 if act == "jumprelu" else 0.0)
    x, weights = random_rows(), weights_of(act)
    k = 1e-3
    smaller = map_weights(Weights(*list(weights.tensors())[:4]), k, k, 1, k)
    smaller.log_threshold = None if weights.log_threshold is None else weights.log_threshold + math.log(k)
    torch.testing.assert_close(run(objective, x, smaller).loss, run(objective, x, weights).loss)
    assert all(refused_combination(act, decoder, sparsity, "cosine") is None for decoder in DECODERS)


def test_with_the_cosine_tanh_relu_games_l1_without_longer_rows() -> None:
    """tanh(z/k) → z/k: the error tends to the relu SAE's, the penalty to 0, whatever the rows may be."""
    x, weights = random_rows(), random_weights()
    bound_rows_(weights.W_dec)
    of_relu = float(error_terms(make_cosine("relu"), x, weights).mean())
    losses = [
        float(run(make_cosine("tanh-relu"), x, map_weights(weights, 1 / k, 1 / k, 1, 1 / k)).loss.mean())
        for k in (1e2, 1e4, 1e6)
    ]
    assert losses[0] > losses[1] > losses[2] > of_relu
    assert losses[2] == pytest.approx(of_relu, abs=1e-5)


def test_bounded_rows_are_free_rows_to_the_cosine() -> None:
    x, weights = random_rows(), random_weights()
    longest = float(weights.W_dec.norm(dim=1).max())
    assert longest > 1
    bounded = map_weights(weights, 1, 1, 1 / longest, 1 / longest)
    assert bounded.W_dec.norm(dim=1).max() <= 1 + 1e-12
    objective = make_cosine("tanh-relu")
    torch.testing.assert_close(run(objective, x, bounded).loss, run(objective, x, weights).loss)


def test_exactly_these_combinations_are_refused_with_the_cosine() -> None:
    sparsities = ("l1", "l1-decoder-norm", "tanh", "l0")
    offered = {
        (act, decoder, sparsity)
        for act, decoder, sparsity in itertools.product(ACTS, DECODERS, sparsities)
        if refused_combination(act, decoder, sparsity, "cosine") is None
    }
    selecting = {(act, decoder, s) for act in ("topk", "batchtopk") for decoder in DECODERS for s in sparsities[:3]}
    selecting |= {("jumprelu", decoder, "l0") for decoder in DECODERS}
    assert offered == selecting | {("tanh-relu", "free", "l1"), ("tanh-relu", "bounded", "l1")}

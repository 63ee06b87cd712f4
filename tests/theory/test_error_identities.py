"""Identities of the error, of shrinkage and of the explained variance, through the project's accumulator."""

import math

import pytest
import torch
from small_saes import random_rows
from torch import Tensor

from nsae_cli.metrics.groups import SINKS
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator


def measure(x: Tensor, x_hat: Tensor, group: Tensor | None = None) -> dict:
    accumulator = ReconstructionAccumulator(x.shape[1], x.mean(0))
    zeros = torch.zeros(len(x))
    group = torch.zeros(len(x), dtype=torch.int64) if group is None else group
    accumulator.update(x, x_hat, x.norm(dim=1), group, zeros, zeros, zeros)
    return dict(accumulator.compute(0, 0))


def reconstruction(x: Tensor, seed: int = 5) -> Tensor:
    return 0.7 * x + 0.3 * random_rows(len(x), x.shape[1], seed=seed)


def lengths_and_cosine(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.norm(dim=1)
    return n, x_hat.norm(dim=1) / n, torch.cosine_similarity(x, x_hat)


def test_the_squared_error_is_exactly_n2_times_1_plus_r2_minus_2rc() -> None:
    x = random_rows()
    x_hat = reconstruction(x)
    n, r, c = lengths_and_cosine(x, x_hat)
    torch.testing.assert_close((x_hat - x).square().sum(1), n**2 * (1 + r**2 - 2 * r * c), rtol=1e-9, atol=1e-12)


def test_the_notes_formula_is_the_case_r_1_and_errs_by_1_minus_r_times_1_plus_r_minus_2c() -> None:
    x = random_rows()
    x_hat = reconstruction(x)
    n, r, c = lengths_and_cosine(x, x_hat)
    note = 2 * n**2 * (1 - c)
    surplus = note - (x_hat - x).square().sum(1)
    torch.testing.assert_close(surplus, n**2 * (1 - r) * (1 + r - 2 * c), rtol=1e-8, atol=1e-10)
    assert (surplus / n**2).abs().max() > 0.05
    same_length = x_hat / r[:, None]
    torch.testing.assert_close((same_length - x).square().sum(1), note, rtol=1e-9, atol=1e-12)
    # At the length that is best for the direction, r = c, it is (1−c)² too large.
    best = x_hat * (c / r)[:, None]
    torch.testing.assert_close(note - (best - x).square().sum(1), n**2 * (1 - c) ** 2, rtol=1e-9, atol=1e-12)


def test_rho_is_direction_error_plus_magnitude_error() -> None:
    x = random_rows()
    x_hat = reconstruction(x)
    _, r, c = lengths_and_cosine(x, x_hat)
    found = measure(x, x_hat)["all"]
    assert found["direction_error"] == pytest.approx(float((1 - c**2).mean()))
    assert found["magnitude_error"] == pytest.approx(float(((r - c) ** 2).mean()))
    assert found["mre"] == pytest.approx(found["direction_error"] + found["magnitude_error"], rel=1e-12)
    assert min(found["direction_error"], found["magnitude_error"]) > 0.01


def test_a_projection_is_too_short_and_yet_not_shrunk() -> None:
    """x̂ = the part of x in a subspace: r = c < 1, and γ = 1."""
    x = random_rows()
    x_hat = x.clone()
    x_hat[:, 4:] = 0
    _, r, c = lengths_and_cosine(x, x_hat)
    torch.testing.assert_close(r, c, rtol=1e-12, atol=1e-12)
    found = measure(x, x_hat)["all"]
    assert found["norm_ratio"] < 0.9
    assert found["shrinkage"] == pytest.approx(1, rel=1e-12)
    assert found["magnitude_error"] == pytest.approx(0, abs=1e-12)
    shrunk = measure(x, 0.6 * x_hat)["all"]
    assert shrunk["shrinkage"] == pytest.approx(0.6, rel=1e-12)
    assert shrunk["direction_error"] == pytest.approx(found["direction_error"], rel=1e-12)


def test_gamma_is_r_over_c_and_1_over_gamma_the_best_common_factor() -> None:
    x = random_rows()
    x_hat = reconstruction(x)
    _, r, c = lengths_and_cosine(x[:1], x_hat[:1])
    assert measure(x[:1], x_hat[:1])["all"]["shrinkage"] == pytest.approx(float(r / c), rel=1e-12)
    best = 1 / measure(x, x_hat)["all"]["shrinkage"]
    error = {k: float((k * best * x_hat - x).square().sum()) for k in (0.99, 1.0, 1.01)}
    assert min(error, key=error.__getitem__) == 1.0


def with_perfect_sinks(ev_ns: float, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose non-sinks have this explained variance and whose perfect sinks hold this share of Σ‖x − μ_ns‖²."""
    ordinary = random_rows(400, seed=6)
    spread = ordinary - ordinary.mean(0)
    error = random_rows(400, seed=7)
    error *= math.sqrt((1 - ev_ns) * float(spread.square().sum()) / float(error.square().sum()))
    sink = torch.zeros(4, ordinary.shape[1], dtype=torch.float64)
    sink[:, 0] = math.sqrt(share / (1 - share) * float(spread.square().sum()) / 4)
    x = torch.cat([ordinary, ordinary.mean(0) + sink])
    group = torch.cat([torch.zeros(400, dtype=torch.int64), torch.full((4,), SINKS)])
    return x, torch.cat([ordinary + error, x[400:]]), group


@pytest.mark.parametrize(("ev_ns", "share"), [(0.8, 0.9335), (0.5, 0.3), (0.9, 0.0)])
def test_perfect_sinks_raise_the_explained_variance_by_s_times_1_minus_ev(ev_ns: float, share: float) -> None:
    found = measure(*with_perfect_sinks(ev_ns, share))
    assert found["ns"]["explained_variance"] == pytest.approx(ev_ns, rel=1e-9)
    assert found["sinks"]["mse"] == 0
    gap = found["all"]["explained_variance"] - found["ns"]["explained_variance"]
    assert gap == pytest.approx(share * (1 - ev_ns), abs=1e-9)


def test_a_true_80_percent_reads_98_7() -> None:
    """With the share of position 0 in layer 3 of GPT-2 small at context 128."""
    found = measure(*with_perfect_sinks(0.80, 0.9335))
    assert round(found["all"]["explained_variance"], 3) == 0.987
    assert round(found["ns"]["explained_variance"], 3) == 0.800
    # An SAE that loses the sinks as well falls below zero, though on everything else it is as good as before.
    x, x_hat, group = with_perfect_sinks(0.80, 0.9335)
    x_hat[group == SINKS] = 0
    lost = measure(x, x_hat, group)
    assert lost["ns"]["explained_variance"] == pytest.approx(0.80)
    assert lost["all"]["explained_variance"] < 0.1

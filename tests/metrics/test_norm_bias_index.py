import numpy as np
import pytest
import torch
from torch import Tensor

from nsae_cli.metrics.norm_bias import MeasuredExponents, NormBiasIndex, index, measured_exponent, ols_slope

LOG_NORM = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
LOG_RHO = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)  # Σ(x−x̄)(y−ȳ) = 1, Σ(x−x̄)² = 2: slope .5


def everything(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def test_a_worked_slope() -> None:
    assert ols_slope(LOG_NORM, LOG_RHO) == pytest.approx(0.5)
    nbi = NormBiasIndex()
    nbi.update(torch.tensor([0, 0, 1]), LOG_NORM.exp(), LOG_RHO.exp(), everything(3))
    result = nbi.compute()
    assert result["nbi"] == pytest.approx(0.5)
    assert (result["rows"], result["contexts"]) == (3, 2)


@pytest.mark.parametrize("norms", [[], [3.0], [3.0, 3.0, 3.0], [57.3, 57.3 * (1 + 1e-8)]])
def test_without_variation_in_the_norm_there_is_no_slope(norms: list[float]) -> None:
    norm = torch.tensor(norms, dtype=torch.float64)
    rho = torch.linspace(0.1, 0.5, len(norms))
    nbi = NormBiasIndex()
    nbi.update(torch.arange(len(norms)), norm, rho, everything(len(norms)))
    result = nbi.compute(resamples=10)
    assert (result["nbi"], result["low"], result["high"]) == (None, None, None)
    assert ols_slope(norm.log(), rho.log()) is None


def test_equal_norms_have_no_slope_though_their_sums_round() -> None:
    rho = torch.rand(300, generator=torch.Generator().manual_seed(0))
    for norm in torch.linspace(51, 63, 25).tolist():
        nbi = NormBiasIndex()
        nbi.update(torch.arange(300), torch.full((300,), norm), rho, everything(300))
        result = nbi.compute(resamples=10)
        assert (result["nbi"], result["low"], result["high"]) == (None, None, None)


def test_rows_outside_the_mask_and_perfect_rows_are_left_out() -> None:
    nbi = NormBiasIndex()
    norm = torch.cat([LOG_NORM.exp(), torch.tensor([9.0, 3000.0])])
    rho = torch.cat([LOG_RHO.exp(), torch.tensor([0.0, 0.01])])
    nbi.update(torch.tensor([0, 1, 2, 3, 4]), norm, rho, torch.tensor([True] * 4 + [False]))
    result = nbi.compute(resamples=10)
    assert result["nbi"] == pytest.approx(0.5)
    assert (result["rows"], result["contexts"]) == (3, 3)


def test_a_measured_exponent_is_the_power_of_the_norm() -> None:
    norm = torch.tensor([1.0, 2.0, 5.0, 60.0, 3000.0])
    mask = torch.tensor([True, True, True, True, False])
    value = 0.3 * norm**1.5
    value[4] = 1.0
    assert measured_exponent(norm, value, mask) == pytest.approx(1.5, rel=1e-6)
    value[0] = 0.0  # has no logarithm, and is left out
    assert measured_exponent(norm, value, mask) == pytest.approx(1.5, rel=1e-6)
    assert measured_exponent(norm, torch.zeros(5), mask) is None


def test_streamed_exponents_are_those_of_all_rows_at_once() -> None:
    g = torch.Generator().manual_seed(4)
    norm, a, b = (torch.rand(90, generator=g) + 0.1 for _ in range(3))
    a[5], norm[7] = 0.0, 0.0
    mask = torch.arange(90) % 9 > 0
    streamed = MeasuredExponents()
    for part in torch.arange(90).split(40):
        streamed.update(norm[part], {"a": a[part], "b": b[part]}, mask[part])
    expected = {"a": measured_exponent(norm, a, mask), "b": measured_exponent(norm, b, mask)}
    assert streamed.compute() == pytest.approx(expected)
    flat = MeasuredExponents()
    flat.update(torch.full((5,), 3.0), {"a": a[:5]}, mask[:5])
    assert flat.compute() == {"a": None}


def correlated_rows(contexts: int = 40, per_context: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose log ρ has a part that is common to a context: fewer independent data than rows."""
    g = torch.Generator().manual_seed(7)
    context = torch.arange(contexts).repeat_interleave(per_context)
    common = torch.randn(contexts, 2, generator=g, dtype=torch.float64)[context]
    noise = torch.randn(len(context), 2, generator=g, dtype=torch.float64)
    log_norm = 4 + 0.2 * common[:, 0] + 0.1 * noise[:, 0]
    log_rho = -2 + 0.8 * (log_norm - 4) + 0.4 * common[:, 1] + 0.2 * noise[:, 1]
    return context, log_norm.exp(), log_rho.exp()


def test_the_interval_is_that_of_a_bootstrap_over_contexts() -> None:
    context, norm, rho = correlated_rows()
    nbi = NormBiasIndex()
    nbi.update(context, norm, rho, everything(len(norm)))
    result = nbi.compute(resamples=4000)

    # The same, written out: draw whole contexts, refit.
    rng = np.random.default_rng(1)
    u, v = norm.log().numpy().reshape(40, 12), rho.log().numpy().reshape(40, 12)
    slopes = []
    for _ in range(4000):
        drawn = rng.integers(0, 40, 40)
        slopes.append(np.polyfit(u[drawn].ravel(), v[drawn].ravel(), 1)[0])
    low, high = np.percentile(slopes, [2.5, 97.5])
    width = high - low
    assert result["nbi"] == pytest.approx(np.polyfit(u.ravel(), v.ravel(), 1)[0])
    assert result["low"] == pytest.approx(low, abs=0.06 * width)
    assert result["high"] == pytest.approx(high, abs=0.06 * width)


def test_neither_chunks_nor_order_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    context, norm, rho = correlated_rows()
    whole = NormBiasIndex()
    whole.update(context, norm, rho, everything(len(norm)))
    monkeypatch.setattr(index, "_PENDING_LIMIT", 5)  # partial sums are added up several times on the way
    streamed = NormBiasIndex()
    order = torch.randperm(len(norm), generator=torch.Generator().manual_seed(2))
    for part in order.split([1, 100, 7, 300, 72]):
        streamed.update(context[part], norm[part], rho[part], everything(len(part)))
    assert streamed.compute(resamples=200) == pytest.approx(whole.compute(resamples=200), rel=1e-9)


def test_the_interval_follows_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    context, norm, rho = correlated_rows()
    nbi = NormBiasIndex()
    nbi.update(context, norm, rho, everything(len(norm)))
    first = nbi.compute(resamples=100)
    assert nbi.compute(resamples=100) == first
    assert nbi.compute(resamples=100, seed=1)["low"] != first["low"]
    monkeypatch.setattr(index, "_DRAWS_PER_CHUNK", 120)  # three resamples at a time
    assert nbi.compute(resamples=100) == first


def test_one_context_has_no_interval() -> None:
    nbi = NormBiasIndex()
    nbi.update(torch.tensor([4, 4, 4]), LOG_NORM.exp(), LOG_RHO.exp(), everything(3))
    result = nbi.compute(resamples=10)
    assert (result["low"], result["high"]) == (None, None)
    assert result["nbi"] == pytest.approx(0.5)


def test_an_index_without_rows() -> None:
    empty = NormBiasIndex()
    assert empty.compute() == {"nbi": None, "low": None, "high": None, "rows": 0, "contexts": 0}

"""Intervals against hand calculations and plain loops; marks at their borders."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nsae_cli.analysis.comparison_statistics import (
    bootstrap,
    context_statistics,
    judge,
    mean_and_sd,
    percentile_interval,
    resampled_counts,
    t_interval,
    t_quantile,
)


@pytest.mark.parametrize(
    ("df", "expected"),
    # Printed tables of the 97.5 % quantile.
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (10, 2.22814), (30, 2.04227)],
)
def test_t_quantile_is_the_printed_one(df: int, expected: float) -> None:
    assert t_quantile(df) == pytest.approx(expected, abs=5e-5)


def test_t_quantile_at_another_level() -> None:
    assert t_quantile(6, 0.99) == pytest.approx(3.70743, abs=5e-5)
    assert t_quantile(1, 0.5) == pytest.approx(1.0)  # of Cauchy's distribution


def test_t_interval_by_hand() -> None:
    # Mean 7/3; squares of the deviations 16/9, 1/9, 25/9: variance 7/3, sd 1.52753; t(2) = 4.30265.
    half = 4.30265 * math.sqrt(7 / 3) / math.sqrt(3)
    assert t_interval([1.0, 2.0, 4.0]) == pytest.approx((7 / 3 - half, 7 / 3 + half), abs=1e-4)
    assert t_interval([1.0]) is None
    assert mean_and_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    assert mean_and_sd([3.0]) == (3.0, None)


def _sums(contexts: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    sums = {
        name: generator.uniform(1, 5, contexts)
        for name in ("error_sq_ns", "rho_ns", "rows_ns", "l0_ns", "ce_clean", "ce_ns", "ce_with_sae", "predicted")
    }
    sums["variance_ns"] = sums["error_sq_ns"] * generator.uniform(3, 6, contexts)
    x, y = generator.standard_normal((2, contexts, 7))
    sums["nbi_moments"] = np.stack([np.full(contexts, 7.0), x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1)], 1)
    sums["context"] = np.arange(contexts)
    return sums


def test_bootstrap_is_a_plain_loop() -> None:
    contexts, draws = 23, 40
    sums = _sums(contexts, 1)
    drawn = np.random.default_rng(0).integers(contexts, size=(draws, contexts))
    resampled = bootstrap(sums, draws)
    for draw in range(draws):
        error = variance = extra = predicted = 0.0
        count = np.zeros(5)
        for context in drawn[draw]:
            error += sums["error_sq_ns"][context]
            variance += sums["variance_ns"][context]
            extra += sums["ce_ns"][context] - sums["ce_clean"][context]
            predicted += sums["predicted"][context]
            count += sums["nbi_moments"][context]
        assert resampled["fvu_p0_ns"][draw] == pytest.approx(error / variance, rel=1e-12)
        assert resampled["delta_ce_ns"][draw] == pytest.approx(extra / predicted, rel=1e-9)
        n, x, y, xx, xy = count
        assert resampled["nbi"][draw] == pytest.approx((n * xy - x * y) / (n * xx - x * x), rel=1e-9)


def test_blocks_of_draws_do_not_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resampled_counts(10, 50)))
    monkeypatch.setattr("nsae_cli.analysis.comparison_statistics._DRAWS_PER_CHUNK", 70)
    parts = list(resampled_counts(10, 50))
    assert len(parts) == 8
    assert np.array_equal(np.concatenate(parts), whole)
    assert (whole.sum(1) == 10).all()


def test_statistics_of_two_contexts_by_hand() -> None:
    sums = {
        "context": np.array([19, 39]),
        "error_sq_ns": np.array([1.0, 5.0]),
        "variance_ns": np.array([10.0, 20.0]),
        "rho_ns": np.array([1.0, 2.0]),
        "rows_ns": np.array([4, 6]),
        "ce_clean": np.array([10.0, 20.0]),
        "ce_with_sae": np.array([13.0, 24.0]),
        "predicted": np.array([7, 7]),
    }
    found = context_statistics(sums)
    # A ratio of sums, not the mean .175 of the contexts' ratios.
    assert found["fvu_p0_ns"] == pytest.approx([6 / 30])
    assert found["mre_ns"] == pytest.approx([3 / 10])
    assert found["delta_ce_all"] == pytest.approx([7 / 14])
    assert not {"nbi", "delta_ce_ns"} & set(found)


def test_percentiles() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))
    assert percentile_interval(np.array([np.nan, 2.0])) == (2, 2)
    assert percentile_interval(np.array([np.nan])) is None


@pytest.mark.parametrize(
    ("seeds", "contexts", "mark"),
    [
        ((-3, -2), (-4, -2), "better"),
        ((2, 3), (2, 4), "worse"),
        ((-1, 1), (-0.5, 0.9), "equivalent"),
        ((0.2, 0.9), (0.1, 0.8), "equivalent"),
        ((-1, 1.1), (-0.5, 0.9), "undecided"),
        ((-3, -2), (-4, 0.1), "undecided"),
        ((-3, -2), (2, 3), "undecided"),
        (None, (-4, -2), "undecided"),
        ((-3, -2), None, "undecided"),
    ],
)
def test_marks(seeds: tuple[float, float] | None, contexts: tuple[float, float] | None, mark: str) -> None:
    judgement = judge(seeds, contexts, 1.0, "lower")
    assert judgement.mark == mark
    assert bool(judgement.reason) == (mark == "undecided" or seeds == (0.2, 0.9))
    mirrored = {"better": "worse", "worse": "better"}.get(mark, mark)
    assert judge(seeds, contexts, 1.0, "higher").mark == mirrored


def test_a_slope_has_no_good_side() -> None:
    assert judge((-3, -2), (-4, -2), None, "none").mark == "lower"
    assert judge((0, 0), (0, 0), None, "none").mark == "undecided"


def test_reasons_name_what_is_missing() -> None:
    assert judge(None, None, 1, "lower").reason == (
        "fewer than 2 seeds: no t-interval; not evaluated on common contexts: no bootstrap"
    )
    assert judge((-3, 2), (-2, -1.5), 1, "lower").reason == "the interval over seeds holds 0"

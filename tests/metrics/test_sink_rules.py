import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsae_cli.metrics.sinks import SinkCounts, SinkThresholds, fit_thresholds, flag_sinks, massive_rows


@pytest.mark.parametrize(("at_position0", "active"), [(150.0, False), (150.1, True), (10.0, False)])
def test_rule_1_needs_three_times_the_median_elsewhere(at_position0: float, active: bool) -> None:
    assert fit_thresholds(51.0, at_position0, 50.0).position0_active is active


@pytest.mark.parametrize(("at_position0", "elsewhere"), [(None, None), (3000.0, None), (None, 50.0)])
def test_rule_1_is_off_where_its_comparison_cannot_be_made(at_position0: float | None, elsewhere: float | None) -> None:
    assert fit_thresholds(51.0, at_position0, elsewhere).position0_active is None


def test_thresholds_survive_json() -> None:
    thresholds = fit_thresholds(51.0, 3000.0, 50.0)
    assert thresholds.norm_threshold == 510.0
    assert SinkThresholds(**json.loads(json.dumps(asdict(thresholds)))) == thresholds


def test_each_rule_and_their_overlap() -> None:
    thresholds = fit_thresholds(50.0, 3000.0, 50.0)
    flags = flag_sinks(
        thresholds,
        norm=torch.tensor([3000.0, 60.0, 500.0, 501.0, 900.0, 50.0]),
        positions=torch.tensor([0, 0, 5, 6, 7, 8]),
        massive=torch.tensor([True, False, False, False, True, False]),
    )
    assert flags.position.tolist() == [True, True, False, False, False, False]
    assert flags.norm.tolist() == [True, False, False, True, True, False]
    assert flags.any.tolist() == [True, True, False, True, True, False]

    counts = SinkCounts()
    counts.update(flags)
    counts.update(flags)
    assert counts.to_json() == {
        "total": 8,
        "position": 4,
        "norm": 6,
        "massive": 4,
        "overlap": {
            "position": 2,
            "norm": 2,
            "massive": 0,
            "position+norm": 0,
            "position+massive": 0,
            "norm+massive": 2,
            "position+norm+massive": 2,
        },
    }


def test_rule_1_that_is_judged_and_does_not_apply_counts_zero() -> None:
    flags = flag_sinks(fit_thresholds(50.0, 51.0, 50.0), torch.tensor([51.0, 600.0]), torch.tensor([0, 1]), None)
    counts = SinkCounts()
    counts.update(flags)
    assert flags.any.tolist() == [False, True]
    assert counts.to_json() == {
        "total": 1,
        "position": 0,
        "norm": 1,
        "massive": None,
        "overlap": {"position": 0, "norm": 1, "position+norm": 0},
    }


def test_a_rule_that_was_never_judged_is_none() -> None:
    counts = SinkCounts()
    counts.update(flag_sinks(fit_thresholds(50.0, None, None), torch.tensor([501.0, 1.0]), None, None))
    assert counts.to_json() == {"total": 1, "position": None, "norm": 1, "massive": None, "overlap": {"norm": 1}}


def test_rows_judged_by_other_rules_are_not_mixed() -> None:
    thresholds, norm = fit_thresholds(50.0, None, None), torch.ones(2)
    counts = SinkCounts()
    counts.update(flag_sinks(thresholds, norm, None, None))
    with pytest.raises(ValueError, match="cannot be counted"):
        counts.update(flag_sinks(thresholds, norm, None, torch.zeros(2, dtype=torch.bool)))


def test_missing_positions_are_an_error_where_rule_1_applies() -> None:
    with pytest.raises(ValueError, match="positions"):
        flag_sinks(fit_thresholds(50.0, 3000.0, 50.0), torch.ones(2), None, None)


def test_massive_needs_both_an_absolute_and_a_relative_size() -> None:
    x = torch.tensor(
        [
            [-101.0, 0.1, 0.1, 0.1],  # 101 > 100 and 1010 × the median
            [100.0, 0.01, 0.01, 0.01],  # not above 100
            [500.0, 0.6, 0.6, 0.6],  # 833 × the median
            [101.0, 0.1, 0.05, 0.2],  # median (.1 + .2)/2... of .05, .1, .2, 101: .15, so 673 ×
            [101.0, 0.1, 0.05, 0.1009],  # median .10045: 1005 ×
        ]
    )
    assert massive_rows(x).tolist() == [True, False, False, False, True]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_massive_rows_are_those_of_the_definition(seed: int, d: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(40, d, generator=g) * 0.2).to(dtype)
    x[:, 0] = 100 + 200 * torch.rand(40, generator=g).to(dtype)
    size = x.double().abs()
    expected = (size.amax(1) > 100) & (size.amax(1) > 1000 * torch.quantile(size, 0.5, dim=1))
    assert torch.equal(massive_rows(x), expected)

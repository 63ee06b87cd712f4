import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_rows import Rows, make_rows

from nsae_cli.metrics.groups import SINKS
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator


def measure(rows: Rows, p: int = 0, q: int = 0, mean_all: bool = True) -> Any:
    accumulator = ReconstructionAccumulator(rows.x.shape[1], rows.x.double().mean(0) if mean_all else None)
    accumulator.update(*rows.arguments())
    return accumulator.compute(l2_power=p, l1_power=q)


def scopes(measured: Any) -> list[dict[str, Any]]:
    return [measured["all"], measured["ns"], measured["sinks"], *measured["bins"]]


def assert_equal(a: Any, b: Any, rel: float = 1e-9) -> None:
    for scope, other in zip(scopes(a), scopes(b), strict=True):
        assert scope == pytest.approx(other, rel=rel, abs=1e-12)


# Three rows in the plane.       x        x_hat      ‖e‖²   ρ    c   r   x·x_hat
#   bin 0, n = 5:             (3, 4)   (0, 2.5)   11.25  .45  .8  .5     10
#   bin 3, n = 2:             (0, 2)   (0, 1)      1     .25   1  .5      2
#   sink, n = 10:             (10, 0)  (9, 0)      1     .01   1  .9     90
WORKED = Rows(
    x=torch.tensor([[3.0, 4.0], [0.0, 2.0], [10.0, 0.0]]),
    x_hat=torch.tensor([[0.0, 2.5], [0.0, 1.0], [9.0, 0.0]]),
    norm=torch.tensor([5.0, 2.0, 10.0]),
    group=torch.tensor([0, 3, SINKS]),
    l0=torch.tensor([3, 1, 2]),
    l1=torch.tensor([4.0, 2.0, 9.0]),
    penalty=torch.tensor([5.0, 3.0, 12.0]),
)


def test_worked_numbers_of_the_non_sinks() -> None:
    ns = measure(WORKED, p=1, q=1)["ns"]
    assert ns == pytest.approx(
        {
            "tokens": 2,
            "l0": 2.0,
            "l1": 3.0,
            "mse": 12.25 / 2,
            # μ_0 = (1.5, 3): both rows are √3.25 away.
            "fvu_p0": 12.25 / 6.5,
            # Weights .2, .5: μ_1 = (6, 18)/7, Σ w‖x−μ‖² = (.2·325 + .5·52)/49 = 13/7, Σ w‖e‖² = 2.25 + .5.
            "fvu_p1": 2.75 * 7 / 13,
            # Weights .04, .25: μ_2 = (12, 66)/29, Σ w‖x−μ‖² = (.04·8125 + .25·208)/841 = 13/29, Σ w‖e‖² = .45 + .25.
            "fvu_p2": 0.7 * 29 / 13,
            "explained_variance": 1 - 12.25 / 6.5,
            # x̄ = (13/3, 2): squared distances 52/9, 169/9 (and 325/9 for the sink).
            "saelens_explained_variance": 1 - 12.25 * 9 / 221,
            "saelens_explained_variance_legacy": 1 - (11.25 * 9 / 52 + 9 / 169) / 2,
            "mre": 0.35,
            "direction_error": 0.18,  # (1 − .64 + 0)/2
            "magnitude_error": 0.17,  # (.09 + .25)/2
            "cosine": 0.9,
            "norm_ratio": 3.5 / 7,
            "shrinkage": 7.25 / 12,
            # p = 1: 2.75 against the sink's 1/10.
            "loss_share": 2.75 / 2.85,
            # q = 1: 5/5 + 3/2 against 12/10.
            "l1_share": 2.5 / 3.7,
            "bias_ratio": 2.75 / 2.85 * 3 / 2,
        },
        rel=1e-6,
    )


def test_worked_numbers_of_all_rows_and_of_the_sinks() -> None:
    measured = measure(WORKED, p=2, q=0)
    # ‖x_sink − μ_0‖² = 8.5² + 3² = 81.25.
    assert measured["sinks"]["fvu_p0"] == pytest.approx(1 / 81.25)
    assert measured["all"]["fvu_p0"] == pytest.approx(13.25 / 87.75)
    assert measured["all"]["saelens_explained_variance"] == pytest.approx(1 - 13.25 * 9 / 546)
    assert measured["all"]["mre"] == pytest.approx((0.45 + 0.25 + 0.01) / 3)
    assert measured["sinks"]["shrinkage"] == pytest.approx(81 / 90)
    # p = 2: .45 + .25 + .01.
    assert measured["sinks"]["loss_share"] == pytest.approx(0.01 / 0.71)
    assert measured["sinks"]["bias_ratio"] == pytest.approx(0.03 / 0.71)
    assert measured["bins"][3]["loss_share"] == pytest.approx(0.25 / 0.71)
    assert measured["sinks"]["l1_share"] == pytest.approx(12 / 20)
    assert [scope["tokens"] for scope in measured["bins"]] == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def oracle(rows: Rows, scope: np.ndarray, p: int, q: int) -> dict[str, float]:
    """The definitions, written a second time over whole arrays."""
    x, x_hat, n = rows.x.double().numpy(), rows.x_hat.double().numpy(), rows.norm.double().numpy()
    ns = rows.group.numpy() != SINKS
    e2 = np.linalg.norm(x_hat - x, axis=1) ** 2
    nx, nh = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    cos = np.array([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(x, x_hat, strict=True)])
    r = nh / nx
    penalty, l1 = rows.penalty.numpy(), rows.l1.numpy()
    expected = {
        "tokens": scope.sum(),
        "l0": rows.l0.numpy()[scope].mean(),
        "l1": l1[scope].mean(),
        "mse": e2[scope].mean(),
        "mre": (e2 / nx**2)[scope].mean(),
        "direction_error": (1 - cos**2)[scope].mean(),
        "magnitude_error": ((r - cos) ** 2)[scope].mean(),
        "cosine": cos[scope].mean(),
        "norm_ratio": nh[scope].sum() / nx[scope].sum(),
        "shrinkage": (nh[scope] ** 2).sum() / (x * x_hat)[scope].sum(),
        "loss_share": (e2 / n**p)[scope].sum() / (e2 / n**p).sum(),
        "l1_share": (penalty / n**q)[scope].sum() / (penalty / n**q).sum(),
    }
    for k in (0, 1, 2):
        mu = np.average(x[ns], axis=0, weights=n[ns] ** -float(k))
        around = np.linalg.norm(x - mu, axis=1) ** 2
        expected[f"fvu_p{k}"] = (e2 / n**k)[scope].sum() / (around / n**k)[scope].sum()
    expected["explained_variance"] = 1 - expected["fvu_p0"]
    around = ((x - x.mean(0)) ** 2).sum(1)
    expected["saelens_explained_variance"] = 1 - e2[scope].sum() / around[scope].sum()
    expected["saelens_explained_variance_legacy"] = np.mean(1 - e2[scope] / around[scope])
    expected["bias_ratio"] = expected["loss_share"] / scope.mean()
    return expected


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("q", [0, 1])
def test_every_scope_agrees_with_the_definitions(rows: Rows, p: int, q: int) -> None:
    measured, group = measure(rows, p, q), rows.group.numpy()
    assert measured["all"] == pytest.approx(oracle(rows, group >= 0, p, q))
    assert measured["ns"] == pytest.approx(oracle(rows, group != SINKS, p, q))
    assert measured["sinks"] == pytest.approx(oracle(rows, group == SINKS, p, q))
    for b in range(10):
        assert measured["bins"][b] == pytest.approx(oracle(rows, group == b, p, q))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 1000))
def test_streaming_in_any_chunks_and_order_gives_the_numbers_of_one_batch(cuts: list[int], seed: int) -> None:
    rows = make_rows()
    shuffled = rows.take(torch.randperm(60, generator=torch.Generator().manual_seed(seed)))
    streamed = ReconstructionAccumulator(5, rows.x.mean(0))
    bounds = [0, *sorted(cuts), 60]
    for start, stop in pairwise(bounds):
        streamed.update(*shuffled.take(slice(start, stop)).arguments())
    assert_equal(streamed.compute(1, 1), measure(rows, 1, 1))


def test_merged_accumulators_give_the_numbers_of_one(rows: Rows) -> None:
    parts = [ReconstructionAccumulator(5, rows.x.mean(0)) for _ in range(2)]
    parts[0].update(*rows.take(slice(0, 13)).arguments())
    parts[1].update(*rows.take(slice(13, 60)).arguments())
    parts[0].merge(parts[1])
    assert_equal(parts[0].compute(2, 0), measure(rows, 2, 0))


@pytest.mark.parametrize("p", [0, 1, 2])
def test_predicting_the_weighted_mean_has_fvu_1(rows: Rows, p: int) -> None:
    ns = rows.group != SINKS
    weight = rows.norm[ns, None] ** -p
    mean = (weight * rows.x[ns]).sum(0) / weight.sum()
    rows.x_hat = mean.expand_as(rows.x)
    assert measure(rows)["ns"][f"fvu_p{p}"] == pytest.approx(1, abs=1e-9)
    # Another constant is worse: μ_p is the best one.
    rows.x_hat = rows.x_hat + 0.1
    assert measure(rows)["ns"][f"fvu_p{p}"] > 1.001


def test_the_relative_error_splits_into_direction_and_magnitude(rows: Rows) -> None:
    measured = measure(rows)
    for scope in scopes(measured):
        assert min(scope["direction_error"], scope["magnitude_error"]) > 1e-6
        assert scope["mre"] == pytest.approx(scope["direction_error"] + scope["magnitude_error"], rel=1e-10)


def test_perfect_sinks_inflate_the_explained_variance_by_their_share(rows: Rows) -> None:
    sinks = rows.group == SINKS
    rows.x_hat[sinks] = rows.x[sinks]
    spread = (rows.x - rows.x[~sinks].mean(0)).square().sum(1)
    share = (spread[sinks].sum() / spread.sum()).item()
    measured = measure(rows)
    ev_all, ev_ns = measured["all"]["explained_variance"], measured["ns"]["explained_variance"]
    assert share > 0.9
    assert ev_ns < 0.95
    assert ev_all - ev_ns == pytest.approx(share * (1 - ev_ns), rel=1e-9)


def test_a_reconstruction_of_zero_has_cosine_0(rows: Rows) -> None:
    rows.x_hat = torch.zeros_like(rows.x)
    ns = measure(rows)["ns"]
    assert (ns["cosine"], ns["mre"], ns["direction_error"], ns["magnitude_error"]) == (0, 1, 1, 0)
    assert ns["shrinkage"] is None


def test_shrinkage_is_undefined_for_a_reconstruction_that_points_away(rows: Rows) -> None:
    rows.x_hat = -rows.x
    ns = measure(rows)["ns"]
    assert ns["shrinkage"] is None
    assert ns["cosine"] == pytest.approx(-1)


def test_the_relative_error_takes_the_evaluated_norm_and_the_weights_the_stored_one() -> None:
    # Stored norms are doubled: ρ stays .35, the p = 1 shares stay, and at p = 1 each sum halves.
    rows = WORKED.take(slice(0, 3))
    rows.norm = torch.tensor([10.0, 2.0, 10.0])
    measured = measure(rows, p=1)
    assert measured["ns"]["mre"] == pytest.approx(0.35)
    # 11.25/10 + 1/2 + 1/10
    assert measured["bins"][0]["loss_share"] == pytest.approx(1.125 / 1.725)


def test_zero_rows_count_nowhere(rows: Rows) -> None:
    with_zero = make_rows()
    with_zero.x[3] = 0
    with_zero.norm[3] = 0
    without = rows.take(torch.arange(60) != 3)
    streamed = ReconstructionAccumulator(5, without.x.mean(0))
    streamed.update(*with_zero.arguments())
    assert_equal(streamed.compute(2, 1), measure(without, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float64(dtype: torch.dtype) -> None:
    # Squares of 3000 overflow float16, and sums of many rows lose all digits of bfloat16.
    rows = make_rows(count=3000)
    rows.x = (rows.x * 75).to(dtype)
    rows.x_hat = (rows.x_hat * 75).to(dtype)
    rows.norm = rows.x.double().norm(dim=1)
    exact = make_rows(count=3000)
    exact.x, exact.x_hat, exact.norm = rows.x.double(), rows.x_hat.double(), rows.norm
    assert rows.norm.max() > 3000
    assert_equal(measure(rows, 2, 1), measure(exact, 2, 1))


def test_what_is_empty_or_undefined_is_none_and_all_of_it_is_json(rows: Rows) -> None:
    only_ns = rows.take(rows.group != SINKS)
    measured = measure(only_ns, mean_all=False)
    assert measured["sinks"].pop("tokens") == 0
    assert set(measured["sinks"].values()) == {None}
    assert measured["ns"]["saelens_explained_variance_legacy"] is None
    assert measured["ns"]["saelens_explained_variance"] is not None
    json.dumps(measured, allow_nan=False)

    nothing = ReconstructionAccumulator(5).compute(0, 0)
    assert nothing["all"].pop("tokens") == 0
    assert set(nothing["all"].values()) == {None}


def test_without_non_sinks_there_is_no_mean_to_compare_with(rows: Rows) -> None:
    sinks = measure(rows.take(rows.group == SINKS))["sinks"]
    assert sinks["fvu_p0"] is None
    assert 0 < sinks["mre"] < 1


def test_constant_rows_have_no_variance_to_explain(rows: Rows) -> None:
    rows.x = torch.full_like(rows.x, 1 / 3)
    rows.norm = rows.x.norm(dim=1)
    measured = measure(rows)
    assert measured["ns"]["fvu_p0"] is None
    assert measured["all"]["saelens_explained_variance"] is None


def test_a_non_finite_reconstruction_gives_none_in_its_own_scopes_only(rows: Rows) -> None:
    rows.x_hat[rows.group == 4] = torch.inf
    measured = measure(rows)
    assert measured["bins"][4]["mse"] is None
    assert measured["bins"][5]["mse"] > 0
    json.dumps(measured, allow_nan=False)


def test_powers_without_sums_are_refused() -> None:
    with pytest.raises(ValueError, match="p = 3"):
        ReconstructionAccumulator(2).compute(3, 0)


def test_a_mean_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="mean_all"):
        ReconstructionAccumulator(2, torch.zeros(3))

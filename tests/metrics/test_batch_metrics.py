import json
import math
from typing import Any

import pytest
import torch
from measured_rows import Rows, make_rows

from nsae_cli.metrics.groups import SINKS
from nsae_cli.metrics.norm_bias import GradShare, NormBiasIndex, measured_exponent
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator
from nsae_cli.metrics.training_batch import batch_metrics


def measure(rows: Rows, p: int = 0, q: int = 0) -> dict[str, Any]:
    x = rows.x.double()
    return batch_metrics(
        x=rows.x,
        norm=rows.norm,
        group=rows.group,
        sq_error=(rows.x_hat - x).square().sum(1),
        dot=(x * rows.x_hat).sum(1),
        x_sq=x.square().sum(1),
        x_hat_sq=rows.x_hat.square().sum(1),
        l0=rows.l0,
        l1=rows.l1,
        weight_error=rows.norm**-p,
        penalty=rows.penalty,
        weight_sparsity=rows.norm**-q,
        gradient_norms={"W_enc": rows.norm * rows.l1, "W_dec": rows.l1},
    )


def test_worked_numbers() -> None:
    # The three rows of test_reconstruction_metrics: ‖e‖² 11.25, 1, 1; ρ .45, .25, .01; n 5, 2, sink 10.
    measured = measure(
        Rows(
            x=torch.tensor([[3.0, 4.0], [0.0, 2.0], [10.0, 0.0]]),
            x_hat=torch.tensor([[0.0, 2.5], [0.0, 1.0], [9.0, 0.0]]),
            norm=torch.tensor([5.0, 2.0, 10.0]),
            group=torch.tensor([0, 3, SINKS]),
            l0=torch.tensor([3, 1, 2]),
            l1=torch.tensor([4.0, 2.0, 9.0]),
            penalty=torch.tensor([4.0, 1.0, 30.0]),
        ),
        p=1,
        q=1,
    )
    loss_share, bias_ratio = measured.pop("loss_share"), measured.pop("bias_ratio")
    l1_share, grad_share, exponents = (measured.pop(key) for key in ("l1_share", "grad_share", "exponents"))
    assert measured == pytest.approx(
        {
            "l0_all": 2.0,
            "l0_ns": 2.0,
            "l1_all": 5.0,
            "fvu_all": 13.25 / 87.75,
            "fvu_ns": 12.25 / 6.5,
            "mre_ns": 0.35,
            "cosine_ns": 0.9,
            "shrinkage_ns": 7.25 / 12,
            # Two points: log(.45/.25) / log(5/2).
            "nbi": math.log(1.8) / math.log(2.5),
        },
        rel=1e-6,
    )
    assert list(loss_share) == ["sinks", "b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "b9"]
    # p = 1: .1, 2.25, .5 of 2.85; each is a third of the rows.
    assert (loss_share["sinks"], loss_share["b0"], loss_share["b3"]) == pytest.approx((2 / 57, 45 / 57, 10 / 57))
    assert loss_share["b1"] is None
    assert bias_ratio == pytest.approx([6 / 57, 135 / 57, None, None, 30 / 57, *[None] * 6])
    # q = 1: S/n is .8, .5, 3 of 4.3.
    assert (l1_share["sinks"], l1_share["b0"], l1_share["b3"]) == pytest.approx((30 / 43, 8 / 43, 5 / 43))
    assert l1_share["b9"] is None
    # Norms n·Σf and Σf: 20, 4, 90 of 114 and 4, 2, 9 of 15.
    assert {name: share["sinks"] for name, share in grad_share.items()} == pytest.approx(
        {"W_enc": 90 / 114, "W_dec": 9 / 15}
    )
    assert grad_share["W_enc"]["b0"] == pytest.approx(20 / 114)
    # Two points each: log of (2.25/.5), (.8/.5), (20/4), (4/2) over log(5/2).
    ratios = {"loss": 4.5, "sparsity": 1.6, "grad_W_enc": 5, "grad_W_dec": 2}
    assert exponents == pytest.approx({name: math.log(r) / math.log(2.5) for name, r in ratios.items()}, rel=1e-6)


@pytest.mark.parametrize("p", [0, 1, 2])
def test_equal_to_the_streaming_metrics_on_the_same_rows(rows: Rows, p: int) -> None:
    accumulator = ReconstructionAccumulator(5)
    accumulator.update(*rows.arguments())
    full = accumulator.compute(l2_power=p, l1_power=1)
    nbi = NormBiasIndex()
    rho = (rows.x_hat - rows.x).square().sum(1) / rows.x.square().sum(1)
    nbi.update(torch.zeros(60, dtype=torch.int64), rows.norm, rho, rows.group != SINKS)
    ns, everything = full["ns"], full["all"]
    by_group = [full["sinks"], *full["bins"]]

    measured = measure(rows, p, q=1)
    assert list(measured.pop("l1_share").values()) == pytest.approx([scope["l1_share"] for scope in by_group])
    shares = GradShare()
    shares.update({"W_enc": rows.norm * rows.l1, "W_dec": rows.l1}, rows.group)
    for name, share in shares.compute().items():
        assert list(measured["grad_share"][name].values()) == pytest.approx([share["sinks"], *share["bins"]])
    del measured["grad_share"]
    ns_rows = rows.group != SINKS
    values = {
        "loss": rows.norm**-p * (rows.x_hat - rows.x).square().sum(1),
        "sparsity": rows.penalty / rows.norm,
        "grad_W_enc": rows.norm * rows.l1,
        "grad_W_dec": rows.l1,
    }
    expected = {name: measured_exponent(rows.norm, value, ns_rows) for name, value in values.items()}
    assert measured.pop("exponents") == pytest.approx(expected)
    assert list(measured.pop("loss_share").values()) == pytest.approx([scope["loss_share"] for scope in by_group])
    assert measured.pop("bias_ratio") == pytest.approx([scope["bias_ratio"] for scope in by_group])
    assert measured == pytest.approx(
        {
            "l0_all": everything["l0"],
            "l0_ns": ns["l0"],
            "l1_all": everything["l1"],
            "fvu_all": everything["fvu_p0"],
            "fvu_ns": ns["fvu_p0"],
            "mre_ns": ns["mre"],
            "cosine_ns": ns["cosine"],
            "shrinkage_ns": ns["shrinkage"],
            "nbi": nbi.compute(resamples=1)["nbi"],
        }
    )


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if key == "grad_share":
            assert_same(value, b[key])
        else:
            assert value == pytest.approx(b[key], rel=1e-9)


def test_the_order_of_rows_does_not_matter(rows: Rows) -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert_same(measure(rows.take(order), 2), measure(rows, 2))


def test_norms_that_differ_by_rounding_have_no_nbi(rows: Rows) -> None:
    rows.norm = 57.3 * (1 + 1e-8 * torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert measure(rows)["nbi"] is None


def test_zero_rows_count_nowhere(rows: Rows) -> None:
    with_zero = make_rows()
    with_zero.x[3], with_zero.norm[3] = 0, 0
    assert_same(measure(with_zero, 2), measure(rows.take(torch.arange(60) != 3), 2))


def test_half_precision_rows_are_summed_in_float64() -> None:
    rows, exact = make_rows(count=2000), make_rows(count=2000)
    rows.x = rows.x.bfloat16()
    exact.x = rows.x.double()
    assert_same(measure(rows), measure(exact))


def test_a_batch_of_sinks_only_has_no_ns_metrics(rows: Rows) -> None:
    measured = measure(rows.take(rows.group == SINKS))
    assert measured["l0_all"] > 0
    assert measured["loss_share"]["sinks"] == 1
    assert {measured[name] for name in measured if name.endswith("_ns")} == {None}
    assert measured["fvu_all"] is None
    assert measured["nbi"] is None
    json.dumps(measured, allow_nan=False)


def test_non_finite_rows_give_none_and_valid_json(rows: Rows) -> None:
    rows.x_hat[4] = torch.inf
    json.dumps(measure(rows), allow_nan=False)
    assert measure(rows)["mre_ns"] is None

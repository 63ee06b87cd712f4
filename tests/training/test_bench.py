"""`nsae bench`: the rows have the density that is asked for, the sides do the same work, cross-overs are kept."""

from __future__ import annotations

import pytest
import torch

from nsae_cli.errors import UsageError
from nsae_cli.kernels import calibration
from nsae_cli.kernels.select import choose
from nsae_cli.reporter import SilentReporter
from nsae_cli.training import bench as bench_module
from nsae_cli.training.bench import AutogradSide, BenchOptions, NsaeSide, Synthetic, bench, crossing

CPU = torch.device("cpu")


@pytest.mark.parametrize("l0", [4.0, 40.0, 300.0])
def test_synthetic_rows_have_the_density_asked_for(l0):
    data = Synthetic.make(64, 1000, 2000, l0, CPU)
    z = data.x @ data.weights.W_enc + data.weights.b_enc
    assert float((z > 0).sum(dim=1).double().mean()) == pytest.approx(l0, rel=0.03)
    rates = (z > 0).double().mean(dim=0)
    assert rates.max() <= 0.95
    assert rates.max() > 5 * rates.median()  # some features fire far more often than most


def test_every_side_takes_the_same_steps():
    """After two steps at a learning rate that shows, nsae's kernels and the plain loop have the same weights."""
    data = Synthetic.make(32, 256, 300, 12, CPU)
    kernels = [choose(*asked, CPU) for asked in (("dense", "auto"), ("sparse", "fp32"), ("sparse", "certified"))]
    sides = [AutogradSide(data, lr=1e-3), *(NsaeSide(data, kernel, lr=1e-3) for kernel in kernels)]
    for side in sides:
        side.step()
        side.step()
    moved = (sides[0].weights.W_dec - data.weights.W_dec).abs().max()
    assert moved > 1e-3
    for side in sides[1:]:
        assert side.l0 == pytest.approx(12, rel=0.2)
        for found, expected, start in zip(
            side.weights.tensors(), sides[0].weights.tensors(), data.weights.tensors(), strict=True
        ):
            # An entry whose gradient is nothing but rounding may go either way under Adam; the others agree.
            assert (found - expected).norm() <= 1e-3 * (expected - start).norm()


def test_where_the_ratio_falls_through_one():
    assert crossing([0.01, 0.1, 0.4], [8.0, 2.0, 0.5]) == pytest.approx(0.2)  # halfway in both logarithms
    assert crossing([0.01, 0.1], [8.0, 2.0]) == 0.1
    assert crossing([0.01, 0.1], [0.9, 0.5]) == 0.01


def test_a_comparison_names_every_side_with_its_l0():
    result = bench(
        BenchOptions.model_validate({"d_in": 16, "d_sae": 128, "batch_size": 64, "l0": 6, "rounds": 2, "threads": 1}),
        SilentReporter(),
    )
    sides = {side["side"]: side for side in result["sides"]}
    assert {"plain torch autograd", "nsae dense", "nsae sparse, fp32 encoder"} <= sides.keys()
    assert sides["plain torch autograd"]["times_as_fast_as_autograd"] == 1
    for name, side in sides.items():
        assert 0 < side["p20_s"] <= side["median_s"] <= side["p80_s"]
        assert side["l0"] == (pytest.approx(6, rel=0.3) if name.startswith("nsae") else None)


def test_a_calibration_is_kept_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bench_module, "_CALIBRATION_SHAPES", ((16, 96, 64),))
    result = bench(BenchOptions.model_validate({"calibrate": True, "threads": 1}), SilentReporter())
    for row in result["crossovers"]:
        assert 0.01 <= row["crossover"] <= 0.45
    kind = choose("sparse", "fp32", CPU).kind
    [fp32] = [row["crossover"] for row in result["crossovers"] if "fp32" in row["kernel"]]
    assert calibration.crossover(kind, CPU, 16, 96) == fp32


def test_more_active_features_than_there_are():
    with pytest.raises(UsageError, match="--l0 100: more than 9 of 10"):
        bench(BenchOptions.model_validate({"d_sae": 100, "l0": 100}), SilentReporter())


def test_threads_are_put_back():
    before = torch.get_num_threads()
    bench(
        BenchOptions.model_validate({"d_in": 8, "d_sae": 32, "batch_size": 16, "l0": 3, "rounds": 1, "threads": 2}),
        SilentReporter(),
    )
    assert torch.get_num_threads() == before

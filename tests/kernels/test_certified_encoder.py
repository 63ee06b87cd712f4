"""The certified bf16 encoder's claim: whatever the rows and weights, no active feature is missed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Problem

from nsae_cli.kernels import certified, native_ops
from nsae_cli.kernels.native.library import load
from nsae_cli.kernels.native_ops import NativeOps
from nsae_cli.kernels.types import Weights

SCALES = [0.0, 1e-44, 1e-38, 1e-20, 1e-6, 1.0, 300.0, 1e6, 1e18]


def native(isa: str | None = None) -> NativeOps:
    library = load(isa) or load()
    assert library is not None
    return NativeOps(library, certified=True)


def surely_active(x: torch.Tensor, weights: Weights, noise: torch.Tensor | None, threshold: float) -> torch.Tensor:
    """Entries whose z exceeds the threshold by more than any float32 evaluation can be off, bool [B, F]."""
    d = x.shape[1]
    parts = x.double().abs() @ weights.W_enc.double().abs() + weights.b_enc.double().abs()
    z = x.double() @ weights.W_enc.double() + weights.b_enc.double()
    if noise is not None:
        z, parts = z + noise.double(), parts + noise.double().abs()
    return z - threshold > (d + 3) * 2.0**-24 * parts + 1e-42


def adversarial(seed: int, d: int, row_scale: float, weight_scale: float, centre: float, outliers: bool):
    """Rows and weights of any size, biases that put most pre-activations near 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(24, d, generator=g) * row_scale
    x[::7] *= 50  # sinks
    x[1] = 0
    if outliers:
        x[:, 0] += 3000 * row_scale  # a massive dimension
    W_enc = torch.randn(d, 90, generator=g) * weight_scale
    b_dec = torch.randn(d, generator=g) * centre * row_scale
    z = x.double() @ W_enc.double()
    pick = torch.randint(0, len(x), (90,), generator=g)
    near = z[pick, torch.arange(90)]
    b_enc = (-near * (1 + 1e-4 * torch.randn(90, generator=g).double())).float()  # row `pick` is just on or just off
    return x, Weights(W_enc, b_enc, torch.randn(90, d, generator=g), b_dec).by_feature()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    d=st.sampled_from([1, 7, 16, 63, 256]),
    row_scale=st.sampled_from(SCALES),
    weight_scale=st.sampled_from(SCALES),
    centre=st.sampled_from([0.0, 1.0, 100.0]),
    outliers=st.booleans(),
    noisy=st.booleans(),
    threshold=st.sampled_from([0.0, 1e-3, 2.0]),
    isa=st.sampled_from(["base", "avx512"]),
)
def test_no_active_feature_is_missed(seed, d, row_scale, weight_scale, centre, outliers, noisy, threshold, isa):
    assume(row_scale * weight_scale * d < 1e30)  # beyond, float32 itself overflows; squares may still overflow
    x, weights = adversarial(seed, d, row_scale, weight_scale, centre, outliers)
    noise = torch.randn(len(x), 90, generator=torch.Generator().manual_seed(seed)) if noisy else None
    entries = native(isa).active(x, weights, weights.b_enc, noise=noise, threshold=threshold, top_k=None)
    found = torch.zeros(len(x), 90, dtype=torch.bool)
    found[entries.rows(), entries.cols.long()] = True
    wanted = surely_active(x, weights, noise, threshold)
    assert not (wanted & ~found).any()
    # What is found is active in float32: its own value says so.
    assert bool((entries.pre_acts > threshold).all())


def test_the_adversary_would_catch_an_encoder_without_a_bound(monkeypatch):
    """The same inputs through the bare bf16 product: it misses active features, so the test above has teeth."""
    monkeypatch.setattr(native_ops, "RELATIVE", 0.0)
    real = certified.round_rows

    def unbounded(x, centre):
        rounded = real(x, centre)
        nothing = torch.zeros(len(x))
        return certified.RoundedRows(rounded.rows, nothing, nothing, nothing)

    monkeypatch.setattr(native_ops, "round_rows", unbounded)
    missed = 0
    for seed in range(20):
        x, weights = adversarial(seed, 63, 1.0, 1.0, 1.0, False)
        entries = native().active(x, weights, weights.b_enc, noise=None, threshold=0.0, top_k=None)
        found = torch.zeros(len(x), 90, dtype=torch.bool)
        found[entries.rows(), entries.cols.long()] = True
        missed += int((surely_active(x, weights, None, 0.0) & ~found).sum())
    assert missed > 20


@pytest.mark.parametrize("part", ["row_a", "row_b"])
def test_each_part_of_the_bound_is_needed(monkeypatch, part):
    """Where only the rows are rounded row_a is all there is, and row_b where only the weights are."""
    real = certified.round_rows

    def without(x, centre):
        rounded = real(x, centre)
        return dataclasses.replace(rounded, **{part: torch.zeros(len(x))})

    missed = {}
    for bound in (real, without):
        monkeypatch.setattr(native_ops, "round_rows", bound)
        missed[bound] = 0
        for seed in range(20):
            x, weights = adversarial(seed, 63, 1.0, 1.0, 0.0, False)
            if part == "row_a":
                weights.W_enc.copy_(weights.W_enc.bfloat16())
            else:
                x = x.bfloat16().float()
            weights.b_enc.copy_(-(x.double() @ weights.W_enc.double())[seed % 24] * (1 - 1e-4))
            entries = native().active(x, weights, weights.b_enc, noise=None, threshold=0.0, top_k=None)
            found = torch.zeros(len(x), 90, dtype=torch.bool)
            found[entries.rows(), entries.cols.long()] = True
            missed[bound] += int((surely_active(x, weights, None, 0.0) & ~found).sum())
    assert missed[real] == 0
    assert missed[without] > 0


def test_values_are_those_of_float32_and_few_are_computed_for_nothing():
    problem = Problem((512, 256, 2048), torch.float32)
    problem.weights.b_enc.fill_(-3.6)
    ops = native()
    entries = ops.active(problem.x, problem.weights, problem.weights.b_enc, noise=None, threshold=0.0, top_k=None)
    exact = problem.pre_acts()
    wanted = exact > 0
    assert torch.equal(entries.rows() * 2048 + entries.cols, wanted.flatten().nonzero()[:, 0])
    error = (entries.pre_acts.double() - exact[wanted]).abs().max()
    plain = ((problem.x @ problem.weights.W_enc + problem.weights.b_enc).double() - exact)[wanted].abs().max()
    assert error <= 2 * plain
    assert len(entries.cols) > 1000
    assert ops.evaluated < 2 * len(entries.cols)


def test_the_shadow_is_the_rounded_encoder_with_norms_rounded_up():
    g = torch.Generator().manual_seed(0)
    W_enc = torch.randn(75, 40, generator=g)
    W_enc[:, 3] = 1e-40
    W_enc[5, 9] = float("inf")
    W_enc[6, 10] = float("nan")
    for isa in ("base", "avx2", "avx512"):
        library = load(isa) or load()
        assert library is not None
        shadow = native_ops.EncoderShadow(library)
        laid_out = W_enc.t().contiguous().t()
        shadow.refresh(laid_out)
        expected = laid_out.t().bfloat16()
        assert torch.equal(shadow.copy.isnan(), expected.isnan())
        assert torch.equal(shadow.copy.nan_to_num(), expected.nan_to_num())
        finite = [j for j in range(40) if j not in (9, 10)]
        for found, exact in (
            (shadow.norm, W_enc.double().norm(dim=0)),
            (shadow.rest, (W_enc.double() - expected.t().double()).norm(dim=0)),
        ):
            assert bool((found.double() >= exact)[finite].all())
            assert bool((found.double() <= exact * (1 + 1e-5) + 1e-44)[finite].all())


@pytest.mark.parametrize("d", [1, 7, 64, 700])
@pytest.mark.parametrize("row_scale", [1e-25, 1.0, 300.0])
def test_the_rows_parts_of_the_bound_are_at_least_the_formulas(d, row_scale):
    """A_i, C_i and the slack term by term in float64, as `certified` derives them; not more than 1 % above, either."""
    g = torch.Generator().manual_seed(d)
    x = torch.randn(50, d, generator=g) * row_scale
    centre = torch.randn(d, generator=g) * row_scale
    rounded = certified.round_rows(x, centre)
    y = (x - centre).double()
    y_hat = rounded.rows.double()
    u = 2.0**-24
    length = {name: rows.norm(dim=1) for name, rows in (("y", y), ("y_hat", y_hat), ("off", y - y_hat))}
    row_a = length["off"] + 2 * u * (d + 8) * length["y_hat"] + 2 * u * length["y"]
    row_a += u * (d + 8) * (x.double().norm(dim=1) + centre.double().norm())
    row_b = (1 + 2 * u * (d + 8)) * length["y_hat"]
    tiny = d**0.5 * 2.0**-60 + d * 2.0**-120
    for found, exact in ((rounded.row_a, row_a), (rounded.row_b, row_b)):
        assert bool((found.double() >= exact).all())
        assert bool((found.double() <= 1.01 * exact + tiny).all())
    assert bool((rounded.slack.double() >= d * 2.0**-126 * (length["y_hat"] + 1)).all())
    assert certified.RELATIVE >= 2.0**-8 + 2.0**-21


def test_rows_whose_squares_vanish_in_float32_are_bounded():
    x = torch.full((3, 40), 1e-30)
    rounded = certified.round_rows(x, torch.zeros(40))
    off = (x.double() - rounded.rows.double()).norm(dim=1)
    assert bool((rounded.row_a.double() >= off).all())
    assert bool((rounded.row_b.double() >= rounded.rows.double().norm(dim=1)).all())


@pytest.mark.parametrize("isa", ["base", "avx512"])
def test_noise_that_cancels_the_product_is_allowed_for(isa):
    """z = x·w + b + noise of about ±1e-6 with terms of 3e4: the test's own float32 sum may be off by more than that."""
    g = torch.Generator().manual_seed(0)
    x, W_enc = torch.ones(200, 1), torch.full((1, 90), 32768.0)  # exact in bfloat16: nothing but the noise is rounded
    noise = -32768.0 + torch.randn(200, 90, generator=g) * 0.004
    weights = Weights(W_enc, torch.zeros(90), torch.zeros(90, 1), torch.zeros(1)).by_feature()
    entries = native(isa).active(x, weights, weights.b_enc, noise=noise, threshold=0.0, top_k=None)
    found = torch.zeros(200, 90, dtype=torch.bool)
    found[entries.rows(), entries.cols.long()] = True
    assert torch.equal(found, 32768.0 + noise.double() > 0)

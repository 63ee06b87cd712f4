"""The sparse step, on each of its operations, against float64 autograd and against the dense step's own error."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import Found, Problem, assert_close, assert_same

from nsae_cli.kernels import native_ops
from nsae_cli.kernels.decoder import normalise_rows_
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.entries import SparseOps
from nsae_cli.kernels.native.library import load
from nsae_cli.kernels.native_ops import NativeOps
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.sparse import SparseStep
from nsae_cli.kernels.torch_ops import TorchOps
from nsae_cli.kernels.types import Weights, in_memory_order
from nsae_cli.kernels.update import GradientBuffer, Updater
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.sae.penalty import PENALTIES, TANH_SLOPE

COMBINATIONS = list(itertools.product(NONLINEARITIES, PENALTIES))
# (B, d, F): a single row, one dimension, one feature, no row, widths around the vectors' and the chunks' lengths.
SHAPES = [(1, 5, 7), (6, 1, 9), (5, 7, 1), (0, 4, 6), (33, 16, 1023), (17, 768, 31), (9, 1023, 65), (70, 64, 96)]
NATIVE = [(isa, certified) for isa in ("base", "avx2", "avx512") for certified in (False, True)]
EVERY_OPS = ["torch", *(f"{isa}-{'certified' if certified else 'fp32'}" for isa, certified in NATIVE)]
# Few rows are gathered whole; these are made to take them in chunks of 64 columns, as many rows are.
EVERY_OPS += ["base-fp32-chunked", "avx2-fp32-chunked", "avx512-certified-chunked"]


def make_ops(name: str) -> SparseOps:
    """Operations by name; those of an instruction set that this processor lacks are replaced by the next lower."""
    if name == "torch":
        return TorchOps()
    isa, encoder, *chunked = name.split("-")
    order = ("base", "avx2", "avx512")
    library = next(filter(None, (load(lower) for lower in reversed(order[: order.index(isa) + 1]))), None)
    assert library is not None, "the compiled loops are missing: tests need a C compiler when nsae is installed"
    return NativeOps(library, certified=encoder == "certified", chunk=64 if chunked else None)


@pytest.fixture(params=EVERY_OPS)
def ops(request) -> SparseOps:
    return make_ops(request.param)


def at_density(problem: Problem, density: float | str) -> Problem:
    """Shifts the biases so that about this share of the entries is active, none of them near 0; ``one``: one entry.

    Near the wanted place the cut is put into the widest gap, so that float32 can tell the sign of every entry.
    """
    z = problem.pre_acts().flatten().sort().values
    if not len(z):
        return problem
    z = torch.cat([z[:1] - 1, z, z[-1:] + 1])  # gap i lies below the i-th largest … largest entry
    if density in (0.0, 1.0, "one"):
        gap = {0.0: len(z) - 2, 1.0: 0, "one": len(z) - 3}[density]
    else:
        middle, reach = round((1 - float(density)) * (len(z) - 2)), min(len(z) // 20, 300)
        near = range(max(1, middle - reach), min(len(z) - 2, middle + reach + 1))
        gap = max(near, key=lambda i: float(z[i + 1] - z[i]), default=middle)
    problem.weights.b_enc.sub_((z[gap] + z[gap + 1]) / 2)
    return problem


def near_ties(problem: Problem) -> int:
    """Entries whose sign float32 cannot tell: |z| ≤ (d + 3)·2⁻²⁴·(‖x‖‖w‖ + |b|)."""
    lengths = problem.x.double().norm(dim=1)[:, None] * problem.weights.W_enc.double().norm(dim=0)
    bound = (problem.x.shape[1] + 3) * 2.0**-24 * (lengths + problem.weights.b_enc.double().abs())
    return int((problem.pre_acts().abs() <= bound).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, "one", 0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("noisy", [False, True])
def test_errors_are_at_most_twice_those_of_dense_float32_autograd(ops, shape, density, noisy):
    """Every gradient and row quantity, in the norm; the floor is four roundings of the sums' absolute terms."""
    problem = at_density(Problem(shape, torch.float32, noisy=noisy), density)
    assert near_ties(problem) == 0
    for act, penalty in COMBINATIONS:
        exact = problem.to(torch.float64).run(step_gradients, act, penalty)
        autograd = problem.run(step_gradients, act, penalty)
        found = problem.run(SparseStep(ops), act, penalty)
        assert torch.equal(found[0].l0.double(), exact[0].l0)
        assert torch.equal(found[0].fired, exact[0].fired)
        sizes = absolute_terms(problem.to(torch.float64), exact[0].error, penalty)
        for name, value in quantities(exact).items():
            error = (quantities(found)[name].double() - value).norm()
            allowed = 2 * (quantities(autograd)[name].double() - value).norm() + 2.0**-22 * sizes[name].norm()
            assert error <= allowed, (act, penalty, name, float(error), float(allowed))


def quantities(found: Found) -> dict[str, torch.Tensor]:
    result, gradients = found
    rows = {name: getattr(result, name) for name in ("error", "sq_error", "penalty", "l1")}
    return rows | gradients.named()


def absolute_terms(exact: Problem, error: torch.Tensor, penalty: str) -> dict[str, torch.Tensor]:
    """Each quantity with every term of its sums, those inside pre_acts too, replaced by its absolute value, float64."""
    weights, x = exact.weights, exact.x.abs()
    noise = 0 if exact.noise is None else exact.noise.abs()
    acts = (x @ weights.W_enc.abs() + weights.b_enc.abs() + noise) * (exact.pre_acts() > 0)
    norms = weights.W_dec.norm(dim=1) if PENALTIES[penalty].uses_decoder_norms else None
    act_slope, norm_slope = (torch.as_tensor(slope) for slope in PENALTIES[penalty].slopes(acts, norms))
    decoder, pull = weights.W_dec.abs(), 2 * exact.error_weight[:, None] * error.abs()
    delta = pull @ decoder.t() + exact.sparsity_weight[:, None] * act_slope
    delta = delta * (acts > 0)
    x_hat = acts @ decoder + weights.b_dec.abs() + x
    of_norm = (exact.sparsity_weight[:, None] * norm_slope).expand_as(acts).sum(0)[:, None] if norms is not None else 0
    return {
        "error": x_hat,
        "sq_error": (2 * error.abs() * x_hat).sum(1),
        "penalty": (acts if norms is None else acts * norms * TANH_SLOPE).sum(1),
        "l1": acts.sum(1),
        "W_enc": x.t() @ delta,
        "b_enc": delta.sum(0),
        "W_dec": acts.t() @ pull + of_norm,
        "b_dec": pull.sum(0),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
def test_the_algorithm_is_exact(act, penalty, shape):
    """In float64 the sparse sums are autograd's to the last digits: no term is left out."""
    problem = at_density(Problem(shape, torch.float64, noisy=True), 0.3)
    expected = problem.run(step_gradients, act, penalty)
    assert_same(problem.run(SparseStep(TorchOps()), act, penalty), expected, 1e-12)


def test_rows_without_entries_and_equal_rows(ops):
    problem = at_density(Problem((12, 20, 50), torch.float32), 0.1)
    problem.x[3] = 0
    problem.weights.b_enc.clamp_(max=-0.01)  # a zero row has no active feature
    problem.x[5:] = problem.x[5].clone()
    result, gradients = found = problem.run(SparseStep(ops), "relu", "l1")
    assert result.l0[3] == 0
    torch.testing.assert_close(result.error[3], problem.weights.b_dec)
    assert len(set(result.sq_error[5:].tolist())) == 1
    assert_same((result, gradients), problem.to(torch.float64).run(step_gradients, "relu", "l1"), 5e-6)
    assert found[0].fired.any()


def test_a_zero_decoder_row_has_no_gradient_from_its_norm(ops):
    problem = Problem((9, 6, 20), torch.float32)
    problem.weights.W_dec[3] = 0
    found = problem.run(SparseStep(ops), "relu", "l1-decoder-norm")
    assert_same(found, problem.to(torch.float64).run(step_gradients, "relu", "l1-decoder-norm"), 5e-6)


STEPS_TAKEN, LR = 7, 0.01


def started(problem: Problem, decoder: str, clip: float | None) -> tuple[Weights, Updater]:
    """Weights in the middle of a training: Adam has moments, so that an update hangs smoothly on its gradient."""
    weights = problem.weights.to(torch.float32).by_feature()
    if decoder == "unit":
        normalise_rows_(weights.W_dec)
    updater = Updater(weights, decoder, clip)
    generator = torch.Generator().manual_seed(3)
    state = {"step": torch.tensor(float(STEPS_TAKEN))}
    for name, tensor in weights.named().items():
        shape = in_memory_order(tensor).shape
        state[f"exp_avg/{name}"] = torch.randn(shape, generator=generator) * 0.01
        state[f"exp_avg_sq/{name}"] = torch.rand(shape, generator=generator) * 1e-3 + 1e-4
    updater.adam.load_state(state)
    return weights, updater


def after_a_step(problem: Problem, step, decoder: str, clip: float | None, act: str, penalty: str):
    """Weights and moments after one step."""
    weights, updater = started(problem, decoder, clip)
    arguments = problem.arguments(act, penalty)
    updater.step(step.backward(problem.x, weights, GradientBuffer(weights), **arguments), LR)
    return weights.named() | updater.adam.state()


def after_a_step_in_float64(problem: Problem, decoder: str, clip: float | None, act: str, penalty: str):
    """The same, written out in float64: autograd, projection, clipping, Adam, constraint."""
    start, updater = started(problem, decoder, clip)
    exact, weights = problem.to(torch.float64), start.to(torch.float64)
    moments = {name: tensor.double() for name, tensor in updater.adam.state().items()}
    gradients = weights.zeros_like()
    step_gradients(exact.x, weights, gradients, **exact.arguments(act, penalty))
    if decoder == "unit":
        gradients.W_dec -= (gradients.W_dec * weights.W_dec).sum(1, keepdim=True) * weights.W_dec
    if clip is not None:
        norm = sum(float(g.square().sum()) for g in gradients.tensors()) ** 0.5
        assert norm > clip
        for g in gradients.tensors():
            g *= clip / norm
    t = STEPS_TAKEN + 1
    for name, p in weights.named().items():
        p, g = in_memory_order(p), in_memory_order(gradients.named()[name])
        m, v = moments[f"exp_avg/{name}"], moments[f"exp_avg_sq/{name}"]
        m += (g - m) * 0.1
        v += (g * g - v) * 0.001
        p -= LR / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    lengths = weights.W_dec.norm(dim=1, keepdim=True)
    if decoder == "unit":
        weights.W_dec /= lengths
    elif decoder == "bounded":
        weights.W_dec /= lengths.clamp_min(1.0)
    return weights.named() | moments | {"step": torch.tensor(float(t))}


@pytest.mark.parametrize("name", EVERY_OPS)
@pytest.mark.parametrize(("decoder", "clip"), [("free", None), ("unit", None), ("bounded", None), ("unit", 0.01)])
@pytest.mark.parametrize(("act", "penalty"), [("relu", "l1"), ("relu", "l1-decoder-norm"), ("tanh-relu", "tanh")])
@pytest.mark.parametrize("shape", [(40, 1, 6), (40, 7, 30), (30, 768, 12), (20, 1023, 9), (64, 64, 130)])
def test_updates_follow_float64(name, decoder, clip, act, penalty, shape):
    """Weights and moments: as near to float64 as twice the dense step with torch's own Adam, or a few roundings."""
    problem = at_density(Problem(shape, torch.float32), 0.2)
    if decoder == "bounded":
        problem.weights.W_dec[::2] *= 3  # some rows beyond the bound, some within
    found = after_a_step(problem, SparseStep(make_ops(name)), decoder, clip, act, penalty)
    dense = after_a_step(problem, DenseStep(), decoder, clip, act, penalty)
    exact = after_a_step_in_float64(problem, decoder, clip, act, penalty)
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        error, of_dense = ((state[key].double() - value).norm() for state in (found, dense))
        assert error <= 2 * of_dense + 2.0**-21 * value.norm(), (key, float(error), float(of_dense))


def by_hand(change) -> object:
    return lambda problem, step: change(problem.weights)


def by_updates(kernel: str, clip: float | None) -> object:
    """Three optimizer steps, taken with gradients of the dense or of the sparse step."""

    def change(problem: Problem, step: SparseStep) -> None:
        updater, buffer = Updater(problem.weights, "unit", clip), GradientBuffer(problem.weights)
        chosen = step if kernel == "sparse" else DenseStep()
        for _ in range(3):
            gradients = chosen.backward(problem.x, problem.weights, buffer, **problem.arguments("relu", "l1"))
            updater.step(gradients, 0.3)

    return change


@pytest.mark.parametrize(
    "change",
    [
        by_hand(lambda w: w.W_enc.mul_(1.5)),
        by_hand(lambda w: w.W_enc.copy_(torch.randn(32, 200, generator=torch.Generator().manual_seed(1)) / 6)),
        by_hand(lambda w: w.b_dec.add_(3.0)),
        by_hand(lambda w: w.W_enc.zero_()),
        by_updates("dense", None),
        by_updates("dense", 0.1),
        by_updates("sparse", None),
        by_updates("sparse", 0.1),
    ],
)
@pytest.mark.parametrize("name", ["avx512-certified", "base-certified", "avx512-fp32", "torch"])
def test_a_step_sees_the_weights_as_they_are_whoever_changed_them(name, change):
    """What a kernel keeps of the weights (the encoder in bf16) follows: the next step is that of a new kernel."""
    problem = at_density(Problem((50, 32, 200), torch.float32), 0.05)
    step = SparseStep(make_ops(name))
    problem.run(step, "relu", "l1")
    before = problem.weights.W_enc.clone(), problem.weights.b_dec.clone()
    change(problem, step)
    assert not (torch.equal(before[0], problem.weights.W_enc) and torch.equal(before[1], problem.weights.b_dec))
    found, fresh = problem.run(step, "relu", "l1"), problem.run(SparseStep(make_ops(name)), "relu", "l1")
    for key, value in quantities(fresh).items():
        assert torch.equal(quantities(found)[key], value), key
    if "certified" in name:
        assert torch.equal(step._ops._shadow.copy, problem.weights.W_enc.t().bfloat16())


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", EVERY_OPS)
def test_steps_of_either_kernel_in_any_order_follow_the_dense_ones(name, clip):
    """Each step sees the weights that the one before left, whoever took it and however."""
    problem = at_density(Problem((60, 32, 120), torch.float32), 0.1)

    def weights_after(steps) -> Weights:
        weights, updater = started(problem, "unit", clip)
        buffer = GradientBuffer(weights)
        for step in steps:
            updater.step(step.backward(problem.x, weights, buffer, **problem.arguments("relu", "l1")), LR)
        return weights

    sparse, dense = SparseStep(make_ops(name)), DenseStep()
    expected = weights_after([dense] * 6)
    found = weights_after([sparse, sparse, dense, sparse, dense, sparse])
    for tensor, value, start in zip(found.tensors(), expected.tensors(), problem.weights.tensors(), strict=True):
        assert (tensor - value).norm() <= 1e-4 * (value - start).norm()


def test_a_nan_anywhere_shows_in_the_biases_gradients(ops):
    for spoil in ("x", "W_enc", "b_enc", "W_dec"):
        problem = at_density(Problem((20, 16, 40), torch.float32), 0.2)
        tensor = problem.x if spoil == "x" else problem.weights.named()[spoil]
        tensor[0] = float("nan")
        gradients = SparseStep(ops).backward(
            problem.x, problem.weights, GradientBuffer(problem.weights), **problem.arguments("relu", "l1")
        )
        assert not torch.isfinite(gradients.b_enc.sum() + gradients.b_dec.sum()), spoil


def test_a_single_nan_weight_is_not_lost(ops):
    problem = at_density(Problem((20, 16, 40), torch.float32), 0.1)
    problem.weights.W_enc[3, 7] = float("nan")
    gradients = SparseStep(ops).backward(
        problem.x, problem.weights, GradientBuffer(problem.weights), **problem.arguments("relu", "l1")
    )
    assert gradients.b_enc[7].isnan()


@pytest.mark.parametrize("name", ["avx512-fp32", "avx512-certified", "base-certified"])
def test_bits_do_not_depend_on_the_number_of_threads(name):
    problem = at_density(Problem((300, 96, 700), torch.float32), 0.04)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(after_a_step(problem, SparseStep(make_ops(name)), "unit", None, "relu", "l1"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_inputs_are_left_alone(ops):
    problem = Problem((20, 12, 40), torch.float32, noisy=True)
    tensors = (problem.x, problem.noise, problem.error_weight, *problem.weights.tensors())
    before = [t.clone() for t in tensors]
    problem.run(SparseStep(ops), "relu", "l1-decoder-norm")
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("k", [1, 3, 17, 60])
def test_top_k_is_the_first_k_of_a_stable_sort(ops, k, noisy):
    problem = Problem((40, 24, 60), torch.float32, bias=-0.3, noisy=noisy)
    problem.x[7] *= 40  # a sink after ordinary rows, and an ordinary row after it
    problem.x[9] = 0
    z = problem.pre_acts()
    order = z.sort(dim=1, descending=True, stable=True)
    expected = torch.zeros_like(z, dtype=torch.bool).scatter_(1, order.indices[:, :k], True) & (z > 0)
    found = ops.active(problem.x, problem.weights, problem.weights.b_enc, noise=problem.noise, threshold=0.0, top_k=k)
    assert torch.equal(found.rows() * 60 + found.cols, expected.flatten().nonzero()[:, 0])
    assert_close(found.pre_acts, z[expected], 1e-6, "pre_acts")


def test_ties_of_top_k_go_to_the_lower_column(ops):
    weights = Weights(torch.ones(1, 9), torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1, 0]), torch.ones(9, 1), torch.zeros(1))
    found = ops.active(torch.full((3, 1), 2.0), weights.by_feature(), weights.b_enc, noise=None, threshold=0.0, top_k=6)
    assert found.cols.tolist() == [0, 1, 2, 3, 5, 7] * 3
    assert found.row_ptr.tolist() == [0, 6, 12, 18]


@pytest.mark.parametrize("threshold", [0.0, 0.4, 50.0])
def test_entries_exceed_the_threshold(ops, threshold):
    problem = Problem((30, 24, 60), torch.float32)
    expected = problem.pre_acts() > threshold
    found = ops.active(problem.x, problem.weights, problem.weights.b_enc, noise=None, threshold=threshold, top_k=None)
    assert torch.equal(found.rows() * 60 + found.cols, expected.flatten().nonzero()[:, 0])
    assert torch.equal(found.counts, expected.sum(1))


def test_keeping_some_entries():
    problem = Problem((30, 24, 60), torch.float32)
    entries = TorchOps().active(
        problem.x, problem.weights, problem.weights.b_enc, noise=None, threshold=0.0, top_k=None
    )
    kept = entries.keep(entries.pre_acts > 0.5)
    again = TorchOps().active(problem.x, problem.weights, problem.weights.b_enc, noise=None, threshold=0.5, top_k=None)
    assert torch.equal(kept.row_ptr, again.row_ptr)
    assert torch.equal(kept.cols, again.cols)
    assert torch.equal(kept.pre_acts, again.pre_acts)


def test_two_hundred_steps_drift_no_farther_from_float64_than_dense_steps_do():
    """Losses of a whole small training: each path's distance to float64 ≤ 2 × that of dense float32 autograd."""
    problem = Problem((256, 24, 160), torch.float32, bias=-0.6)

    class Autograd:
        """Dense float32 autograd behind a kernel's interface."""

        def backward(self, x, weights, into, **arguments):
            from nsae_cli.kernels.dense import DenseGradients

            return DenseGradients(step_gradients(x, weights, into.get(), **arguments), into.get())

    def losses(step, dtype) -> torch.Tensor:
        here = problem.to(dtype)
        weights = here.weights.to(dtype).by_feature()
        normalise_rows_(weights.W_dec)
        updater, buffer = Updater(weights, "unit", None), GradientBuffer(weights)
        values = []
        for _ in range(200):
            gradients = step.backward(here.x, weights, buffer, **here.arguments("relu", "l1"))
            result = gradients.result
            values.append(here.error_weight @ result.sq_error + here.sparsity_weight @ result.penalty)
            updater.step(gradients, 1e-3)
        return torch.stack(values).double()

    exact = losses(Autograd(), torch.float64)
    assert exact[-1] < 0.8 * exact[0]
    of_dense = (losses(Autograd(), torch.float32) / exact - 1).abs().max()
    for name in EVERY_OPS:
        found = (losses(SparseStep(make_ops(name)), torch.float32) / exact - 1).abs().max()
        assert found <= 2 * of_dense, (name, float(found), float(of_dense))


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("name", ["base-fp32", "avx512-fp32", "avx512-certified"])
def test_blocks_of_rows_give_what_one_block_gives(monkeypatch, name, top_k):
    """Rows, noise, bounds and thresholds of every block are its own; buffers that overflow go on where they stopped."""
    problem = at_density(Problem((230, 24, 150), torch.float32, noisy=True), 0.2)
    problem.x[::17] *= 30

    def found():
        return make_ops(name).active(
            problem.x, problem.weights, problem.weights.b_enc, noise=problem.noise, threshold=0.0, top_k=top_k
        )

    whole = found()
    monkeypatch.setattr(native_ops, "_MIN_BLOCK_ROWS", 37)
    monkeypatch.setattr(native_ops, "_BLOCK_BYTES", 1)
    blocks = found()
    assert torch.equal(whole.row_ptr, blocks.row_ptr)
    assert torch.equal(whole.cols, blocks.cols)
    torch.testing.assert_close(whole.pre_acts, blocks.pre_acts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
@pytest.mark.parametrize("room", [150, 151, 299, 300, 455])
def test_a_full_buffer_stops_in_time(isa, room):
    """Every row has all 150 features active; a row is begun only where there is room for all of them."""
    library = load(isa) or load()
    assert library is not None
    z, canary = torch.ones(4, 150), -7
    counts = torch.full((4,), canary, dtype=torch.int32)
    cols, values = torch.full((room + 64,), canary, dtype=torch.int32), torch.full((room + 64,), float(canary))
    done = library.call(
        "collect",
        *(z, 0, 4, 150, 1, torch.zeros(150), None, None, 0, torch.ones(4, 1), None, None, *(None,) * 5, 0.0, room),
        *(counts, cols, values, torch.empty(150, dtype=torch.int32), torch.empty(150), torch.zeros(1).long()),
    )
    assert done == room // 150
    assert counts.tolist() == [150] * done + [canary] * (4 - done)
    assert bool((cols[room:] == canary).all())
    assert bool((values[room:] == canary).all())


def test_a_threshold_is_a_floor_for_top_k(ops):
    problem = Problem((30, 24, 60), torch.float32)
    problem.x[4] *= 20
    z = problem.pre_acts()
    found = ops.active(problem.x, problem.weights, problem.weights.b_enc, noise=None, threshold=0.8, top_k=4)
    expected = (z > 0.8) & (z >= z.topk(4, dim=1).values[:, -1:])
    assert torch.equal(found.rows() * 60 + found.cols, expected.flatten().nonzero()[:, 0])


def test_steps_side_by_side_do_not_share_their_buffers():
    """Many steps in threads at once, as the cells of a grid take them, each as it is alone."""
    problems = [at_density(Problem((60, 16, 90 + i), torch.float32, noisy=True), 0.15) for i in range(6)]
    alone = [problem.run(SparseStep(make_ops("avx512-certified")), "relu", "l1") for problem in problems]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(20):
            together = pool.map(lambda p: p.run(SparseStep(make_ops("avx512-certified")), "relu", "l1"), problems)
            for found, expected in zip(together, alone, strict=True):
                assert all(torch.equal(quantities(found)[key], value) for key, value in quantities(expected).items())


def test_silent_features_moments_become_zero_in_the_fused_update():
    problem = Problem((40, 8, 30), torch.float32, bias=-60.0)
    weights, updater = started(problem, "unit", None)
    step, buffer = SparseStep(make_ops("avx512-fp32")), GradientBuffer(weights)
    for _ in range(1000):
        updater.step(step.backward(problem.x, weights, buffer, **problem.arguments("relu", "l1")), 1e-6)
    state = updater.adam.state()
    for name in ("W_enc", "b_enc", "W_dec"):
        assert not state[f"exp_avg/{name}"].any(), name

"""topk, batchtopk and jumprelu in every kernel against autograd in float64, and their gradients by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, assert_same

from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.native import library
from nsae_cli.kernels.native_ops import NativeOps
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.selection import BatchTopK as LargestOfBatch
from nsae_cli.kernels.selection import row_top_k
from nsae_cli.kernels.sparse import SparseStep
from nsae_cli.kernels.torch_ops import TorchOps
from nsae_cli.kernels.types import StepResult, Weights
from nsae_cli.kernels.update import GradientBuffer, Updater
from nsae_cli.sae.nonlinearity import BatchTopK, JumpRelu, Nonlinearity, TopK
from nsae_cli.sae.penalty import PENALTIES


def _native(isa: str, certified: bool) -> Callable[[], Any]:
    def make() -> SparseStep:
        loops = library.load(isa)
        assert loops is not None, f"no compiled loops for {isa}"
        return SparseStep(NativeOps(loops, certified))

    return make


EXACT = {
    "dense": DenseStep,
    "dense in blocks": lambda: DenseStep(block_rows=4),
    "torch": lambda: SparseStep(TorchOps()),
}
ISAS = [isa for isa in ("base", "avx2", "avx512") if library.load(isa) is not None]
SINGLE = EXACT | {f"{isa} {kind}": _native(isa, kind == "certified") for isa in ISAS for kind in ("fp32", "certified")}
KERNELS = [
    *(pytest.param(make, torch.float64, 1e-12, id=f"{name}, float64") for name, make in EXACT.items()),
    *(pytest.param(make, torch.float32, 5e-6, id=f"{name}, float32") for name, make in SINGLE.items()),
]
# Width → which k stand for one, few, half and all.
WIDTHS = {1: (1,), 7: (1, 3, 7), 1023: (1, 5, 511, 1023)}


def problem_of(act: str, shape: tuple[int, int, int], bias: float = -0.2, noisy: bool = False) -> Problem:
    problem = Problem(shape, torch.float64, bias, noisy)
    if act == "jumprelu":
        generator = torch.Generator().manual_seed(11)
        problem.weights.log_threshold = torch.randn(shape[2], generator=generator, dtype=torch.float64) * 0.5 - 1
    return problem


def run(step: Any, problem: Problem, activation: Nonlinearity, penalty: str = "l1") -> tuple[StepResult, Weights]:
    weights = problem.weights.by_feature() if isinstance(step, SparseStep) else problem.weights
    gradients = Weights(*(torch.full_like(tensor, 7.0) for tensor in weights.tensors()))  # garbage must not survive
    result = step(
        problem.x,
        weights,
        gradients,
        activation=activation,
        penalty=PENALTIES[penalty],
        error_weight=problem.error_weight,
        sparsity_weight=problem.sparsity_weight,
        noise=problem.noise,
    )
    return result, gradients


def check(
    make: Callable[[], Any], dtype: torch.dtype, relative: float, problem: Problem, activation: Nonlinearity,
    penalty: str = "l1",
) -> StepResult:  # fmt: skip
    """The step equals the reference in float64 on the same numbers, rounded to the step's dtype; twice in a row."""
    rounded = problem.to(dtype)
    expected = run(step_gradients, rounded.to(torch.float64), activation, penalty)
    step = make()
    for _ in range(2):  # batch-top-k guesses its threshold from the step before
        found = run(step, rounded, activation, penalty)
        assert_same(found, expected, relative)
        least, exact = found[0].least_act, expected[0].least_act
        assert (least is None) == (exact is None)
        if least is not None and exact is not None:
            torch.testing.assert_close(least.double(), exact, rtol=0, atol=relative)  # sums of numbers of order 1
    return found[0]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("width", "k"), [(width, k) for width, ks in WIDTHS.items() for k in ks])
@pytest.mark.parametrize("act", [TopK, BatchTopK])
@pytest.mark.parametrize(("make", "dtype", "relative"), KERNELS)
def test_top_k_at_every_density(make, dtype, relative, act, width, k, noisy):
    problem = problem_of("topk", (9, 13, width), noisy=noisy)
    result = check(make, dtype, relative, problem, act(k))
    most = k if act is TopK else 9 * k
    assert float(result.l0.max() if act is TopK else result.l0.sum()) <= most


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("bandwidth", [0.0, 1e-3, 0.3, 5.0])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("penalty", ["l0", "l1"])
@pytest.mark.parametrize(("make", "dtype", "relative"), KERNELS)
def test_jumprelu_at_every_bandwidth(make, dtype, relative, penalty, width, bandwidth, noisy):
    problem = problem_of("jumprelu", (9, 13, width), noisy=noisy)
    check(make, dtype, relative, problem, JumpRelu(bandwidth), penalty)


@pytest.mark.parametrize(
    ("shift", "share"), [(4.0, (0, 0)), (2.5, (1e-9, 0.05)), (0.0, (0.05, 0.45)), (-4.0, (0.45, 0.6))]
)
@pytest.mark.parametrize(("make", "dtype", "relative"), KERNELS)
def test_jumprelu_at_every_density(make, dtype, relative, shift, share):
    problem = problem_of("jumprelu", (33, 16, 257), bias=0.0)
    problem.weights.log_threshold = problem.weights.log_threshold + shift
    result = check(make, dtype, relative, problem, JumpRelu(0.2), "l0")
    assert share[0] <= float(result.l0.mean()) / 257 <= share[1]


ACTIVATIONS = [TopK(3), BatchTopK(3), JumpRelu(0.3)]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda act: act.name)
@pytest.mark.parametrize(("make", "dtype", "relative"), KERNELS)
def test_every_penalty(make, dtype, relative, activation, penalty):
    check(make, dtype, relative, problem_of(activation.name, (17, 13, 31)), activation, penalty)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda act: act.name)
@pytest.mark.parametrize(("make", "dtype", "relative"), KERNELS)
def test_no_rows_and_rows_without_an_active_feature(make, dtype, relative, activation):
    problem = problem_of(activation.name, (6, 5, 31))
    problem.weights.b_enc = -problem.weights.b_enc.abs()
    problem.x[2] = 0
    result = check(make, dtype, relative, problem, activation)
    assert result.l0[2] == 0
    nothing = problem_of(activation.name, (6, 5, 31), bias=-50.0)
    assert not check(make, dtype, relative, nothing, activation).fired.any()

    for name in ("x", "error_weight", "sparsity_weight"):
        setattr(problem, name, getattr(problem, name)[:0])
    step, empty = make(), problem.to(dtype)
    result, gradients = run(step, empty, activation)
    assert result.error.shape == (0, 5)
    assert not any(gradient.any() for gradient in gradients.tensors())


@pytest.mark.parametrize("activation", [TopK(5), BatchTopK(5), JumpRelu(0.25)], ids=lambda act: act.name)
@pytest.mark.parametrize(("make", "dtype", "relative"), KERNELS)
def test_ties_go_to_the_lower_row_and_column(make, dtype, relative, activation):
    """All rows equal, features in groups of four equal ones, in eighths: every pre-activation is exact everywhere."""
    generator = torch.Generator().manual_seed(2)

    def eighths(*size: int) -> torch.Tensor:
        return torch.randint(-8, 9, size, generator=generator).double() / 8

    problem = problem_of(activation.name, (12, 6, 40))
    problem.x = eighths(1, 6).expand(12, 6).clone()
    problem.weights.W_enc = eighths(6, 10).repeat_interleave(4, dim=1)
    problem.weights.b_enc = eighths(10).repeat_interleave(4)
    if problem.weights.log_threshold is not None:
        problem.weights.log_threshold.fill_(-40.0)
    check(make, dtype, relative, problem, activation)
    pre_acts = problem.x @ problem.weights.W_enc + problem.weights.b_enc
    assert len(pre_acts[0].unique()) <= 10
    assert (pre_acts[0] > 0).sum() > 8  # more than are chosen, and fives cut through groups of four


def test_which_ties_are_chosen():
    z = torch.tensor([[1.0, 2.0, 2.0, 0.5], [2.0, -1.0, 2.0, 2.0]])
    assert row_top_k(z, 2).tolist() == [[False, True, True, False], [True, False, True, False]]
    assert row_top_k(z, 4).all()
    largest = LargestOfBatch(3)
    for row in z:
        largest.offer(row[None])
    assert [largest.choose(row[None]).tolist() for row in z] == [[[False, True, True, False]], [[True] + [False] * 3]]


def test_a_nan_is_never_sorted_out():
    z = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [4.0, 1.0, 2.0, 0.0]])
    assert row_top_k(z, 1)[0, 1]
    largest = LargestOfBatch(2)
    largest.offer(z)
    assert largest.choose(z)[0, 1]


def test_jumprelu_by_hand():
    """B = 2, d = 1, F = 2, θ = (.5, 2), ε = .2. z = ((.45, 2.05), (.55, 1)): active are z_01 and z_10.

    x = (1, 1) and x̂ = (2.05·.2, .55·.4) = (.41, .22), e = (−.59, −.78), 2w·e = (−.59, −.78) with w = .5.
    ∂L/∂f = ((−.59·.4, −.59·.2), (−.78·.4, −.78·.2)). In the band (|z − θ| < .1): z_00, z_01, z_10.
    ∂L/∂log θ_j = −(θ_j/ε)·Σ (θ_j·∂L/∂f + v):
        θ_0: −2.5·((.5·(−.236) + .3) + (.5·(−.312) + .7)) = −2.5·.726 = −1.815
        θ_1: −10·(2·(−.118) + .3) = −.64
    """

    def tensor(*values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    weights = Weights(
        torch.zeros(1, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), tensor([0.4], [0.2]), tensor(0.0),
        tensor(0.5, 2.0).log(),
    )  # fmt: skip
    for step in (step_gradients, DenseStep(), SparseStep(TorchOps())):
        gradients = weights.zeros_like()
        result = step(
            tensor([1.0], [1.0]),
            weights.by_feature(),
            gradients,
            activation=JumpRelu(0.2),
            penalty=PENALTIES["l0"],
            error_weight=tensor(0.5, 0.5),
            sparsity_weight=tensor(0.3, 0.7),
            noise=tensor([0.45, 2.05], [0.55, 1.0]),
        )
        torch.testing.assert_close(result.error, tensor([-0.59], [-0.78]))
        torch.testing.assert_close(result.penalty, tensor(1.0, 1.0))
        torch.testing.assert_close(gradients.log_threshold, tensor(-1.815, -0.64))
        torch.testing.assert_close(gradients.b_enc, tensor(-0.312, -0.118))  # of the active entries alone


def test_jumprelu_thresholds_follow_the_expected_loss():
    """z uniform on [0, 2], f = z·H(z − θ), x̂ = .6·f, x = z: the expected loss ½∫ ((.6z·H − z)² + v·H) dz has the
    derivative −½·[(.6θ − θ)² − θ² + v] in θ. The pseudo-derivative estimates it from a band; the bias is O(ε)."""
    rows, theta, v = 400_000, 0.7, 0.3
    x = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) * (2 / rows)
    one = torch.ones(1, dtype=torch.float64)
    weights = Weights(one[:, None], 0 * one, 0.6 * one[:, None], 0 * one, (theta * one).log())
    expected = -0.5 * ((0.6 * theta - theta) ** 2 - theta**2 + v)
    for bandwidth in (0.1, 0.02, 0.004):
        gradients = weights.zeros_like()
        mean = torch.full((rows,), 1 / rows, dtype=torch.float64)
        DenseStep()(
            x, weights, gradients, activation=JumpRelu(bandwidth), penalty=PENALTIES["l0"], error_weight=mean,
            sparsity_weight=v * mean,
        )  # fmt: skip
        assert gradients.log_threshold is not None
        assert float(gradients.log_threshold) / theta == pytest.approx(expected, abs=0.04 * bandwidth)


@pytest.mark.parametrize("penalty", ["l0", "l1"])
def test_jumprelu_reference_is_autograd_through_a_smoothed_step(penalty):
    """With H replaced by clamp((z − θ)/ε + ½, 0, 1) wherever θ is differentiated, plain autograd gives the same."""
    problem, epsilon = problem_of("jumprelu", (9, 6, 20), noisy=True), 0.4
    leaves = Weights(*(tensor.clone().requires_grad_() for tensor in problem.weights.tensors()))
    z = problem.x @ leaves.W_enc + leaves.b_enc + problem.noise
    theta = leaves.log_threshold.exp()
    smooth = ((z.detach() - theta) / epsilon + 0.5).clamp(0, 1)
    moved = smooth - smooth.detach()  # 0, with the smoothed step's derivative in θ
    active = (z > theta).double()
    f = z * active + theta.detach() * moved
    error = f @ leaves.W_dec + leaves.b_dec - problem.x
    terms = {"l0": active + moved, "l1": f}[penalty]
    loss = problem.error_weight @ error.square().sum(1) + problem.sparsity_weight @ terms.sum(1)
    loss.backward()
    _, gradients = run(step_gradients, problem, JumpRelu(epsilon), penalty)
    for leaf, (name, gradient) in zip(leaves.tensors(), gradients.named().items(), strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decoder", ["unit", "free", "bounded"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda act: act.name)
def test_the_fused_update_takes_the_same_step(activation, decoder):
    """Three steps of the compiled update, and three with gradients in memory: the same weights, thresholds too."""
    problem = problem_of(activation.name, (64, 13, 96)).to(torch.float32)
    stepped = []
    for clip in (None, 1e6):  # clipping needs the gradients in memory
        weights = dataclasses.replace(problem.weights.to(torch.float32)).by_feature()
        weights.W_dec.div_(weights.W_dec.norm(dim=1, keepdim=True))
        kernel, updater = SparseStep(NativeOps(library.load(), certified=False)), Updater(weights, decoder, clip)
        for _ in range(3):
            gradients = kernel.backward(
                problem.x,
                weights,
                GradientBuffer(weights),
                activation=activation,
                penalty=PENALTIES["l0"],
                error_weight=problem.error_weight,
                sparsity_weight=problem.sparsity_weight,
            )
            assert gradients.can_update
            updater.step(gradients, 1e-2)
        stepped.append((weights, updater.adam.state()))
    (fused, fused_state), (plain, plain_state) = stepped
    for name, tensor in fused.named().items():
        assert not torch.equal(tensor, problem.weights.named()[name]), name
        torch.testing.assert_close(tensor, plain.named()[name], rtol=1e-4, atol=1e-5)
    assert fused_state.keys() == plain_state.keys()


def test_batch_top_k_looks_a_few_times_at_most():
    """After a batch with large acts comes one with hardly any: one product per guess, then one for all."""
    problem = problem_of("batchtopk", (12, 6, 40))
    calls: list[float] = []

    class Counted(TorchOps):
        def active(self, *arguments: Any, threshold: float, **more: Any) -> Any:
            calls.append(threshold)
            return super().active(*arguments, threshold=threshold, **more)

    step = SparseStep(Counted())
    run(step, problem, BatchTopK(2))
    assert calls == [0.0]
    guess = step._guess
    assert guess > 0
    problem.weights.b_enc -= 100
    for expected in ([guess, guess / 2, guess / 4, 0.0], [0.0]):
        calls.clear()
        assert run(step, problem, BatchTopK(2))[0].l0.sum() == 0
        assert calls == expected


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_rows_with_less_than_k_to_choose_from_among_rows_with_more(isa, certified):
    """The compiled loops carry a guess from row to row: here it is a thousand times too high for every other row."""
    problem = problem_of("topk", (24, 6, 40))
    problem.x[::2] *= 1e-3
    problem.weights.b_enc.fill_(-0.05)
    problem.weights.b_enc[:3] = 0.01
    result = check(_native(isa, certified), torch.float32, 5e-6, problem, TopK(8))
    assert torch.equal(result.l0[::2], torch.full((12,), 3.0))
    assert (result.l0[1::2] == 8).all()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda act: act.name)
@pytest.mark.parametrize(("make", "dtype", "relative"), KERNELS)
def test_a_nan_in_the_weights_reaches_the_error(make, dtype, relative, activation):
    problem = problem_of(activation.name, (9, 6, 40)).to(dtype)
    problem.weights.b_enc[7] = torch.nan
    result, _ = run(make(), problem, activation)
    assert not result.sq_error.isfinite().any()

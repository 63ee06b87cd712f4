"""The cosine distance: worked numbers, its gradient against autograd and finite differences, and both kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from problems import Problem, assert_close, assert_same
from test_selections import problem_of

from nsae_cli.errors import UsageError
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.distance import COSINE_DISTANCE, SQUARED_ERROR
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.select import choose
from nsae_cli.kernels.sparse import SparseStep
from nsae_cli.kernels.torch_ops import TorchOps
from nsae_cli.kernels.types import Distance, StepResult, Weights
from nsae_cli.sae.nonlinearity import NONLINEARITIES, make_nonlinearity
from nsae_cli.sae.penalty import PENALTIES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DISTANCES = {distance.name: distance for distance in (SQUARED_ERROR, COSINE_DISTANCE)}
#: Every activation and penalty that a loss of this distance is offered with, and those that it is refused with: a
#: kernel computes them all.
CASES = [
    *((act, penalty) for act in NONLINEARITIES for penalty in ("l1", "l1-decoder-norm", "tanh")),
    *(("topk", "l1"), ("batchtopk", "l1"), ("jumprelu", "l0"), ("jumprelu", "l1")),
]


def gradient(distance: Distance, x: torch.Tensor, x_hat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    measured = distance.measure_(x, x_hat.clone())
    factor = torch.as_tensor(measured.factor, dtype=x.dtype).expand(len(x))
    return measured.value, measured.slope * factor[:, None]


def test_worked_numbers():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 1.0], [1.0, 0.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    x_hat = torch.tensor([[4.0, 3.0], [0.0, 5.0], [0.0, -2.0], [0.0, 4.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    value, slope = gradient(COSINE_DISTANCE, x, x_hat)
    # c = 24/25; 2(c·(.8, .6) − (.6, .8))/5
    torch.testing.assert_close(value, torch.tensor([0.08, 0.0, 4.0, 2.0, 2.0, 2.0], dtype=torch.float64))
    expected = [[0.0672, -0.0896], [0, 0], [0, 0], [-0.5, 0], [0, 0], [0, 0]]
    torch.testing.assert_close(slope, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(COSINE_DISTANCE.value(x, x_hat), value)
    value, slope = gradient(SQUARED_ERROR, x, x_hat)
    torch.testing.assert_close(value, torch.tensor([2.0, 9, 9, 17, 25, 2], dtype=torch.float64))
    assert slope[0].tolist() == [2.0, -2.0]


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_measuring_turns_x_hat_into_the_error(distance):
    x, x_hat = torch.randn(5, 3), torch.randn(5, 3)
    error = x_hat.clone()
    distance.measure_(x, error)
    assert torch.equal(error, x_hat - x)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
@pytest.mark.parametrize("length", [1e-9, 1e-3, 1.0, 1e6])
def test_the_gradient_is_that_of_autograd_and_of_finite_differences(distance, length):
    generator = torch.Generator().manual_seed(3)
    x, x_hat = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    x_hat = (length * x_hat).requires_grad_()
    distance.value(x, x_hat).sum().backward()
    x_hat, by_autograd = x_hat.detach(), x_hat.grad
    value, slope = gradient(distance, x, x_hat)
    torch.testing.assert_close(value, distance.value(x, x_hat), rtol=1e-12, atol=1e-14)
    assert_close(slope, by_autograd, 1e-12, "autograd")
    step = 1e-5 * max(length, 1e-9 if distance is COSINE_DISTANCE else 1.0)
    numeric = torch.empty_like(slope)
    for i in range(4):
        moved = torch.zeros(4, dtype=torch.float64)
        moved[i] = step
        ahead, behind = gradient(distance, x, x_hat + moved)[0], gradient(distance, x, x_hat - moved)[0]
        numeric[:, i] = (ahead - behind) / (2 * step)
    assert_close(numeric, slope, 1e-6, "finite differences")


def test_rows_without_an_angle_have_no_gradient_and_spoil_no_other():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    x_hat = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 1.0]], requires_grad=True)
    COSINE_DISTANCE.value(x, x_hat).sum().backward()
    assert x_hat.grad[:2].tolist() == [[0, 0], [0, 0]]
    assert x_hat.grad[2].abs().min() > 0.1


def test_a_small_angle_keeps_its_digits_in_float32():
    """1 − c of float32 numbers would be 0 or 1.2e-7 here."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x_hat = 3 * (x + 1e-5 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1)))
    exact, exact_slope = gradient(COSINE_DISTANCE, x.double(), x_hat.double())
    value, slope = gradient(COSINE_DISTANCE, x, x_hat)
    assert exact.max() < 3e-10
    assert_close(value, exact, 0.05, "value")
    assert_close(slope, exact_slope, 0.05, "slope")


def run(step, problem: Problem, act: str, penalty: str) -> tuple[StepResult, Weights]:
    gradients = Weights(*(torch.full_like(tensor, 7.0) for tensor in problem.weights.tensors()))
    result = step(
        problem.x,
        problem.weights,
        gradients,
        activation=make_nonlinearity(act, k=3, bandwidth=0.3),
        penalty=PENALTIES[penalty],
        error_weight=problem.error_weight,
        sparsity_weight=problem.sparsity_weight,
        noise=problem.noise,
        distance=COSINE_DISTANCE,
    )
    return result, gradients


@pytest.mark.parametrize(("act", "penalty"), CASES)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("block_rows", [None, 5])
def test_the_dense_step_is_the_reference(act, penalty, noisy, block_rows):
    problem = problem_of(act, (17, 6, 23), noisy=noisy)
    problem.x[3] = 0
    expected = run(step_gradients, problem, act, penalty)
    found = run(DenseStep(block_rows=block_rows), problem, act, penalty)
    assert_same(found, expected, 1e-12)
    assert_close(found[0].distance, expected[0].distance, 1e-12, "distance")
    assert found[0].distance[3] == 2
    assert not torch.allclose(found[0].distance, found[0].sq_error, rtol=0.1)


def test_the_dense_step_where_nothing_is_active_and_x_hat_is_0():
    problem = Problem((9, 5, 7), torch.float64, bias=-50)
    problem.weights.b_dec.zero_()
    result, gradients = run(DenseStep(), problem, "relu", "l1")
    assert result.distance.tolist() == [2.0] * 9
    assert all(not gradient.any() for gradient in gradients.tensors())
    assert_same((result, gradients), run(step_gradients, problem, "relu", "l1"), 1e-12)


def test_the_reference_by_an_independent_formula():
    """2(1 − c) by torch's own cosine, through autograd."""
    problem = Problem((17, 6, 23), torch.float64)
    leaves = Weights(*(tensor.clone().requires_grad_() for tensor in problem.weights.tensors()))
    acts = torch.tanh(torch.relu(problem.x @ leaves.W_enc + leaves.b_enc))
    cosine = torch.nn.functional.cosine_similarity(acts @ leaves.W_dec + leaves.b_dec, problem.x)
    (problem.error_weight * 2 * (1 - cosine) + problem.sparsity_weight * acts.sum(1)).sum().backward()
    _, gradients = run(step_gradients, problem, "tanh-relu", "l1")
    for name, tensor in gradients.named().items():
        assert_close(tensor, leaves.named()[name].grad, 1e-10, name)


def test_sparse_steps_have_the_squared_error_only():
    problem = Problem((9, 5, 7), torch.float32)
    result, _ = problem.run(SparseStep(TorchOps()), "relu", "l1")
    assert result.distance is result.sq_error
    with pytest.raises(AssertionError):
        run(SparseStep(TorchOps()), problem, "relu", "l1")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_run_of_cosine_losses_steps_densely_and_says_so(device):
    choice = choose("auto", "auto", device, [COSINE_DISTANCE])
    assert (choice.name, choice.sparse, choice.dense) == ("dense", None, True)
    kernel = choice.make(8, 64, NONLINEARITIES["tanh-relu"], COSINE_DISTANCE)
    assert kernel.describe()["sparse"] is None
    if device == CPU:
        assert "sparse steps have the squared error only, no cosine distance" in choice.reason
        assert "asked for" in choose("dense", "auto", device, [COSINE_DISTANCE]).reason
    for options in (("sparse", "auto"), ("auto", "certified")):
        with pytest.raises(UsageError, match="squared error only, no cosine distance; leave --"):
            choose(*options, device, [COSINE_DISTANCE])


def test_a_grid_with_a_cosine_loss_steps_its_other_cells_as_ever():
    choice = choose("auto", "fp32", CPU, [SQUARED_ERROR, COSINE_DISTANCE])
    assert choice.reason.endswith("cosine distance: always dense")
    assert dataclasses.replace(choice, reason="") == dataclasses.replace(choose("auto", "fp32", CPU), reason="")
    relu = NONLINEARITIES["relu"]
    assert choice.make(8, 64, relu).describe() == choose("auto", "fp32", CPU).make(8, 64, relu).describe()
    assert choice.make(8, 64, relu, COSINE_DISTANCE).describe()["sparse"] is None
    with pytest.raises(UsageError, match="--kernel sparse"):
        choose("sparse", "auto", CPU, [SQUARED_ERROR, COSINE_DISTANCE])

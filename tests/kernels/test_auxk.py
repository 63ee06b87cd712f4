"""The auxiliary loss of dead features, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from problems import Problem

from nsae_cli.kernels.auxk import default_k_aux, with_auxiliary_loss
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.native import library
from nsae_cli.kernels.native_ops import NativeOps
from nsae_cli.kernels.sparse import SparseStep
from nsae_cli.kernels.torch_ops import TorchOps
from nsae_cli.kernels.types import Weights
from nsae_cli.kernels.update import GradientBuffer, Gradients
from nsae_cli.sae.nonlinearity import TopK
from nsae_cli.sae.penalty import PENALTIES


def step(kernel: DenseStep | SparseStep, problem: Problem) -> tuple[Weights, Gradients]:
    weights = problem.weights.by_feature()
    gradients = kernel.backward(
        problem.x,
        weights,
        GradientBuffer(weights),
        activation=TopK(3),
        penalty=PENALTIES["l1"],
        error_weight=problem.error_weight,
        sparsity_weight=0 * problem.sparsity_weight,
        noise=problem.noise,
    )
    return weights, gradients


def whole_loss(problem: Problem, leaves: list[torch.Tensor], dead: torch.Tensor, k_aux: int, coefficient: float):
    """Squared error of a topk SAE and the auxiliary loss, as the docstring writes them; masks by sorting."""
    W_enc, b_enc, W_dec, b_dec = leaves

    def largest(values: torch.Tensor, k: int) -> torch.Tensor:
        order = torch.sort(values.detach(), dim=1, descending=True, stable=True).indices[:, :k]
        return torch.zeros_like(values).scatter(1, order, 1.0)

    z = problem.x @ W_enc + b_enc + (0 if problem.noise is None else problem.noise)
    x_hat = (largest(z, 3) * z.clamp(min=0)) @ W_dec + b_dec
    h = torch.where(dead, z.clamp(min=0), 0.0)
    e_hat = (largest(torch.where(dead, z, -torch.inf), k_aux) * h) @ W_dec
    residual = (problem.x - x_hat).detach()
    per_row = (x_hat - problem.x).square().sum(1) + coefficient * (e_hat - residual).square().sum(1)
    return (problem.error_weight * per_row).sum()


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("k_aux", [1, 4, 100])
@pytest.mark.parametrize("dead", [[6], [0, 3, 4, 7, 19, 30], list(range(31))], ids=["one", "some", "all"])
@pytest.mark.parametrize("kernel", [DenseStep(), SparseStep(TorchOps())], ids=["dense", "sparse"])
def test_all_gradients_equal_autograd(kernel, dead, k_aux, noisy):
    problem = Problem((17, 13, 31), torch.float64, noisy=noisy)
    mask = torch.zeros(31, dtype=torch.bool)
    mask[dead] = True
    leaves = [tensor.clone().requires_grad_() for tensor in problem.weights.tensors()]
    whole_loss(problem, leaves, mask, k_aux, 0.25).backward()
    weights, gradients = step(kernel, problem)
    found = with_auxiliary_loss(
        gradients, problem.x, weights, mask, k_aux=k_aux, error_weight=problem.error_weight, noise=problem.noise,
        coefficient=0.25,
    )  # fmt: skip
    assert not found.can_update
    for leaf, (name, gradient) in zip(leaves, found.full().named().items(), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-13, msg=name)
    torch.testing.assert_close(found.b_enc, leaves[1].grad)  # where a NaN would show


def test_a_dead_feature_by_hand():
    """One row, d = 1: x = 3, x̂ = b_dec = 1, r = 2. The one feature has z = .5, h = .5, ê = .5·.8 = .4, w = .5, c = .25.

    2cw(ê − r) = .25·(−1.6) = −.4; ∂W_dec = .5·(−.4) = −.2; δ = −.4·.8 = −.32; ∂W_enc = 3·δ = −.96.
    """

    def tensor(*values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    weights = Weights(tensor([0.1]), tensor(0.2), tensor([0.8]), tensor(1.0))
    gradients = step_result(weights, x_hat_minus_x=tensor([-2.0]))
    found = with_auxiliary_loss(
        gradients, tensor([3.0]), weights, torch.tensor([True]), k_aux=1, error_weight=tensor(0.5), coefficient=0.25
    ).full()
    assert [float(t) for t in found.tensors()] == pytest.approx([-0.96, -0.32, -0.2, 0.0])


def step_result(weights: Weights, x_hat_minus_x: torch.Tensor) -> Gradients:
    from nsae_cli.kernels.dense import DenseGradients
    from nsae_cli.kernels.types import StepResult

    nothing = torch.zeros(1, dtype=torch.float64)
    return DenseGradients(
        StepResult(x_hat_minus_x, nothing, nothing, nothing, nothing, nothing, torch.tensor([False])),
        weights.zeros_like(),
    )


def test_without_dead_features_the_gradients_stay_in_their_sparse_form():
    problem = Problem((17, 13, 31), torch.float32)
    loops = library.load()
    assert loops is not None
    weights, gradients = step(SparseStep(NativeOps(loops, certified=True)), problem)
    none = torch.zeros(31, dtype=torch.bool)
    arguments = {"k_aux": 4, "error_weight": problem.error_weight}
    assert with_auxiliary_loss(gradients, problem.x, weights, none, **arguments) is gradients
    assert gradients.can_update
    assert with_auxiliary_loss(gradients, problem.x[:0], weights, ~none, **arguments) is gradients


@pytest.mark.parametrize(("d_in", "k_aux"), [(1, 1), (2, 1), (12, 8), (64, 32), (768, 512), (1024, 512), (1600, 1024)])
def test_k_aux_is_a_power_of_two_near_half_the_width(d_in, k_aux):
    assert default_k_aux(d_in) == k_aux

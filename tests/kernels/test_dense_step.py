"""The dense kernel against plain autograd, and autograd against independent formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import Problem, assert_same

from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.types import StepResult, Weights
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.sae.penalty import PENALTIES

# (B, d, F): a single row, one dimension, one feature, the widths that kernels get wrong, primes.
SHAPES = [(1, 5, 7), (6, 1, 9), (5, 4, 1), (33, 16, 1023), (17, 13, 31), (128, 24, 96)]
COMBINATIONS = list(itertools.product(NONLINEARITIES, PENALTIES))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_dense_step_equals_autograd(act, penalty, shape, noisy, dtype, relative):
    problem = Problem(shape, dtype, noisy=noisy)
    expected = problem.to(torch.float64).run(step_gradients, act, penalty)
    assert_same(problem.run(DenseStep(), act, penalty), expected, relative)


@pytest.mark.parametrize("block_rows", [1, 2, 5, 16, 17])
@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
def test_blocks_of_rows_add_up(act, penalty, block_rows):
    problem = Problem((17, 13, 31), torch.float64, noisy=True)
    expected = problem.run(step_gradients, act, penalty)
    assert_same(problem.run(DenseStep(block_rows=block_rows), act, penalty), expected, 1e-12)


@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
def test_no_feature_active(act, penalty):
    problem = Problem((9, 6, 20), torch.float64, bias=-50.0)
    result, gradients = problem.run(DenseStep(), act, penalty)
    assert not result.fired.any()
    assert torch.equal(result.error, problem.weights.b_dec - problem.x)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(gradients.named()[name], torch.zeros_like(gradients.named()[name]))
    residual = problem.weights.b_dec - problem.x
    torch.testing.assert_close(gradients.b_dec, (2 * problem.error_weight[:, None] * residual).sum(0))
    assert torch.equal(result.l0, torch.zeros(9, dtype=torch.float64))


@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
def test_every_feature_active(act, penalty):
    # Pre-activations near 1.5, so that tanh is not saturated.
    problem = Problem((9, 6, 20), torch.float64, bias=1.5)
    problem.weights.W_enc.mul_(0.05)
    result, gradients = problem.run(DenseStep(), act, penalty)
    assert torch.equal(result.l0, torch.full((9,), 20.0, dtype=torch.float64))
    assert result.fired.all()
    assert_same((result, gradients), problem.run(step_gradients, act, penalty), 1e-12)


def test_a_zero_decoder_row_has_no_gradient_from_its_norm():
    problem = Problem((9, 6, 20), torch.float64)
    problem.weights.W_dec[3] = 0
    found = problem.run(DenseStep(), "relu", "l1-decoder-norm")
    assert_same(found, problem.run(step_gradients, "relu", "l1-decoder-norm"), 1e-12)
    assert found[1].W_dec[3].isfinite().all()


@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
def test_autograd_reference_passes_gradcheck(act, penalty):
    """The reference's loss, written out anew here, is differentiated numerically; its gradients agree."""
    problem = Problem((4, 3, 5), torch.float64, bias=0.1)

    def loss(W_enc, b_enc, W_dec, b_dec):
        z = torch.einsum("bd,df->bf", problem.x, W_enc) + b_enc
        f = z.clamp(min=0) if act == "relu" else z.clamp(min=0).tanh()
        error = torch.einsum("bf,fd->bd", f, W_dec) + b_dec - problem.x
        norms = (W_dec**2).sum(1) ** 0.5
        terms = {"l1": f, "l1-decoder-norm": f * norms, "tanh": torch.tanh(4 * f * norms), "l0": f > 0}
        return (problem.error_weight * (error**2).sum(1) + problem.sparsity_weight * terms[penalty].sum(1)).sum()

    leaves = [tensor.clone().requires_grad_() for tensor in problem.weights.tensors()]
    assert torch.autograd.gradcheck(loss, leaves)
    loss(*leaves).backward()
    _, gradients = problem.run(step_gradients, act, penalty)
    for leaf, gradient in zip(leaves, gradients.tensors(), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-14)


def test_gradients_of_one_row_by_hand():
    """B = 1, d = 2, F = 2; feature 1 is off. f = (2, 0), x̂ = (1.2 + .1, 1.6), e = (.3, −.4)."""
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    weights = Weights(
        torch.tensor([[1.0, -1.0], [0.25, -2.0]], dtype=torch.float64),
        torch.tensor([0.5, 0.3], dtype=torch.float64),
        torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64),
        torch.tensor([0.1, 0.0], dtype=torch.float64),
    )
    gradients = weights.zeros_like()
    result = DenseStep()(
        x,
        weights,
        gradients,
        activation=NONLINEARITIES["relu"],
        penalty=PENALTIES["l1"],
        error_weight=torch.tensor([0.5], dtype=torch.float64),
        sparsity_weight=torch.tensor([0.7], dtype=torch.float64),
    )

    def close(found: torch.Tensor, expected: object) -> None:
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))

    close(result.sq_error, [0.25])
    close(result.penalty, [2.0])
    close(gradients.b_dec, [0.3, -0.4])  # 2·w·e
    close(gradients.W_dec, [[0.6, -0.8], [0.0, 0.0]])  # f·2·w·e
    delta = 0.3 * 0.6 - 0.4 * 0.8 + 0.7  # 2·w·e·d_0 + β·v = .56
    close(gradients.b_enc, [delta, 0.0])
    close(gradients.W_enc, [[delta, 0.0], [2 * delta, 0.0]])


def autocast_step(x, weights, gradients, *, activation, penalty, error_weight, sparsity_weight, noise=None):
    """Plain torch in the same precision: bf16 products under autocast, the rest in float32."""
    leaves = Weights(*(tensor.detach().clone().requires_grad_() for tensor in weights.tensors()))
    with torch.autocast("cpu", torch.bfloat16):
        pre_acts = (x @ leaves.W_enc).float() + leaves.b_enc
        acts = activation.value(pre_acts)
        x_hat = (acts @ leaves.W_dec).float() + leaves.b_dec
    norms = torch.linalg.vector_norm(leaves.W_dec, dim=1)
    sq_error = (x_hat - x).square().sum(1)
    penalties = penalty.value(acts, norms).sum(1)
    (error_weight * sq_error + sparsity_weight * penalties).sum().backward()
    for target, leaf in zip(gradients.tensors(), leaves.tensors(), strict=True):
        target.copy_(leaf.grad)
    return StepResult(
        (x_hat - x).detach(), sq_error.detach(), sq_error.detach(), penalties.detach(), *(torch.empty(0),) * 3
    )


@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
@pytest.mark.parametrize("shape", [(64, 32, 257), (200, 48, 96)])
def test_bf16_products_err_at_most_twice_as_much_as_plain_torch(act, penalty, shape):
    problem = Problem(shape, torch.float32)
    exact_result, exact = problem.to(torch.float64).run(step_gradients, act, penalty)
    ours_result, ours = problem.run(DenseStep(torch.bfloat16), act, penalty)
    plain_result, plain = problem.run(autocast_step, act, penalty)
    for name in exact.named():
        reference = exact.named()[name]
        found = (ours.named()[name].double() - reference).norm()
        assert 0 < found <= 2 * (plain.named()[name].double() - reference).norm(), name
    found = (ours_result.error.double() - exact_result.error).norm()
    assert 0 < found <= 2 * (plain_result.error.double() - exact_result.error).norm()


def test_the_same_step_gives_the_same_bits_whatever_its_buffers_held_before():
    problem, wider = Problem((64, 24, 96), torch.float32), Problem((70, 24, 333), torch.float32)
    step = DenseStep()
    _, first = problem.run(step, "tanh-relu", "l1")
    for _ in range(20):
        wider.run(step, "relu", "l1")
        _, again = problem.run(step, "tanh-relu", "l1")
        assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors(), strict=True))


def test_inputs_are_left_alone():
    problem = Problem((20, 12, 40), torch.float32, noisy=True)
    before = [t.clone() for t in (problem.x, problem.noise, problem.error_weight, *problem.weights.tensors())]
    problem.run(DenseStep(), "relu", "l1-decoder-norm")
    after = (problem.x, problem.noise, problem.error_weight, *problem.weights.tensors())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_memory_of_a_block_is_bounded():
    step = DenseStep()
    blocks = step._blocks(4096, 24576, torch.empty(0))
    assert max(part.stop - part.start for part in blocks) == 512
    assert [blocks[0].start, blocks[-1].stop] == [0, 4096]
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))

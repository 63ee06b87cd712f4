"""Gradient norms of single rows, from sums that a step takes on its way, against float64 autograd row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem

from nsae_cli.kernels.decoder import normalise_rows_, remove_parallel_component_
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.native.library import load
from nsae_cli.kernels.native_ops import NativeOps
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.sparse import SparseStep
from nsae_cli.kernels.torch_ops import TorchOps
from nsae_cli.kernels.types import StepResult
from nsae_cli.kernels.update import GradientBuffer
from nsae_cli.metrics.norm_bias import gradient_norms
from nsae_cli.sae.nonlinearity import make_nonlinearity
from nsae_cli.sae.penalty import PENALTIES

SHAPE = (13, 6, 20)
COMBINATIONS = [
    *((act, penalty) for act in ("relu", "tanh-relu") for penalty in ("l1", "l1-decoder-norm", "tanh")),
    ("topk", "l1"),
    ("jumprelu", "l0"),
]


def native() -> SparseStep:
    loops = load()
    assert loops is not None, "the compiled loops are missing: tests need a C compiler when nsae is installed"
    return SparseStep(NativeOps(loops, certified=False))


KERNELS: dict[str, tuple[Callable[[], Any], torch.dtype, float]] = {
    "dense": (DenseStep, torch.float64, 1e-9),
    "dense-blocks": (lambda: DenseStep(block_rows=5), torch.float64, 1e-9),
    "torch": (lambda: SparseStep(TorchOps()), torch.float64, 1e-9),
    "native": (native, torch.float32, 1e-4),
}


def step_arguments(problem: Problem, act: str, penalty: str) -> dict[str, Any]:
    activation = make_nonlinearity(act, k=4, bandwidth=0.5)
    return problem.arguments("relu", penalty) | {"activation": activation, "penalty": PENALTIES[penalty]}


def of_one_row(problem: Problem, row: int, act: str, penalty: str, unit: bool) -> list[float]:
    """‖∂W_enc‖ and ‖∂W_dec‖ of a batch that is this row alone."""
    arguments = step_arguments(problem, act, penalty)
    part = slice(row, row + 1)
    for key in ("error_weight", "sparsity_weight", "noise"):
        arguments[key] = arguments[key][part].double()
    weights = problem.weights.to(torch.float64)
    gradients = weights.zeros_like()
    step_gradients(problem.x[part].double(), weights, gradients, **arguments)
    if unit:
        remove_parallel_component_(gradients.W_dec, weights.W_dec)
    return [float(gradients.W_enc.norm()), float(gradients.W_dec.norm())]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
@pytest.mark.parametrize("unit", [False, True])
def test_the_norms_are_those_of_autograd(kernel: str, act: str, penalty: str, unit: bool) -> None:
    make, dtype, tolerance = KERNELS[kernel]
    problem = Problem(SHAPE, dtype, bias=0.0, noisy=True)
    problem.weights.W_dec[3] = 0  # has no direction for a penalty on decoder norms to pull along
    if unit:
        problem.weights.W_dec[3, 0] = 1
        normalise_rows_(problem.weights.W_dec)
    if act == "jumprelu":
        problem.weights.log_threshold = torch.full((SHAPE[2],), -1.0, dtype=dtype)
    problem.weights = problem.weights.by_feature()
    result: StepResult = (
        make()
        .backward(
            problem.x,
            problem.weights,
            GradientBuffer(problem.weights),
            row_gradients=True,
            **step_arguments(problem, act, penalty),
        )
        .result
    )
    assert result.row_gradients is not None
    found = gradient_norms(result.row_gradients, problem.x.norm(dim=1), unit)
    expected = [of_one_row(problem, row, act, penalty, unit) for row in range(SHAPE[0])]
    assert found["W_enc"].tolist() == pytest.approx([encoder for encoder, _ in expected], rel=tolerance)
    assert found["W_dec"].tolist() == pytest.approx([decoder for _, decoder in expected], rel=tolerance)
    assert min(found["W_enc"].min(), found["W_dec"].min()) > 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [0, 3])
def test_they_are_there_when_asked_for_and_change_nothing(kernel: str, rows: int) -> None:
    make, dtype, _ = KERNELS[kernel]
    problem = Problem((rows, 6, 20), dtype, bias=0.0)
    arguments = step_arguments(problem, "relu", "l1")
    steps = [
        make().backward(problem.x, problem.weights, GradientBuffer(problem.weights), row_gradients=asked, **arguments)
        for asked in (False, True)
    ]
    plain, asked = (step.result for step in steps)
    assert plain.row_gradients is None
    assert asked.row_gradients is not None
    assert len(asked.row_gradients.delta_sq) == len(asked.row_gradients.along_sq) == rows
    for without, with_them in zip(steps[0].full().tensors(), steps[1].full().tensors(), strict=True):
        assert torch.equal(without, with_them)

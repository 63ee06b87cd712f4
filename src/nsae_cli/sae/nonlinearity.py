"""The activations, value and derivative side by side. All are 0 for pre_acts ≤ 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nsae_cli.kernels.types import POSITIVE, Selection


@dataclass(frozen=True)
class Relu:
    """relu(z) = max(z, 0); derivative 1 where z > 0. Homogeneous: relu(s·z) = s·relu(z) for s > 0."""

    name: ClassVar[str] = "relu"
    homogeneous: ClassVar[bool] = True
    selection: ClassVar[Selection] = POSITIVE

    def value(self, pre_acts: torch.Tensor) -> torch.Tensor:
        return torch.relu(pre_acts)

    def value_(self, pre_acts: torch.Tensor) -> torch.Tensor:
        return pre_acts.relu_()

    def scale_by_derivative_(self, gradient: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        # One pass without a mask in memory, as autograd's own backward of relu.
        return torch.ops.aten.threshold_backward(gradient, acts, 0, grad_input=gradient)

    def derivative(self, acts: torch.Tensor) -> torch.Tensor:
        """act'(pre_acts), from acts."""
        return (acts > 0).to(acts.dtype)


@dataclass(frozen=True)
class TanhRelu:
    """tanh(relu(z)); derivative 1 − tanh² where z > 0. Bounded by 1 and not homogeneous."""

    name: ClassVar[str] = "tanh-relu"
    homogeneous: ClassVar[bool] = False
    selection: ClassVar[Selection] = POSITIVE

    def value(self, pre_acts: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.relu(pre_acts))

    def value_(self, pre_acts: torch.Tensor) -> torch.Tensor:
        return pre_acts.relu_().tanh_()

    def scale_by_derivative_(self, gradient: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        torch.ops.aten.tanh_backward(gradient, acts, grad_input=gradient)
        return torch.ops.aten.threshold_backward(gradient, acts, 0, grad_input=gradient)

    def derivative(self, acts: torch.Tensor) -> torch.Tensor:
        """act'(pre_acts), from acts."""
        return (1 - acts.square()).mul_(acts > 0)


Nonlinearity = Relu | TanhRelu
NONLINEARITIES: dict[str, Nonlinearity] = {"relu": Relu(), "tanh-relu": TanhRelu()}

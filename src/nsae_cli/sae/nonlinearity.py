"""The activations, value and derivative side by side. All are 0 for pre_acts ≤ 0.

An activation is a selection of entries (`Selection`) and then a function of each of them: `value` and `derivative` are
those of the function. topk, batchtopk and jumprelu are relu of what they select.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nsae_cli.kernels.types import POSITIVE, Selection


class _Rectified:
    """relu(z) = max(z, 0) of each entry; derivative 1 where z > 0. Homogeneous: relu(s·z) = s·relu(z) for s > 0."""

    homogeneous: ClassVar[bool] = True

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
class Relu(_Rectified):
    """relu."""

    name: ClassVar[str] = "relu"
    selection: ClassVar[Selection] = POSITIVE


@dataclass(frozen=True)
class TopK(_Rectified):
    """relu of the k largest pre-activations of a row (Gao et al., 2406.04093, section 2.3)."""

    k: int
    name: ClassVar[str] = "topk"

    @property
    def selection(self) -> Selection:
        return Selection(self.k)


@dataclass(frozen=True)
class BatchTopK(_Rectified):
    """relu of the k·B largest pre-activations of a batch of B rows (Bussmann et al., 2412.06410).

    A row's acts depend on the other rows, so this is for training only; see `JumpRelu.fixed`.
    """

    k: int
    name: ClassVar[str] = "batchtopk"

    @property
    def selection(self) -> Selection:
        return Selection(self.k, "batch")


@dataclass(frozen=True)
class JumpRelu(_Rectified):
    """z where z > θ_j, else 0 (Rajamanoharan et al., 2407.14435, section 3); θ_j = exp(log_threshold_j) of the weights.

    Attributes:
        bandwidth: ε of the thresholds' gradient, in the units of the pre-activations; 0 for thresholds that are fixed.
    """

    bandwidth: float
    name: ClassVar[str] = "jumprelu"

    @property
    def selection(self) -> Selection:
        return Selection(bandwidth=self.bandwidth)

    @classmethod
    def fixed(cls) -> JumpRelu:
        """With thresholds that do not learn: a finished SAE's."""
        return cls(0.0)


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


Nonlinearity = Relu | TanhRelu | TopK | BatchTopK | JumpRelu
#: Those that have no parameter.
NONLINEARITIES: dict[str, Relu | TanhRelu] = {"relu": Relu(), "tanh-relu": TanhRelu()}
ACTS = ("relu", "tanh-relu", "topk", "batchtopk", "jumprelu")


def make_nonlinearity(act: str, k: int | None = None, bandwidth: float | None = None) -> Nonlinearity:
    """The activation of that name.

    Args:
        act: one of ACTS.
        k: of topk and batchtopk.
        bandwidth: of jumprelu.
    """
    if act in NONLINEARITIES:
        return NONLINEARITIES[act]
    if act == "jumprelu":
        assert bandwidth is not None
        return JumpRelu(bandwidth)
    assert k is not None
    return TopK(k) if act == "topk" else BatchTopK(k)


def is_homogeneous(act: str) -> bool:
    """Whether acts grow with the input; all but tanh-relu's do, thresholds growing along."""
    return act != "tanh-relu"

"""Sums over the rows of all processes: what each has of them, added up once a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsae_cli.kernels.decoder import gradient_norm
from nsae_cli.kernels.dense import DenseGradients
from nsae_cli.kernels.types import Weights, in_memory_order
from nsae_cli.kernels.update import GradientBuffer, Gradients
from nsae_cli.metrics.norm_bias.gradients import inner_product
from nsae_cli.store.batches import HookRows
from nsae_cli.training.parallel.group import Group
from nsae_cli.training.parallel.ranks import Ranks


@dataclass(frozen=True)
class BatchSums:
    """What all rows of a batch give together.

    Attributes:
        gradients: of the features that are here.
        sq_error: Σ ‖e‖², a scalar.
        fired: whether each feature that is here was positive in any row, bool [F].
        zero_rows: how many count for nothing, a scalar.
    """

    gradients: Gradients
    sq_error: torch.Tensor
    fired: torch.Tensor
    zero_rows: torch.Tensor


class SharedGradients:
    """Memory for gradients, and their sum over the processes that have other rows.

    The loss is a mean over the rows of the whole batch, by whose number each row's weight is divided, so that gradients
    are added up and not averaged. With several processes they lie in one piece of memory together with what else is
    added up: one collective a step.

    Args:
        weights: the parameters that are here.
        data: processes with other rows.
    """

    def __init__(self, weights: Weights, data: Group) -> None:
        self._data = data
        self.buffer = GradientBuffer(weights) if data.size == 1 else _InOnePiece(weights)

    def sum(self, gradients: Gradients, rows: HookRows) -> BatchSums:
        """The sums over all processes.

        Args:
            gradients: of this process's rows; with several processes they are written into the buffer.
            rows: those.
        """
        result = gradients.result
        sq_error, zero_rows = result.sq_error.sum(), rows.zero.sum()
        if not isinstance(self.buffer, _InOnePiece):
            return BatchSums(gradients, sq_error, result.fired, zero_rows)
        full = gradients.full()
        beside, fired = self.buffer.beside, len(result.fired)
        beside[:fired] = result.fired
        beside[fired], beside[fired + 1] = sq_error, zero_rows
        self._data.sum_(self.buffer.everything)
        return BatchSums(DenseGradients(result, full), beside[fired], beside[:fired] > 0, beside[fired + 1].long())


class _InOnePiece(GradientBuffer):
    """Gradients as views of one tensor, with room for a number per feature and two more beside them."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        sizes = [tensor.numel() for tensor in weights.tensors()]
        beside = len(weights.b_enc) + 2
        self.everything = weights.b_enc.new_zeros(sum(sizes) + beside)
        *parts, self.beside = self.everything.split([*sizes, beside])
        views = []
        for part, tensor in zip(parts, weights.tensors(), strict=True):
            view = part.view(in_memory_order(tensor).shape)
            views.append(view if tensor.is_contiguous() else view.t())
        self._gradients = Weights(*views)

    def release(self) -> None:
        """Keeps it: every step needs all gradients."""


def shared_norm(ranks: Ranks, gradients: Weights) -> torch.Tensor:
    """‖g‖ over the gradients of all features; that of b_dec, which every process has, counts once."""
    if ranks.features.size == 1:
        return gradient_norm(gradients)
    cut = [tensor for name, tensor in gradients.named().items() if name != "b_dec"]
    squares = torch.stack([torch.linalg.vector_norm(tensor).square() for tensor in cut]).sum()
    ranks.features.sum_(squares)
    return (squares + torch.linalg.vector_norm(gradients.b_dec).square()).sqrt()


def shared_inner_product(ranks: Ranks, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Σ a·b over all parameters of all features; that of b_dec counts once."""
    if ranks.features.size == 1:
        return inner_product(a, b)
    cut = [name for name in a if name != "b_dec"]
    total = torch.tensor([inner_product({n: a[n] for n in cut}, {n: b[n] for n in cut})], dtype=torch.float64)
    ranks.features.sum_(total)
    return float(total) + inner_product({"b_dec": a["b_dec"]}, {"b_dec": b["b_dec"]})

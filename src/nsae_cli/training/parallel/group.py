"""What processes tell each other: a few collective operations, and a process by itself, for which they do nothing.

Every process of a group has to call the same operations in the same order. Plain `torch.distributed` collectives rather
than DDP, which hooks into autograd's backward pass: nsae's gradients are closed forms, written into one buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist


class PeerLostError(Exception):
    """A collective did not come about: another process has ended, or did not take part within the timeout."""


class Group(Protocol):
    """Some processes, this one among them.

    Attributes:
        size: how many.
        rank: the number of this one among them, 0-based.
    """

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replaces a contiguous tensor by its sum over the processes; the same bits in all of them."""

    def most_(self, tensor: torch.Tensor) -> None:
        """Replaces a contiguous tensor by the largest values."""

    def least_(self, tensor: torch.Tensor) -> None:
        """Replaces a contiguous tensor by the smallest values."""

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Those of all processes, in the order of their ranks: [size, …] of equal shapes […]."""

    def cat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Those of all processes one after the other along the first axis."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """`cat` in the first process alone; None in the others."""

    def spread_(self, tensor: torch.Tensor) -> None:
        """Replaces a contiguous tensor by that of the first process."""


class OneProcess:
    """A process by itself."""

    size = 1
    rank = 0

    def sum_(self, tensor: torch.Tensor) -> None: ...

    def most_(self, tensor: torch.Tensor) -> None: ...

    def least_(self, tensor: torch.Tensor) -> None: ...

    def spread_(self, tensor: torch.Tensor) -> None: ...

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[None]

    def cat(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor


#: This process, by itself.
ONE = OneProcess()


class Processes:
    """Several processes, over a process group of `torch.distributed`.

    Args:
        handle: the group.
        ranks: who belongs to it, by number in the whole job.
        rank: the number of this process in the whole job.
        begins: called before every operation.
    """

    def __init__(self, handle: dist.ProcessGroup, ranks: list[int], rank: int, begins: Callable[[], None]) -> None:
        self._handle, self._first, self._begins = handle, ranks[0], begins
        self.size, self.rank = len(ranks), ranks.index(rank)

    def _call(self, operation: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        self._begins()
        try:
            operation(*arguments, group=self._handle, **named)
        except RuntimeError as error:  # what every backend raises where another process is gone or late
            raise PeerLostError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def sum_(self, tensor: torch.Tensor) -> None:
        self._call(dist.all_reduce, tensor, op=dist.ReduceOp.SUM)

    def most_(self, tensor: torch.Tensor) -> None:
        self._call(dist.all_reduce, tensor, op=dist.ReduceOp.MAX)

    def least_(self, tensor: torch.Tensor) -> None:
        self._call(dist.all_reduce, tensor, op=dist.ReduceOp.MIN)

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        sent = _as_sent(tensor)
        found = sent.new_empty(self.size, *tensor.shape)
        self._call(dist.all_gather, list(found.unbind()), sent)
        return found.to(tensor.dtype)

    def cat(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.stack(tensor).flatten(0, 1)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        sent = _as_sent(tensor)
        parts = [torch.empty_like(sent) for _ in range(self.size)] if self.rank == 0 else None
        self._call(dist.gather, sent, parts, dst=self._first)
        return None if parts is None else torch.cat(parts).to(tensor.dtype)

    def spread_(self, tensor: torch.Tensor) -> None:
        self._call(dist.broadcast, tensor, src=self._first)


def _as_sent(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and no bool, which not every backend sends."""
    return (tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor).contiguous()

"""The processes that train one SAE, as each of them sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli import interrupt
from nsae_cli.store.batches import HookRows, Share
from nsae_cli.training.parallel.exchange import RanksExchange
from nsae_cli.training.parallel.group import ONE, Group
from nsae_cli.training.parallel.mesh import ONE as ONE_PROCESS
from nsae_cli.training.parallel.mesh import Mesh

#: Entries of a cell's state that are cut by feature, along their first axis: by the last part of their name.
_BY_FEATURE = frozenset({"W_enc", "b_enc", "W_dec", "log_threshold", "last_fired"})


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train with it.

    Attributes:
        mesh: how they share the work.
        world: all of them.
        data: those that have the same features, in the order of their rows.
        features: those that have the same rows, in the order of their features.
        part: leaves the others.
        passes: takes note of an operation that only some of them take part in: who is behind is told by their number.
    """

    mesh: Mesh = ONE_PROCESS
    world: Group = ONE
    data: Group = ONE
    features: Group = ONE
    part: Callable[[], None] = lambda: None
    passes: Callable[[], None] = lambda: None

    @property
    def size(self) -> int:
        """How many there are."""
        return self.mesh.size

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks for all."""
        return self.world.rank == 0

    @property
    def share(self) -> Share:
        """Which part of every batch this process has."""
        return Share(self.data.rank, self.data.size)

    def own_features(self, d_sae: int) -> slice:
        """Which of an SAE's features this process has."""
        part = d_sae // self.features.size
        return slice(self.features.rank * part, (self.features.rank + 1) * part)

    def own_rows(self, batch_size: int) -> slice:
        """Which rows of a batch this process has."""
        part = batch_size // self.data.size
        return slice(self.data.rank * part, (self.data.rank + 1) * part)

    def exchange(self) -> RanksExchange | None:
        """What a training step asks other processes; None where there are none."""
        return None if self.size == 1 else RanksExchange(self.data, self.features, self.world)

    def exchange_of_rows(self) -> RanksExchange | None:
        """The same for rows that every process has, as those of a probe."""
        return None if self.features.size == 1 else RanksExchange(ONE, self.features, self.features)

    def stop_requested(self) -> int | None:
        """The signal that asked any of the processes to end; the same answer in all of them."""
        return self.agree(interrupt.stop_requested() or 0)[0] or None

    def agree(self, *numbers: int) -> list[int]:
        """The largest of what the processes give."""
        if self.size == 1:
            return list(numbers)
        told = torch.tensor(numbers, dtype=torch.int64)
        self.world.most_(told)
        return [int(number) for number in told]

    def of_first(self, value: Any) -> Any:
        """What the first process gives: a value that JSON can hold."""
        if self.size == 1:
            return value
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        self.world.spread_(length)
        told = content if self.leads else torch.empty(int(length), dtype=torch.uint8)
        self.world.spread_(told)
        return json.loads(told.numpy().tobytes())

    def of_all(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks: values that JSON can hold."""
        if self.size == 1:
            return [value]
        content = json.dumps(value).encode()
        [longest] = self.agree(len(content))
        padded = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8)
        return [json.loads(told.numpy().tobytes()) for told in self.world.stack(padded)]

    def wait(self) -> None:
        """Until all processes have come here."""
        self.agree(0)

    def leave(self) -> None:
        """Ends what the processes do together, in all of them: from here on each goes on by itself."""
        self.wait()
        self.part()

    def whole_batch(self, rows: HookRows) -> HookRows:
        """The rows of all processes."""
        if self.data.size == 1:
            return rows
        return HookRows(*(self.data.cat(part) for part in (rows.x, rows.norm, rows.group, rows.zero)))

    def whole_state(self, state: dict[str, torch.Tensor], *, copy: bool) -> dict[str, torch.Tensor]:
        """A cell's state with all features, on the CPU, in the first process; in the others there is nothing.

        Args:
            state: of this process's features.
            copy: in memory of its own.
        """
        whole = {}
        for name, tensor in state.items():
            is_cut = self.features.size > 1 and _is_by_feature(name)
            if is_cut and self.data.rank:
                self.passes()
            elif is_cut and (gathered := self.features.gather(tensor.to("cpu"))) is not None:
                whole[name] = gathered
            elif not is_cut and self.leads:
                whole[name] = tensor.to("cpu", copy=copy)
        return whole

    def own_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's part of a whole state."""
        if self.features.size == 1:
            return state
        return {
            name: tensor[self.own_features(len(tensor))] if _is_by_feature(name) else tensor
            for name, tensor in state.items()
        }


def _is_by_feature(name: str) -> bool:
    return name.rpartition("/")[2] in _BY_FEATURE


#: One process.
ALONE = Ranks()

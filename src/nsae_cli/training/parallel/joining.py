"""From processes that a launcher has started to `Ranks`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nsae_cli import catalogue, interrupt
from nsae_cli.device import DeviceOption
from nsae_cli.launch import Placement
from nsae_cli.training.parallel.group import ONE, Group, Processes
from nsae_cli.training.parallel.mesh import Mesh
from nsae_cli.training.parallel.ranks import ALONE, Ranks
from nsae_cli.training.parallel.watch import Watch


@dataclass(frozen=True)
class Job:
    """The processes of this command.

    Attributes:
        ranks: they, from this one's point of view.
        watch: over them; None where there is one.
    """

    ranks: Ranks
    watch: Watch | None = None


def device_of(option: DeviceOption, placement: Placement) -> DeviceOption:
    """The ``--device`` of one of several processes: each takes a GPU of its own, where there are any.

    Raises:
        UsageError: a device that several processes cannot share.
    """
    if placement.world == 1:
        return option
    if option.startswith(("cuda:", "mps")):
        raise catalogue.REFUSED_COMBINATION(
            f"--device {option} with {placement.world} processes: each needs a device of its own; give cuda or cpu"
        )
    if option == "cpu" or (option == "auto" and not torch.cuda.is_available()):
        return "cpu"
    return f"cuda:{placement.local_rank}"


@contextlib.contextmanager
def joined(mesh: Mesh, placement: Placement, device: DeviceOption, timeout: float) -> Iterator[Job]:
    """Meets the other processes and parts from them in the end.

    Args:
        mesh: how they share the work.
        placement: this process among them.
        device: of `device_of`.
        timeout: seconds that processes wait for each other, here and in every collective.

    Raises:
        ResourceError: the others cannot be reached, or do not come.
    """
    if mesh.size == 1:
        yield Job(ALONE)
        return
    wait = timedelta(seconds=timeout)
    store = _meet(placement, wait)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    try:
        first_holds = os.environ.get(_LAUNCHER_HOLDS) != "True"
        watch = Watch(
            lambda: dist.PrefixStore("watch", _connect(wait)), placement.rank, placement.world, first_holds=first_holds
        )
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=placement.rank, world_size=placement.world, timeout=wait)
        ranks = _ranks(mesh, placement, watch, wait, backend)
    except RuntimeError as error:
        raise catalogue.RANKS_NOT_MET(
            f"{_who(placement)} cannot talk to the others ({_first(error)}); {_REMEDY}"
        ) from error
    watch.begin()
    try:
        yield Job(ranks, watch)
    finally:
        _part(watch)


def _part(watch: Watch) -> None:
    """Leaves the others; a second time does nothing."""
    watch.end()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _ranks(mesh: Mesh, placement: Placement, watch: Watch, wait: timedelta, backend: str) -> Ranks:
    everybody = list(range(mesh.size))
    row, column = mesh.place(placement.rank)
    rows = [everybody[start : start + mesh.features] for start in range(0, mesh.size, mesh.features)]
    columns = [everybody[start :: mesh.features] for start in range(mesh.features)]
    # Everybody takes part in making every group, its own or not, in the same order.
    row_groups = [dist.new_group(ranks, timeout=wait, backend=backend) for ranks in rows]
    column_groups = [dist.new_group(ranks, timeout=wait, backend=backend) for ranks in columns]
    world = dist.group.WORLD
    assert world is not None

    def of(handle: dist.ProcessGroup, ranks: list[int]) -> Group:
        return ONE if len(ranks) == 1 else Processes(handle, ranks, placement.rank, watch.entering)

    return Ranks(
        mesh,
        world=of(world, everybody),
        data=of(column_groups[column], columns[column]),
        features=of(row_groups[row], rows[row]),
        part=lambda: _part(watch),
        passes=watch.entering,
    )


#: Set by torchrun, whose own process holds the store.
_LAUNCHER_HOLDS = "TORCHELASTIC_USE_AGENT_STORE"
_REMEDY = "check MASTER_ADDR and MASTER_PORT, or start with torchrun, which sets them"


def _meet(placement: Placement, wait: timedelta) -> dist.Store:
    """A store in which all processes have said that they are there."""
    address = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not all(address):
        raise catalogue.RANKS_NOT_MET(
            f"{_who(placement)} does not know where to meet the others: MASTER_ADDR or MASTER_PORT is not set; start "
            f"with torchrun, or export both"
        )
    hosts = placement.rank == 0 and os.environ.get(_LAUNCHER_HOLDS) != "True"
    try:
        store = dist.PrefixStore("group", _connect(wait, hosts=hosts))
        store.set(f"here/{placement.rank}", "")
    except (RuntimeError, ValueError) as error:
        what = "cannot open the port" if hosts else "does not reach"
        raise catalogue.RANKS_NOT_MET(
            f"{_who(placement)} {what} {':'.join(map(str, address))} ({_first(error)}); {_REMEDY}"
        ) from error
    until = time.monotonic() + wait.total_seconds()
    while missing := [rank for rank in range(placement.world) if not store.check([f"here/{rank}"])]:
        if time.monotonic() > until:
            raise catalogue.RANKS_NOT_MET(
                f"rank {missing[0]} of {placement.world} did not come within {wait.total_seconds():g} s "
                f"(--rank-timeout), {len(missing)} missing in all; look at its own output, or start all with torchrun"
            )
        interrupt.stop_if_requested("stopped while waiting for the other processes")
        time.sleep(0.05)
    return store


def _connect(wait: timedelta, *, hosts: bool = False) -> dist.TCPStore:
    """A connection to the store at MASTER_ADDR:MASTER_PORT, which torchrun or the first process holds."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=hosts,
        timeout=wait,
        wait_for_workers=False,
    )


def _who(placement: Placement) -> str:
    return f"rank {placement.rank} of {placement.world}"


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:100]

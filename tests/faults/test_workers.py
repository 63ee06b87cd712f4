"""Several workers share the shards of a store: a share of what `make torture` tries."""

from __future__ import annotations

from pathlib import Path

import checks
import pytest
import workers
from forked import Server
from stages import Prepared


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_workers_makes_the_same_bytes(
    server: Server, collect: Prepared, folder: Path, world: int
) -> None:
    workspace = collect.begin(folder)
    ended = workers.work(server, collect, workspace, world)
    assert workers.ended_well(ended) + checks.differences(collect, workspace) == []
    for rank, one in enumerate(ended):
        assert [int(number) for number in one.work("shard")] == list(range(rank, 9, world))


def test_another_number_of_workers_goes_on(server: Server, collect: Prepared, folder: Path) -> None:
    workers.go_on_in_another_world(server, collect, folder, [(3, 1), (2, 4), (1, 3)]).require()


def test_a_worker_that_dies_at_an_operation(server: Server, collect: Prepared, folder: Path) -> None:
    tally = workers.die_at_every_operation(server, collect, folder, 3, points=range(1, 40, 5))
    tally.require()
    assert tally.counts["told that a worker has died"] >= 1

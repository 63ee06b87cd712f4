"""Collecting by several workers at once: any number of them, killed or not, leaves the bytes of one."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checks
from forked import Ended, Server
from stages import Prepared
from tally import Tally


def work(
    server: Server,
    prepared: Prepared,
    workspace: Path,
    world: int,
    ranks: Sequence[int] | None = None,
    faults: Mapping[int, Any] | None = None,
) -> list[Ended]:
    """Workers that begin together; with a world of one the plain command."""
    trials = []
    for rank in range(world) if ranks is None else ranks:
        trial = prepared.trial(workspace, **({"fault": faults[rank]} if faults and rank in faults else {}))
        share = () if world == 1 else ("--worker", f"{rank}/{world}")
        trials.append(type(trial)(workspace, (*trial.arguments, *share), trial.options))
    return server.run_together(trials)


def ended_well(ended: Iterable[Ended]) -> list[str]:
    """What is wrong with workers of which none met a fault: exactly one of them prints the store."""
    ended = list(ended)
    problems = [one.describe() for one in ended if one.code != 0 or "Traceback" in one.err]
    printed = sum(bool(one.out) for one in ended)
    return problems + ([] if printed == 1 else [f"{printed} workers have printed the store"])


def go_on_in_another_world(
    server: Server, prepared: Prepared, folder: Path, changes: Iterable[tuple[int, int]]
) -> Tally:
    """All workers of a job but the last one work, or of a lonely one half; then a job of another size goes on."""
    tally = Tally("another number of workers goes on", prepared.stage.name)
    for first, second in changes:
        workspace = prepared.begin(folder)
        if first == 1:
            half = len(prepared.undisturbed.operations) // 2
            begun = work(server, prepared, workspace, 1, faults={0: {"at": half, "how": "kill"}})
        else:
            begun = work(server, prepared, workspace, first, ranks=range(first - 1))
        again = work(server, prepared, workspace, second)
        twice = {number for one in begun for number in one.work("shard")} & {
            number for one in again for number in one.work("shard")
        }
        tally.measure("shards done twice", len(twice))
        problems = ended_well(again) + checks.differences(prepared, workspace)
        if len(twice) > 3 * (first == 1):
            problems.append(f"shards {sorted(twice)} were done twice")
        tally.add(f"{first} -> {second}", problems)
        shutil.rmtree(workspace)
    return tally


def die_at_every_operation(
    server: Server, prepared: Prepared, folder: Path, world: int, points: Iterable[int] | None = None, again: int = 0
) -> Tally:
    """Kills one worker of a job at its k-th operation; the others make their shards, and a job of any size the rest.

    Args:
        world: how many workers.
        points: only these operations; None tries all of every worker.
        again: how many workers go on; 0 takes another number each time.
    """
    tally = Tally(f"one of {world} workers dies at an operation", prepared.stage.name)
    unhit: set[int] = set()
    for k in itertools.count(1) if points is None else points:
        for rank in range(world) if points is None else [k % world]:
            if rank in unhit:
                continue
            workspace = prepared.begin(folder)
            ended = work(server, prepared, workspace, world, faults={rank: {"at": k, "how": "kill"}})
            victim = ended[rank]
            others = [one for one in ended if one is not victim]
            if not victim.faulted:
                unhit.add(rank)
                problems = ended_well(ended)
            else:
                problems = [] if victim.killed else [f"it did not die: {victim.describe()}"]
                problems += [one.describe() for one in others if one.code not in (0, 3)]
                for told in (one for one in others if one.code == 3):
                    tally.counts["told that a worker has died"] += 1
                    problems += checks.failed_in_one_line(told, 3)
                problems += checks.half_files(prepared, workspace) + checks.verify(server, workspace)
            second = work(server, prepared, workspace, again or 1 + k % world)
            problems += [one.describe() for one in second if one.code != 0]
            done = [number for one in others for number in one.work("shard")]
            twice = set(done) & {number for one in second for number in one.work("shard")}
            problems += [f"shards {sorted(twice)} of the others were made again"] if twice else []
            problems += checks.differences(prepared, workspace)
            tally.add(f"worker {rank}, operation {k} {victim.of('fault')}", problems)
            shutil.rmtree(workspace)
        if points is None and len(unhit) == world:
            break
    return tally

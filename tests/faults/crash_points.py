"""Death at every durable operation and at random moments, also while recovering from a death; torn logs (C1 to C4)."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import checks
from forked import Ended, Server
from stages import Prepared
from tally import Tally


def _survives(
    server: Server, prepared: Prepared, workspace: Path, runs: list[Ended], tally: Tally, verify: bool
) -> list[str]:
    """Checks what is there, runs the command again and checks what is there then."""
    problems = checks.half_files(prepared, workspace)
    if verify:
        problems += checks.verify(server, workspace)
    again, after = checks.run_again(server, prepared, workspace)
    lost, too_much = checks.too_much_lost(prepared, [*runs, again])
    tally.measure(f"{prepared.stage.resumes or 'nothing'}s done twice", lost)
    return problems + after + too_much


def die_at_every_operation(
    server: Server,
    prepared: Prepared,
    folder: Path,
    how: str = "exit",
    points: Iterable[int] | None = None,
    verify: bool = True,
) -> Tally:
    """Kills the command at its 1st, 2nd, … operation until it ends unhit, each time in a fresh workspace.

    Args:
        how: ``exit`` (137, as after kill -9 but for the way out) or ``kill`` (SIGKILL by itself).
        points: only these operations.
        verify: run `nsae verify` between death and rerun.
    """
    tally = Tally("death at an operation", prepared.stage.name)
    for k in itertools.count(1) if points is None else points:
        workspace = prepared.begin(folder)
        died = server.run(prepared.trial(workspace, fault={"at": k, "how": how}))
        if not died.faulted:
            problems = checks.differences(prepared, workspace) if points is None else []
            shutil.rmtree(workspace)
            if points is not None:
                continue
            assert not problems, problems
            break
        problems = [] if died.killed else [f"it did not die: {died.describe()}"]
        problems += _survives(server, prepared, workspace, [died], tally, verify)
        tally.add(f"operation {k} {died.of('fault')}", problems)
        shutil.rmtree(workspace)
    return tally


def die_twice(
    server: Server, prepared: Prepared, folder: Path, pairs: Iterable[tuple[int, int]], verify: bool = True
) -> Tally:
    """Kills the command at an operation and, run again, at another."""
    tally = Tally("death while recovering from a death", prepared.stage.name)
    for first, second in pairs:
        workspace = prepared.begin(folder)
        runs = [server.run(prepared.trial(workspace, fault={"at": k, "how": "kill"})) for k in (first, second)]
        tally.counts["second death met"] += runs[1].faulted
        tally.add(f"operations {first}, {second}", _survives(server, prepared, workspace, runs, tally, verify))
        shutil.rmtree(workspace)
    return tally


def kill_at_random_times(
    server: Server,
    prepared: Prepared,
    folder: Path,
    trials: int,
    seed: int,
    deaths: int = 1,
    resuming: bool = False,
    verify: bool = True,
) -> Tally:
    """kill -9 from outside, at a moment drawn evenly from the time that the command takes, until `trials` have met it.

    A trial whose command ends before its kill is counted and drawn again, from the time that the command then took.

    Args:
        deaths: how often in a row, each time in the time that is left.
        resuming: the command first stops halfway, at a checkpoint or shard, and is killed while going on from there.
    """
    what = "kill -9 at a random time" if deaths == 1 else f"{deaths} × kill -9 at random times"
    tally = Tally(what + (" while going on" if resuming else ""), prepared.stage.name)
    draw = random.Random(seed)
    halfway = len(prepared.undisturbed.operations) // 2
    longest = [prepared.undisturbed.seconds] * deaths
    while tally.tried < trials:
        workspace = prepared.begin(folder)
        runs, moments = [], []
        if resuming:
            runs.append(server.run(prepared.trial(workspace, fault={"at": halfway, "how": "kill"})))
        for death in range(deaths):
            moments.append(draw.uniform(0, longest[death]))
            runs.append(server.run(prepared.trial(workspace, kill_after=moments[-1])))
            if not runs[-1].killed:
                break
        if (last := runs[-1]).code == 0:
            tally.counts["drawn again: done before the kill"] += 1
            longest[len(moments) - 1] = min(longest[len(moments) - 1], last.seconds)
            if problems := checks.differences(prepared, workspace):
                tally.add(f"done before {moments} s", problems)
        else:
            problems = [] if last.killed else [f"run {last.describe()}"]
            problems += _survives(server, prepared, workspace, runs, tally, verify)
            tally.add(f"trial at {moments} s", problems)
        shutil.rmtree(workspace)
    return tally


def tear_the_log(server: Server, prepared: Prepared, folder: Path, every: int = 1) -> Tally:
    """Kills training between two steps and cuts metrics.jsonl within its last line, at every byte of it."""
    tally = Tally("metrics.jsonl torn within its last line", prepared.stage.name)
    killed = prepared.begin(folder)
    appended = [o.number for o in prepared.undisturbed.operations if o.paths[-1].endswith("/metrics.jsonl")]
    died = server.run(prepared.trial(killed, fault={"at": appended[len(appended) * 3 // 4], "how": "kill"}))
    assert died.killed, died.describe()
    for log in sorted(killed.rglob("metrics.jsonl")):
        content = log.read_bytes()
        last_line = content[:-1].rfind(b"\n") + 1
        for size in range(last_line, len(content) + 1, every):
            workspace = prepared.begin(folder)
            shutil.rmtree(workspace)
            shutil.copytree(killed, workspace)
            (workspace / log.relative_to(killed)).write_bytes(content[:size])
            tally.add(f"{log.parent.name} cut to {size}", _survives(server, prepared, workspace, [died], tally, False))
            shutil.rmtree(workspace)
    return tally

"""Commands that are started as several processes, as a launcher would, and processes of them that die."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import Ended, Server, Trial
from stages import CHECKPOINT_EVERY, STEPS, Prepared
from tally import Tally

from nsae_cli.training.checkpoint import Checkpoints

#: All processes have to be gone within so many seconds of a death; of a hang, after the timeout.
LONGEST = 30.0
#: ``--rank-timeout`` of these trials (seconds).
TIMEOUT = 6
HOWS = ("kill", "segfault", "exception", "hang")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets in the environment of a process."""
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in numbers.items()}


@dataclass(frozen=True)
class Several:
    """How one command ended in each of its processes, by rank."""

    ended: list[Ended]

    @property
    def codes(self) -> list[int]:
        """Exit codes by rank."""
        return [one.code for one in self.ended]

    @property
    def lines(self) -> list[str]:
        """The lines of all processes that say why they ended."""
        return [line for one in self.ended for line in one.err.splitlines() if line.startswith("nsae: ")]

    def describe(self) -> str:
        """For the message of a failed check."""
        return f"codes {self.codes}: " + " || ".join(one.err[-300:] for one in self.ended)


def run(
    server: Server,
    workspace: Path,
    arguments: tuple[str, ...],
    world: int,
    options: dict[int, dict[str, Any]] | None = None,
    extra: dict[int, tuple[str, ...]] | None = None,
    port: int | None = None,
) -> Several:
    """Starts a command `world` times and waits for all of them.

    Args:
        server: forks the processes.
        workspace: of all of them.
        arguments: of the command.
        world: how many.
        options: of some ranks: what is to befall them.
        extra: further arguments of some ranks.
        port: where they meet; None for a free one.
    """
    port = port or free_port()
    shared = {"count_operations": False, "timeout": 60}
    trials = [
        Trial(
            workspace,
            (*arguments, *(extra or {}).get(rank, ())),
            shared | {"environment": place(rank, world, port)} | (options or {}).get(rank, {}),
        )
        for rank in range(world)
    ]
    return Several(server.run_together(trials))


def state_of(workspace: Path, name: str) -> tuple[int, dict[str, Any]]:
    """Step and tensors of the newest checkpoint, which has to be intact."""
    checkpoints = Checkpoints(workspace / "saes" / name / "checkpoints")
    assert not checkpoints.damaged()
    step = checkpoints.steps()[-1]
    return step, checkpoints.at_step(step).cells[next(iter(checkpoints.at_step(step).cells))]


def die(
    server: Server, prepared: Prepared, folder: Path, world: int, deaths: list[tuple[str, int, int]], parallel: str
) -> Tally:
    """One process dies at a step; all end, it is named once, the checkpoint is whole and the same command goes on.

    Args:
        server: forks the processes.
        prepared: training of one SAE.
        folder: for workspaces.
        world: how many processes.
        deaths: how, which rank, before which step.
        parallel: how they share the work.
    """
    tally = Tally("one of several processes dies", f"train, {world} processes, --parallel {parallel}")
    arguments = (*prepared.arguments, "--rank-timeout", f"{TIMEOUT}s", "--parallel", parallel)
    whole = prepared.begin(folder)
    undisturbed = run(server, whole, arguments, world)
    assert set(undisturbed.codes) == {0}, undisturbed.describe()
    expected = _weights(whole)
    for how, rank, step in deaths:
        workspace = prepared.begin(folder)
        several = run(server, workspace, arguments, world, {rank: {"end_at_step": {"how": how, "step": step}}})
        problems = _ended_together(several, how, rank, step, world)
        tally.counts[how] += 1
        died = float(several.ended[rank].events[-1][0])
        last = max(one.ended for number, one in enumerate(several.ended) if how != "hang" or number != rank)
        tally.measure(f"seconds until all had ended ({how})", last - died)
        if last - died > LONGEST + (TIMEOUT if how == "hang" else 0):
            problems.append(f"the others ended {last - died:.0f} s later")
        checkpoints = Checkpoints(workspace / "saes" / "one" / "checkpoints")
        # The newest is written beside training: its writer may have died before it was whole.
        newest = step - step % CHECKPOINT_EVERY
        kept = checkpoints.steps()[-1] if checkpoints.steps() else 0
        if checkpoints.damaged() or kept not in (newest, newest - CHECKPOINT_EVERY):
            problems.append(f"checkpoints {checkpoints.steps()}, damaged {checkpoints.damaged()}")
        again = run(server, workspace, arguments, world)
        problems += [] if set(again.codes) == {0} else [f"then: {again.describe()}"]
        problems += [] if _weights(workspace) == expected else ["it went on to other weights"]
        tally.add(f"{how} of rank {rank} before step {step}", problems)
        shutil.rmtree(workspace)
    return tally


def _weights(workspace: Path) -> Any:
    run = workspace / "saes" / "one" / "run.json"
    return json.loads(run.read_text())["weights_sha256"] if run.is_file() else None


def _ended_together(several: Several, how: str, rank: int, step: int, world: int) -> list[str]:
    problems = []
    survivors = [code for number, code in enumerate(several.codes) if number != rank]
    if any(code != 4 for code in survivors):
        problems.append(f"exit codes {several.codes}")
    if len(several.lines) != 1 or f"rank {rank} of {world}" not in several.lines[0]:
        problems.append(f"said {several.lines}")
    if any(one.timed_out for number, one in enumerate(several.ended) if number != rank):
        problems.append("a process was still there after a minute")
    problems += ["a traceback" for one in several.ended if "Traceback" in one.err]
    return problems


def deaths(world: int, each: int, hows: tuple[str, ...] = HOWS) -> list[tuple[str, int, int]]:
    """Deaths of every kind, spread over ranks and steps."""
    return [
        (how, (number + place) % world, 1 + (number * 7 + place * 5) % (STEPS - 1))
        for place, how in enumerate(hows)
        for number in range(each)
    ]

"""SIGINT and SIGTERM in every phase of a command (C5), to whole process groups (C6), twice in a row (C7)."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import checks
from forked import Ended, Server
from stages import Stages
from tally import Tally

BOTH = (signal.SIGINT, signal.SIGTERM)
#: A stopped command has to be gone so many seconds after the signal.
LONGEST = 10.0


@dataclass(frozen=True)
class Phase:
    """A phase, the stage in which it is met, and the delays after a call of it that signals are sent with (seconds)."""

    name: str
    stage: str
    longest_delay: float = 0.0


PHASES = [
    Phase("model load", "collect", 0.02),
    Phase("tokenizing", "collect", 0.01),
    Phase("harvest", "collect"),
    Phase("norm estimate", "norms"),
    Phase("train step", "train grid"),
    Phase("evaluation", "train grid"),
    Phase("checkpoint write", "train grid", 0.02),
    Phase("finalise", "train grid", 0.01),
]


def signal_phases(
    server: Server,
    stages: Stages,
    folder: Path,
    phases: list[Phase],
    each: int,
    signums: Sequence[signal.Signals] = BOTH,
    **options: object,
) -> list[Tally]:
    """Each signal in each phase, `each` times, at calls that are spread over the phase."""
    tallies = []
    draw = random.Random(0)
    for phase in phases:
        for signum in signums:
            name = f"{signum.name} to its group" if options.get("threads") else signum.name
            tally = Tally(f"{name} during {phase.name}", phase.stage)
            prepared = stages.get(phase.stage)
            calls = sum(fields == (phase.name,) for fields in prepared.undisturbed.of("phase"))
            for number in range(each):
                wanted = {
                    "phase": phase.name,
                    "call": 1 + number * calls // each,
                    "delay": draw.uniform(0, phase.longest_delay) if number else 0.0,
                    "signum": int(signum),
                    "group": bool(options.get("threads")),
                }
                workspace = prepared.begin(folder)
                stopped = server.run(prepared.trial(workspace, signal=wanted, **options))
                problems = _stopped_well(stopped, signum, workspace, tally)
                problems += checks.half_files(prepared, workspace)
                problems += checks.leftovers(workspace)
                again, after = checks.run_again(server, prepared, workspace)
                if prepared.stage.resumes == "step" and stopped.code and again.code == 0:
                    twice = checks.work_done_twice(prepared, [stopped, again])
                    after += [f"{twice} steps were taken again"] if twice else []
                tally.add(f"call {wanted['call']} + {wanted['delay']:.3f} s", problems + after)
                shutil.rmtree(workspace)
            tallies.append(tally)
    return tallies


def _stopped_well(stopped: Ended, signum: signal.Signals, workspace: Path, tally: Tally) -> list[str]:
    """The exit code, in time, one line; and the checkpoint of the step at which training stopped."""
    sent = [moment for moment, kind, _ in stopped.events if kind == "signal"]
    if not sent:
        return [f"the signal was not sent: {stopped.describe()}"]
    seconds = stopped.ended - sent[0]
    tally.measure("seconds to the end", seconds)
    if stopped.code == 0:
        tally.counts["done before it was looked at"] += 1
        return []
    problems = checks.failed_in_one_line(stopped, 128 + signum)
    if seconds > LONGEST:
        problems.append(f"it took {seconds:.1f} s to stop")
    steps = [int(step) for step in stopped.work("step")]
    if steps:
        # A grid takes a step with every cell before it stops.
        expected = workspace.glob(f"saes/*/checkpoints/step-{max(steps) + 1}/files.json")
        if list(expected):
            tally.counts["with a checkpoint at the current step"] += 1
        else:
            problems.append(f"no checkpoint at the current step {max(steps) + 1}")
    return problems


def signal_twice(server: Server, stages: Stages, folder: Path, trials: int, seed: int = 0) -> Tally:
    """A second signal 0 to 200 ms after the first, while a checkpoint is being saved."""
    prepared = stages.get("train grid")
    tally = Tally("a second signal 0-200 ms after the first", prepared.stage.name)
    draw = random.Random(seed)
    calls = sum(fields == ("train step",) for fields in prepared.undisturbed.of("phase"))
    for _ in range(trials):
        first, second = draw.sample((signal.SIGINT, signal.SIGTERM, signal.SIGINT), 2)
        wanted = {
            "phase": "train step",
            "call": draw.randrange(1, calls),
            "signum": int(first),
            # Most saves of so small a run are over in 20 ms: half of the seconds come within that time.
            "second": {"after": draw.choice((draw.uniform(0, 0.02), draw.uniform(0, 0.2))), "signum": int(second)},
        }
        workspace = prepared.begin(folder)
        stopped = server.run(prepared.trial(workspace, signal=wanted))
        sent = [moment for moment, kind, _ in stopped.events if kind == "signal"]
        problems = []
        if len(sent) == 2:
            tally.counts["second signal met"] += 1
            tally.measure("seconds from the second signal to the end", stopped.ended - sent[1])
        # Which of the two it ends with depends on which came first to be looked at.
        if stopped.code not in (0, 128 + first, 128 + second):
            problems.append(f"not 130 or 143: {stopped.describe()}")
        problems += checks.half_files(prepared, workspace)
        again, after = checks.run_again(server, prepared, workspace)
        problems += after + checks.too_much_lost(prepared, [stopped, again])[1]
        tally.add(f"{wanted}", problems)
        shutil.rmtree(workspace)
    return tally

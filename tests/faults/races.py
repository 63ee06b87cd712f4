"""Two processes that are started on one folder within 10 ms (E9)."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import checks
from forked import Ended, Server
from stages import Prepared, Stages
from tally import Tally

#: The loser has to say so within this time (seconds).
LONGEST = 2.0


def race_for_one_folder(server: Server, prepared: Prepared, folder: Path, races: int, seed: int = 0) -> Tally:
    """The same command twice: one does the work, the other is told who does (exit 6) or finds it done (exit 0)."""
    tally = Tally("two processes, one folder", prepared.stage.name)
    draw = random.Random(seed)
    for number in range(races):
        workspace = prepared.begin(folder)
        apart = draw.uniform(0, 0.01)
        ended = server.run_together([prepared.trial(workspace), prepared.trial(workspace)], apart)
        codes = sorted(one.code for one in ended)
        problems = [] if codes == [0, 6] else [f"exit codes {codes}: {[one.describe() for one in ended]}"]
        for loser in (one for one in ended if one.code == 6):
            tally.counts["told that the folder is busy"] += 1
            tally.measure("seconds until the loser ended", loser.seconds)
            problems += _told_who(loser)
        problems += checks.differences(prepared, workspace)
        tally.add(f"race {number}, {apart * 1000:.1f} ms apart", problems)
        shutil.rmtree(workspace)
    return tally


def _told_who(loser: Ended) -> list[str]:
    problems = checks.failed_in_one_line(loser, 6)
    if loser.seconds > LONGEST:
        problems.append(f"the loser took {loser.seconds:.1f} s")
    if os.uname().nodename not in loser.last_line or "process" not in loser.last_line or "since" not in loser.last_line:
        problems.append(f"host, process or its start is not named: {loser.last_line}")
    return problems


def read_while_it_is_written(server: Server, stages: Stages, folder: Path, races: int, seed: int = 0) -> Tally:
    """Training begins on a store that is being collected: it is refused, or finds the complete store."""
    collect, train = stages.get("collect"), stages.get("train")
    tally = Tally("training on a store that is being collected", "collect, train")
    draw = random.Random(seed)
    for number in range(races):
        workspace = collect.begin(folder)
        apart = draw.uniform(0, 0.01)
        named = (train.arguments[0], "acts", *train.arguments[1:])
        trials = [collect.trial(workspace), train.trial(workspace)]
        trials[1] = type(trials[1])(workspace, named, trials[1].options)
        collected, trained = server.run_together(trials, apart)
        problems = [] if collected.code == 0 else [collected.describe()]
        if trained.code == 0:
            tally.counts["found it complete"] += 1
        elif trained.code in (2, 3, 6):
            tally.counts["refused"] += 1
            problems += checks.failed_in_one_line(trained, trained.code)
        else:
            problems.append(trained.describe())
        tally.measure("seconds until the reader ended", trained.seconds)
        again = server.run(trials[1])
        problems += [] if again.code == 0 else [f"then: {again.describe()}"]
        problems += checks.differences(train, workspace)
        tally.add(f"race {number}, {apart * 1000:.1f} ms apart", problems)
        shutil.rmtree(workspace)
    return tally

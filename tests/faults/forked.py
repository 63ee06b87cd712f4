"""Trials of `nsae` commands: each in a forked child, with a fault of its own, and what it left."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Trial:
    """A command and what is to befall it.

    Attributes:
        workspace: given to the command.
        arguments: of the command, without ``--workspace``.
        options: what `fault_child.run_trial` and `fault_server.serve_group` understand: fault, signal, kill_after,
            threads, clock, file_size, snapshots, timeout, …
    """

    workspace: Path
    arguments: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """A durable operation: its number from 1, its kind and the absolute paths that it concerns."""

    number: int
    kind: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Attributes:
        code: exit code; negative: the signal that killed the process.
        seconds: from the fork to the end.
        ended: when, on the clock of the events.
        out, err: what it printed.
        events: lines of the child's log: time, kind, fields.
    """

    code: int
    seconds: float
    ended: float
    timed_out: bool
    out: str
    err: str
    events: list[tuple[float, str, tuple[str, ...]]]

    @property
    def killed(self) -> bool:
        """Whether the process died of a fault or a kill, without a word of its own."""
        return self.code in (137, -9) and not self.timed_out

    @property
    def last_line(self) -> str:
        """The line on stderr that a failure ends with."""
        return self.err.splitlines()[-1] if self.err else ""

    def of(self, kind: str) -> list[tuple[str, ...]]:
        """The fields of all events of a kind."""
        return [fields for _, found, fields in self.events if found == kind]

    @property
    def operations(self) -> list[Operation]:
        """The durable operations that the process began, in order."""
        return [Operation(int(number), kind, tuple(paths)) for number, kind, *paths in self.of("operation")]

    @property
    def faulted(self) -> bool:
        """Whether the trial's fault was met."""
        return bool(self.of("fault"))

    def work(self, kind: str) -> list[str]:
        """Which steps or shards were begun."""
        return [fields[0] for fields in self.of(kind)]

    def describe(self) -> str:
        """For the message of a failed check."""
        tail = " | ".join(self.err.splitlines()[-3:])
        return f"code {self.code}, fault {self.of('fault')}, stderr: {tail}"


class Server:
    """The process that forks trials; a context manager.

    Args:
        folder: for what children print and log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE / "fault_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of trials died with code {self._process.wait()}")
        return json.loads(answer)

    def run(self, trial: Trial) -> Ended:
        """Runs one trial to its end."""
        return self.run_together([trial])[0]

    def run_together(self, trials: list[Trial], apart: float = 0.0) -> list[Ended]:
        """Runs trials that begin `apart` seconds one after the other."""
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            requests = []
            for number, trial in enumerate(trials):
                own = Path(scratch) / f"{number}"
                own.mkdir()
                requests.append(
                    {
                        "workspace": str(trial.workspace),
                        "arguments": list(trial.arguments),
                        "scratch": str(own),
                        "after": apart,
                    }
                    | trial.options
                )
            answers = self._ask({"trials": requests})
            return [_ended(answer, Path(request["scratch"])) for answer, request in zip(answers, requests, strict=True)]

    def warm_up(self, trial: Trial) -> None:
        """Runs a command and imports here what it imported: later trials find it loaded."""
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            request = {"workspace": str(trial.workspace), "arguments": list(trial.arguments), "scratch": scratch}
            [answer] = self._ask({"trials": [request | trial.options | {"list_modules": True, "timeout": 180}]})
            ended = _ended(answer, Path(scratch))
            assert ended.code == 0, ended.describe()
            threads = self._ask({"preload": (Path(scratch) / "modules").read_text().splitlines()})["threads"]
        assert threads == 1, f"importing has left {threads} threads in the server: a fork would lose them"


def _ended(answer: dict[str, Any], scratch: Path) -> Ended:
    def text(name: str) -> str:
        path = scratch / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    events = []
    for line in text("events").splitlines():
        moment, kind, *fields = line.split("\t")
        events.append((float(moment), kind, tuple(fields)))
    return Ended(
        code=answer["code"],
        seconds=answer["seconds"],
        ended=answer["ended"],
        timed_out=answer.get("timed_out", False),
        out=text("out"),
        err=text("err"),
        events=events,
    )


def fresh(folder: Path, counter: itertools.count[int] = itertools.count()) -> Path:
    """A path in `folder` that nothing has been written to."""
    return folder / f"w{next(counter)}"

"""Running `nsae` inside the test's own process, and the contract that every failure keeps."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsae_cli import interrupt
from nsae_cli.cli import app

#: A grid of two SAEs that trains in about a second.
TRAIN = ("train", "--act", "relu,tanh-relu", "--d-sae", "96", "--batch-size", "256", "--tokens", "40k")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and everything that it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def message(self) -> str:
        """The line that a failure ends with, without ``nsae: ``; the contract is checked on the way."""
        lines = self.err.splitlines()
        assert self.code != 0
        assert self.out == ""
        assert [line.startswith("nsae: ") for line in lines].count(True) == 1, self.err
        assert lines[-1].startswith("nsae: "), self.err
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("nsae: ")


def nsae(*arguments: object) -> Outcome:
    """Runs a command as the console script does, signals and the process's end aside."""
    interrupt.clear()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app.invoke([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path, but for what may differ between equal runs."""
    passing = ("timings.jsonl", "verified.jsonl")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in passing
    }

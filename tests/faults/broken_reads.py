"""Reads that the disk refuses (EIO, E5): the command says so and takes nothing for damaged that may be whole.

The system call itself is made to fail, by strace, in a process of its own. Where strace cannot do that, nothing is
tried: counted as such.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import checks
from forked import Ended
from stages import SHARD_ROWS, Prepared
from tally import Tally

_MAIN = f"from nsae_cli.lm import plan; plan.MAX_SHARD_ROWS = {SHARD_ROWS}; from nsae_cli.cli.app import main; main()"


@dataclass(frozen=True)
class Read:
    """A file whose n-th read fails, and by which system call it is read."""

    file: str
    call: str
    number: int = 1


def can_inject() -> bool:
    """Whether strace is here and may trace."""
    if shutil.which("strace") is None:
        return False
    command = ["strace", "-qq", "-o", os.devnull, "-e", "inject=openat:error=EIO:when=9999", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fail_reads(prepared: Prepared, start: Path, folder: Path, reads: list[Read]) -> Tally:
    """The command on a copy of `start` with a read that fails: exit 4, naming the file, and nothing is changed."""
    tally = Tally("a read fails (EIO)", prepared.stage.name)
    if not can_inject():
        tally.counts["strace cannot inject errors here: not tried"] += len(reads)
        return tally
    for number, read in enumerate(reads):
        workspace = folder / f"read{number}"
        shutil.copytree(start, workspace)
        [path] = workspace.glob(read.file)
        before = {file: file.read_bytes() for file in workspace.rglob("*") if file.is_file()}
        inject = f"inject={read.call}:error=EIO:when={read.number}"
        trace = folder / "trace"
        command = ["strace", "-f", "-qq", "-o", str(trace), "-P", str(path), "-e", "trace=pread64,read", "-e", inject]
        done = subprocess.run(
            [*command, sys.executable, "-c", _MAIN, "--workspace", str(workspace), *prepared.arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        ended = Ended(done.returncode, 0.0, 0.0, False, done.stdout, done.stderr, [])
        problems = [] if "(INJECTED)" in trace.read_text() else ["the read was not met"]
        problems += checks.failed_in_one_line(ended, 4)
        if path.name not in ended.last_line or "nput/output error" not in ended.last_line:
            problems.append(f"it does not say what is wrong: {ended.last_line}")
        for file, content in before.items():
            name = file.relative_to(workspace).as_posix()
            if file.name in checks.PASSING or checks.is_temporary(name):
                continue
            if not file.is_file() or file.read_bytes() != content:
                problems.append(f"{name} is gone or changed")
        tally.add(f"{read}", problems)
        shutil.rmtree(workspace)
    return tally

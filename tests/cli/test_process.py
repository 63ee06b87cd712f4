"""What only a process of its own can show: signals, closed and full outputs, limits, the exit code itself."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command import TRAIN, contents, nsae

_MAIN = "from nsae_cli.cli.app import main; main()"


def run(
    *arguments: object,
    code: str = _MAIN,
    shell: str = "",
    limit: Callable[[], None] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `code` as the process of the `nsae` command; `shell` is what follows it on a shell's line."""
    words = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    line = ["bash", "-c", f'"$@" {shell}', "bash", *words] if shell else words
    return subprocess.run(
        line, capture_output=True, text=True, check=False, env=os.environ | environment, preexec_fn=limit, timeout=120
    )  # fmt: skip


def test_reader_that_goes_away(finished: Path) -> None:
    done = run("--workspace", finished, "list", shell="| head -1; exit ${PIPESTATUS[0]}")
    assert done.returncode == 0
    assert done.stdout.startswith("kind")
    assert done.stderr == f"workspace: {finished}\n"
    help_only = run("train", "--help", shell="| true; exit ${PIPESTATUS[0]}")
    assert (help_only.returncode, help_only.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_outputs(finished: Path) -> None:
    done = run("--workspace", finished, "-q", "--json", "list", shell="> /dev/full")
    assert done.returncode == 4
    assert done.stderr.startswith("nsae: the result could not be written to stdout (No space left on device)")
    assert done.stderr.count("\n") == 1
    assert run("--help", shell="> /dev/full").returncode == 4
    assert run("frobnicate", shell="2> /dev/full").returncode == 2


def test_closed_outputs() -> None:
    assert run("train", "--help", shell=">&-").returncode == 0
    assert run("train", "--help", shell="2>&-").stdout.startswith("Usage: nsae train")
    assert run("frobnicate", shell="2>&- >&- <&-").returncode == 2


def test_terminal_of_another_encoding() -> None:
    code = "from nsae_cli.cli import app, console; app._repair_standard_streams(); console.print_text('‖x‖ → 5')"
    done = run(code=code, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout) == (0, "\\u2016x\\u2016 \\u2192 5\n"), done.stderr


_INTERRUPTED_TRAINING = """
import os, signal
from nsae_cli.training import cell
step = cell.Cell.train_step
def train_step(self, rows, number):
    if number == 100 and self.config.act == "relu":
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, rows, number)
cell.Cell.train_step = train_step
"""


def test_interrupted_training_goes_on_to_the_same_bytes(finished: Path, workspace: Path) -> None:
    command = (*TRAIN, "--device", "cpu")
    [group] = (finished / "saes").iterdir()
    begun = workspace / "saes" / group.name
    begun.rename(workspace / "away")
    done = run("--workspace", workspace, *command, code=_INTERRUPTED_TRAINING + _MAIN)
    assert done.returncode == 130
    message = "nsae: stopped at step 101 of 156, checkpoint saved; run the same command to go on"
    assert done.stderr.splitlines()[-1] == message
    assert done.stdout == ""
    assert (begun / "checkpoints" / "step-101" / "files.json").is_file()
    assert not list(begun.glob("L*/run.json"))
    again = nsae("--workspace", workspace, *command)
    assert again.code == 0
    assert "going on from the checkpoint at step 101" in again.err
    assert contents(begun) == contents(finished / "saes" / group.name)


_SMALL_SHARDS = """
import os, signal
from nsae_cli.lm import plan
plan.MAX_SHARD_ROWS = 4096
"""
_INTERRUPTED_COLLECTION = (
    _SMALL_SHARDS
    + """
from nsae_cli.store.writer import StoreWriter
write = StoreWriter.write
def interrupted(self, index, *rest, **named):
    write(self, index, *rest, **named)
    if index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
StoreWriter.write = interrupted
"""
)


def test_interrupted_collection_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("collect", "--model", "mini", "--tokens", "14k", "--device", "cpu", "--name", "s")
    done = run("--workspace", tmp_path / "cut", *command, code=_INTERRUPTED_COLLECTION + _MAIN)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1].startswith("nsae: stopped; 2 shards of s are on disk")
    monkeypatch.setattr("nsae_cli.lm.plan.MAX_SHARD_ROWS", 4096)
    again = nsae("--workspace", tmp_path / "cut", *command)
    assert again.code == 0
    assert "going on after 8,192 rows in 2 shards" in again.err
    assert nsae("--workspace", tmp_path / "whole", *command).code == 0
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "cut") == whole
    assert len([name for name in whole if name.endswith(".safetensors")]) == 4


def test_file_size_limit(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = ("--workspace", tmp_path, "collect", "--model", "mini", "--tokens", "4k", "--device", "cpu")
    done = run(*command, limit=limit)
    assert done.returncode == 4
    assert "file size limit" in done.stderr.splitlines()[-1]
    assert "ulimit -f" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("manifest.json"))


def test_second_signal_ends_at_once() -> None:
    code = "import os, signal; from nsae_cli import interrupt; interrupt.install_handlers()\n" + (
        "os.kill(os.getpid(), signal.SIGINT); assert interrupt.stop_requested() == 2\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('still there')"
    )
    done = run(code=code)
    assert (done.returncode, done.stdout) == (143, "")

"""`nsae collect` where the machine is not enough: it says so before the model is loaded, and leaves nothing behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Outcome, contents, nsae

_MAIN = "from nsae_cli.cli.app import main; main()"
#: Ends the process with a code of its own as soon as weights are loaded.
_NO_MODEL = "import os; from nsae_cli.lm import collect; collect.load_model = lambda *a, **k: os._exit(99)"
_NO_TOKENIZER = "import os; from nsae_cli.lm import collect; collect.load_tokenizer_for = lambda *a, **k: os._exit(98)"
COLLECT = ("collect", "--model", "mini", "--tokens", "4k", "--device", "cpu", "--name", "s")


def process(*arguments: object, code: str = "", limit: Callable[[], None] | None = None) -> Outcome:
    """`nsae` as a process of its own, after `code`."""
    words = [sys.executable, "-c", f"{code}\n{_MAIN}", *(str(argument) for argument in arguments)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=dict(os.environ), preexec_fn=limit, timeout=120
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


_LITTLE_DISK = """
import shutil
ask = shutil.disk_usage
shutil.disk_usage = lambda path: ask(path)._replace(free=300_000)
"""


def test_disk_that_is_known_to_be_too_small(tmp_path: Path) -> None:
    refused = process("--workspace", tmp_path / "runs", *COLLECT, code=_LITTLE_DISK + _NO_MODEL)
    assert refused.code == 4
    assert "the store needs" in refused.message
    assert "300.0 kB are free" in refused.message
    assert "--workspace" in refused.message
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_folder_that_cannot_be_written() -> None:
    # No file can be made there, not even by the superuser.
    refused = process("--workspace", "/proc/nsae/runs", *COLLECT, code=f"{_NO_MODEL}\n{_NO_TOKENIZER}")
    assert refused.code == 4
    assert "write in /proc" in refused.message
    assert "--workspace" in refused.message


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become another user")
def test_folder_of_another_user(tmp_path: Path) -> None:
    # The process gives its rights away once everything is imported: the interpreter may lie where only root reads.
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o755)
    drop = f"""
import os
{_NO_MODEL}
{_NO_TOKENIZER}
from nsae_cli.lm import collect as used
require = used.require_writable
def require_writable(folder):
    os.seteuid(65534)
    require(folder)
used.require_writable = require_writable
"""
    refused = process("--workspace", runs, *COLLECT, code=drop)
    assert refused.code == 4
    assert "no permission to write in" in refused.message


def test_complete_store_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    assert nsae("--workspace", runs, *COLLECT).code == 0

    def refuse(folder: Path) -> None:
        raise AssertionError(f"{folder} is only read")

    monkeypatch.setattr("nsae_cli.lm.collect.require_writable", refuse)
    again = nsae("--workspace", runs, *COLLECT)
    assert again.code == 0
    assert "already complete" in again.err


@pytest.mark.parametrize("most", [16, 32])
def test_few_open_files(tmp_path: Path, most: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    limited = process("--workspace", tmp_path / "limited", *COLLECT, limit=limit)
    assert limited.code in (0, 4), limited.err
    if limited.code:
        assert "open files" in limited.message
    assert nsae("--workspace", tmp_path / "limited", *COLLECT).code == 0
    assert nsae("--workspace", tmp_path / "free", *COLLECT).code == 0
    assert contents(tmp_path / "limited") == contents(tmp_path / "free")


def test_refusal_comes_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    started = time.monotonic()
    refused = process("--workspace", tmp_path / "file/runs", *COLLECT)
    assert refused.code == 4
    assert "is a file, not a folder" in refused.message
    assert time.monotonic() - started < 10  # two seconds where nothing else runs

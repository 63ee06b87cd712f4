"""One process at a time writes into a folder, and a lock outlives nobody."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from command import nsae
from hand_store import make_rows, write_full
from listener import Listener
from nsae_cli.errors import BusyError, ResourceError
from nsae_cli.reporter import SilentReporter
from nsae_cli.store import lock

_HOLD = """
import sys, time
from pathlib import Path
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.lock import writing
with writing(Path(sys.argv[1]), SilentReporter()):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_elsewhere(folder: Path):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def say(path: Path, **changes: object) -> None:
    holder = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "2026-01-02 03:04:05"}
    path.write_text(json.dumps(holder | changes))


def test_the_lock_is_beside_the_folder_and_gone_afterwards(tmp_path):
    with lock.writing(tmp_path / "saes" / "a", SilentReporter()):
        assert [path.name for path in (tmp_path / "saes").iterdir()] == [".a.lock"]
        holder = json.loads((tmp_path / "saes" / ".a.lock").read_text())
        assert holder["pid"] == os.getpid()
        with lock.writing(tmp_path / "saes" / "b", SilentReporter()):
            pass
    assert not (tmp_path / "saes").exists()


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    with held_elsewhere(tmp_path / "a") as process, pytest.raises(BusyError) as raised:
        lock.writing(tmp_path / "a", SilentReporter()).__enter__()
    assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(raised.value)


def test_not_even_break_lock_drives_out_a_writer_of_this_machine(tmp_path):
    with held_elsewhere(tmp_path / "a"), pytest.raises(BusyError, match="wait until it has ended"):
        lock.writing(tmp_path / "a", SilentReporter(), break_lock=True).__enter__()


def test_the_command_line_says_busy_with_exit_code_6(tmp_path):
    write_full(tmp_path / "activations" / "s", make_rows(5), [16, 16, 8])
    with held_elsewhere(tmp_path / "norms" / "s"):
        outcome = nsae("--workspace", tmp_path, "norms", "s")
    assert outcome.code == 6
    assert "s is being written by process" in outcome.message
    assert not (tmp_path / "norms" / "s").exists()
    assert nsae("--workspace", tmp_path, "norms", "s").code == 0
    assert sorted(path.name for path in (tmp_path / "norms").iterdir()) == ["s"]


def test_the_lock_of_a_killed_process_is_taken_over_with_one_warning(tmp_path):
    with held_elsewhere(tmp_path / "a") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".a.lock").exists()
        listener = Listener()
        with lock.writing(tmp_path / "a", listener):
            pass
    [warning] = listener.warnings
    assert f"process {process.pid} on" in warning
    assert not (tmp_path / ".a.lock").exists()


@pytest.mark.parametrize("pid", [os.getpid(), 1, 2**22 + 1], ids=["this", "reused", "dead"])
def test_a_name_that_nobody_locks_is_stale_whatever_its_process_number(tmp_path, pid):
    say(tmp_path / ".a.lock", pid=pid)
    listener = Listener()
    with lock.writing(tmp_path / "a", listener):
        pass
    assert len(listener.warnings) == 1


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 3}', '{"pid": "x", "host": "h", "started": ""}'])
def test_a_lock_file_that_says_nothing_is_no_obstacle(tmp_path, content):
    (tmp_path / ".a.lock").write_text(content)
    with lock.writing(tmp_path / "a", SilentReporter()):
        pass
    assert not (tmp_path / ".a.lock").exists()


def test_a_lock_of_another_machine_needs_a_word(tmp_path):
    write_full(tmp_path / "activations" / "s", make_rows(5), [16, 16, 8])
    (tmp_path / "norms").mkdir()
    say(tmp_path / "norms" / ".s.lock", host="node17")
    refused = nsae("--workspace", tmp_path, "norms", "s")
    assert refused.code == 6
    assert "process 4194305 on node17, since 2026-01-02 03:04:05" in refused.message
    assert "nsae --break-lock" in refused.message
    assert nsae("--workspace", tmp_path, "norms", "s", "--break-lock").message.startswith("--break-lock stands before")
    allowed = nsae("--workspace", tmp_path, "--break-lock", "norms", "s")
    assert allowed.code == 0
    assert "warning: the lock of s was broken: process 4194305 on node17" in allowed.err


def test_without_kernel_locks_the_process_number_decides(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    say(tmp_path / ".a.lock", pid=os.getpid())
    with pytest.raises(BusyError, match="--break-lock"):
        lock.writing(tmp_path / "a", SilentReporter()).__enter__()
    say(tmp_path / ".a.lock")
    with lock.writing(tmp_path / "a", SilentReporter()), pytest.raises(BusyError):
        lock.writing(tmp_path / "a", SilentReporter()).__enter__()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / ".a.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError):
        lock.writing(tmp_path / "a", SilentReporter()).__enter__()
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_never_two_inside_however_often_the_file_comes_and_goes(tmp_path):
    """Taking, removing and taking again by many at once: the lock of a removed file must not count."""
    inside, most, entered = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        for _ in range(200):
            with contextlib.suppress(BusyError), lock.writing(tmp_path / "a", SilentReporter()):
                with guard:
                    inside[0] += 1
                    entered[0] += 1
                    most[0] = max(most[0], inside[0])
                with guard:
                    inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert entered[0] >= 200
    assert not list(tmp_path.iterdir())

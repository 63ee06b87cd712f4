"""Locks of workers that share a folder: one of each number, all of one job, and nobody who works alone beside them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from listener import Listener
from nsae_cli import interrupt
from nsae_cli.errors import BusyError, Interrupted, UsageError
from nsae_cli.launch import ALONE, Placement
from nsae_cli.store import lock
from nsae_cli.store.lock_file import State, lock_path, turn_path

_HOLD = """
import sys, time
from pathlib import Path
from nsae_cli.launch import Placement
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.lock import writing
rank, world = map(int, sys.argv[2].split("/"))
with writing(Path(sys.argv[1]), SilentReporter(), worker=Placement(rank, world), software={"torch": "2"}) as turn:
    taken = turn.taken()
    if len(sys.argv) > 3:
        taken.__enter__()
    print("held", flush=True)
    time.sleep(60)
"""


def hold(
    folder: Path, worker: str, listener: Listener | None = None, *, break_lock: bool = False, torch: str = "2"
) -> contextlib.AbstractContextManager[lock.Turn]:
    place = Placement(*map(int, worker.split("/")))
    return lock.writing(folder, listener or Listener(), worker=place, break_lock=break_lock, software={"torch": torch})


@contextlib.contextmanager
def held_elsewhere(folder: Path, worker: str, *turn: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), worker, *turn], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def leave(path: Path, **changes: object) -> None:
    holder = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "2026-01-02 03:04:05"}
    path.write_text(json.dumps(holder | {"software": {"torch": "2"}} | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_workers_of_one_job_write_side_by_side(tmp_path):
    with hold(tmp_path / "a", "0/2"), hold(tmp_path / "a", "1/2") as turn:
        assert names(tmp_path) == [".a.lock-0-of-2", ".a.lock-1-of-2"]
        with turn.taken():
            assert turn.others() == {0: State.HELD}
            assert turn_path(tmp_path / "a").exists()
    assert names(tmp_path) == []


@pytest.mark.parametrize("other", ["0/2", "0/3", "2/3", "0/1"])
def test_a_second_job_and_a_second_of_one_number_are_refused(tmp_path, other):
    with hold(tmp_path / "a", "0/2"), pytest.raises(BusyError, match=rf"process {os.getpid()} on .*wait until it"):
        hold(tmp_path / "a", other, break_lock=True).__enter__()
    with hold(tmp_path / "a", other):
        pass
    assert names(tmp_path) == []


def test_a_worker_is_refused_where_somebody_works_alone(tmp_path):
    with lock.writing(tmp_path / "a", Listener()), pytest.raises(BusyError):
        hold(tmp_path / "a", "0/2").__enter__()
    assert names(tmp_path) == []


def test_other_artifacts_are_not_looked_at(tmp_path):
    with hold(tmp_path / "a", "0/2"), hold(tmp_path / "a.lock-0", "0/3"), lock.writing(tmp_path / "a.lock", Listener()):
        pass


def test_other_software_is_refused_by_name(tmp_path):
    with hold(tmp_path / "a", "0/2"), pytest.raises(UsageError, match=r"worker 0/2 has .*\(torch 2, here 3\)"):
        hold(tmp_path / "a", "1/2", torch="3").__enter__()
    assert names(tmp_path) == []


@pytest.mark.parametrize("next_one", ["0/2", "1/2", "2/5", "0/1"])
def test_what_a_killed_worker_left_is_taken_over_by_whoever_comes_first(tmp_path, next_one):
    with held_elsewhere(tmp_path / "a", "1/2", "in its turn") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert names(tmp_path) == [".a.lock-1-of-2", ".a.lock-all"]
        listener = Listener()
        with hold(tmp_path / "a", next_one, listener):
            pass
    [warning] = listener.warnings
    assert f"process {process.pid} on" in warning
    assert names(tmp_path) == []


def test_one_that_dies_is_told_from_one_that_works_and_one_that_never_came(tmp_path):
    with hold(tmp_path / "a", "0/4") as turn, held_elsewhere(tmp_path / "a", "2/4") as process:
        with turn.taken():
            assert turn.others() == {2: State.HELD}
        process.send_signal(signal.SIGKILL)
        process.wait()
        with turn.taken():
            assert turn.others() == {2: State.LEFT}


def test_a_worker_of_another_machine(tmp_path):
    """Of the same job it is at work, for all that is known; of another job it needs a word."""
    leave(tmp_path / ".a.lock-1-of-2", host="node17")
    with hold(tmp_path / "a", "0/2") as turn, turn.taken():
        assert turn.others() == {1: State.FOREIGN}
    for other in ("0/3", "0/1", "1/2"):
        with pytest.raises(BusyError, match=r"on node17.*nsae --break-lock"):
            hold(tmp_path / "a", other).__enter__()
    listener = Listener()
    with hold(tmp_path / "a", "0/3", listener, break_lock=True):
        pass
    assert listener.warnings == ["the lock of a was broken: process 4194305 on node17, since 2026-01-02 03:04:05"]
    assert names(tmp_path) == []


def test_locks_of_a_complete_artifact_are_removed(tmp_path):
    leave(tmp_path / ".a.lock-1-of-2")
    leave(tmp_path / ".a.lock")
    turn_path(tmp_path / "a").write_text("")
    leave(tmp_path / ".a.lock-0-of-2", host="node17")
    leave(tmp_path / ".b.lock-0-of-2")
    lock.remove_abandoned(tmp_path / "a")
    assert names(tmp_path) == [".a.lock-0-of-2", ".b.lock-0-of-2"]


def test_one_at_a_time_has_its_turn(tmp_path):
    inside, most = [0], [0]

    def work(rank: int) -> None:
        for _ in range(30):
            with hold(tmp_path / "a", f"{rank}/4") as turn, turn.taken():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert names(tmp_path) == []


def test_waiting_for_ones_turn_ends_with_a_signal(tmp_path, monkeypatch):
    with held_elsewhere(tmp_path / "a", "0/2", "in its turn"):
        begun = time.monotonic()
        monkeypatch.setattr(interrupt, "_signum", 15)
        with pytest.raises(Interrupted, match="the same command goes on"):
            hold(tmp_path / "a", "1/2").__enter__()
        assert time.monotonic() - begun < 5


def test_alone_there_is_no_turn(tmp_path):
    with lock.writing(tmp_path / "a", Listener()) as turn, turn.taken():
        assert turn.others() == {}
        assert names(tmp_path) == [lock_path(tmp_path / "a", ALONE).name]

"""What one of several workers reads, says and computes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from tiny_gpt2 import RecordingReporter

from nsae_cli.launch import ALONE, Placement
from nsae_cli.lm.ahead import ahead
from nsae_cli.lm.shares import Share, WorkerReporter, device_of, last_word, rows_of_share


def test_a_share_is_whole_shards_and_counts_everything() -> None:
    shares = [Share(range(23), 4, Placement(rank, 3).owns) for rank in range(3)]  # type: ignore[arg-type]
    taken = [list(share) for share in shares]
    assert taken[1] == [4, 5, 6, 7, 16, 17, 18, 19]
    assert taken[2] == [8, 9, 10, 11, 20, 21, 22]
    assert sorted(item for one in taken for item in one) == list(range(23))
    assert {(share.seen, share.shards) for share in shares} == {(23, 6)}


def test_rows_of_shares_add_up() -> None:
    rows = [rows_of_share(1000, 64, Placement(rank, 5).owns) for rank in range(5)]
    assert sum(rows) == 1000
    assert rows[0] == 3 * 64 + 1000 - 15 * 64  # shards 0, 5, 10 and the short 15


def test_worker_zero_speaks_and_all_warn() -> None:
    inner = [RecordingReporter(), RecordingReporter()]
    for rank, one in enumerate(inner):
        reporter = WorkerReporter(one, Placement(rank, 2))
        reporter.note("begun")
        reporter.warn("odd")
        with reporter.task("collect", 5, "rows") as task:
            task.advance(3)
        last_word(reporter, "done")
    assert (inner[0].notes[0], inner[0].advanced) == ("begun", 3)
    assert ("begun" in inner[1].notes, inner[1].advanced) == (False, 0)
    assert "worker 1/2: done" in inner[1].notes


@pytest.mark.parametrize(
    ("worker", "devices", "expected"),
    [
        (Placement(5, 8, 1), 4, "cuda:1"),
        (Placement(5, 8, 5), 4, "cuda:1"),  # more workers than GPUs
        (Placement(5, 8, 3), 1, "cuda:0"),  # the launcher shows each its own only
        (ALONE, 4, "cuda"),
    ],
)
def test_auto_gives_each_worker_a_gpu(
    worker: Placement, devices: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr("nsae_cli.device._describe", lambda device: f"{device} X")
    device, reason = device_of("auto", worker)
    assert str(device) == expected
    assert "--device auto" in reason
    assert device_of("cpu", worker)[0].type == "cpu"


def test_ahead_keeps_the_order_and_stays_near() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    items = ahead(numbers(), 64)
    assert [next(items) for _ in range(10)] == list(range(10))
    time.sleep(0.3)
    assert 64 <= len(made) <= 64 + 4 * 32
    assert list(items) == list(range(10, 1000))


def test_ahead_raises_where_the_item_would_have_come() -> None:
    def numbers() -> Iterator[int]:
        yield from range(40)
        raise ValueError("no more")

    items, got = ahead(numbers(), 8), []
    with pytest.raises(ValueError, match="no more"):
        got.extend(items)
    assert got == list(range(40))
    assert not any(thread.name == "nsae-ahead" for thread in threading.enumerate())


def test_a_reader_that_gives_up_ends_the_thread() -> None:
    items = ahead(iter(range(10**9)), 8)
    next(items)
    assert any(thread.name == "nsae-ahead" for thread in threading.enumerate())
    items.close()
    assert not any(thread.name == "nsae-ahead" for thread in threading.enumerate())

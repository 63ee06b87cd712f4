"""What `--log-to` sends: the records of metrics.jsonl by name, once each, and never at training's expense."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from listener import Listener
from nsae_cli.training import tracker_kinds, trackers
from nsae_cli.training.trackers import Followed, Trackers, run_ids, series


class Memory:
    """A tracker that remembers; one per SAE."""

    opened: list[Memory]

    def __init__(self, followed: Followed, known: int = 0) -> None:
        self.followed, self.known, self.where = followed, known, "in memory"
        self.got: list[tuple[int, Mapping[str, float]]] = []
        self.closed: bool | None = None
        self.opened.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.got.append((step, values))

    def close(self, finished: bool) -> None:
        self.closed = finished


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    Memory.opened = []
    monkeypatch.setitem(tracker_kinds.KINDS, "wandb", Memory)
    monkeypatch.setitem(tracker_kinds.KINDS, "trackio", Memory)
    return Memory


def test_series_of_a_record() -> None:
    shares = dict.fromkeys(("sinks", *(f"b{i}" for i in range(10))))
    record = {
        "step": 7,
        "tokens": 1792,
        "loss": 1.5,
        "nbi": None,
        "loss_share": {**shares, "sinks": 0.75, "b3": 0.25},
        "bias_ratio": [3.0, *[None] * 9, 0.5],
        "grad_share": {"W_enc": {"b9": 0.125}},
        "probe": None,
    }
    assert series(record) == {
        "tokens": 1792.0,
        "loss": 1.5,
        "loss_share/sinks": 0.75,
        "loss_share/b3": 0.25,
        "bias_ratio/sinks": 3.0,
        "bias_ratio/b9": 0.5,
        "grad_share/W_enc/b9": 0.125,
    }


def test_ids_stay_and_only_new_ones_are_made() -> None:
    first = run_ids(["wandb"], ["a", "b"], None)
    assert len({*first["wandb"].values()}) == 2
    later = run_ids(["wandb", "trackio"], ["a", "b"], first)
    assert later["wandb"] == first["wandb"]
    assert set(later["trackio"]) == {"a", "b"}
    assert run_ids([], ["a"], first) == first


def _log(*steps: int) -> bytes:
    return b"".join(b'{"step": %d, "loss": %d.5}\n' % (step, step) for step in steps)


def test_every_sae_is_a_run_of_its_own_and_gets_its_records_in_order(memory: type[Memory], tmp_path: Path) -> None:
    remarks = Listener()
    with Trackers(["wandb", "trackio"], "g", tmp_path, remarks) as feed:  # type: ignore[arg-type]
        ids = feed.begin(["a", "b"], None)
        take = {cell: feed.follow(cell, f"g/{cell}", {"lr": 1.0}, 0, b"") for cell in ("a", "b")}
        for step in (1, 2):
            for cell, scale in (("a", 1.0), ("b", 10.0)):
                take[cell]({"step": step, "loss": scale * step})
        feed.leave("a")
    by_name = {(run.followed.name, run.followed.id): run for run in memory.opened}
    assert len(by_name) == 4
    for tracker in ("wandb", "trackio"):
        a, b = by_name["g/a", ids[tracker]["a"]], by_name["g/b", ids[tracker]["b"]]
        assert (a.got, a.closed) == ([(1, {"loss": 1.0}), (2, {"loss": 2.0})], True)
        assert (b.got, b.closed) == ([(1, {"loss": 10.0}), (2, {"loss": 20.0})], False)
        assert (a.followed.group, a.followed.again, a.followed.config) == ("g", False, {"lr": 1.0})
    assert remarks.notes == ["wandb: in memory", "trackio: in memory"]
    assert remarks.warnings == []


@pytest.mark.parametrize(("known", "sent"), [(0, [2, 4, 5]), (2, [4, 5]), (5, []), (4, [5])])
def test_going_on_sends_what_the_tracker_lacks_and_no_step_twice(
    memory: type[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int, sent: list[int]
) -> None:
    monkeypatch.setitem(tracker_kinds.KINDS, "wandb", lambda followed: Memory(followed, known))
    with Trackers(["wandb"], "g", tmp_path, Listener()) as feed:
        assert feed.begin(["g"], {"wandb": {"g": "x1"}}) == {"wandb": {"g": "x1"}}
        take = feed.follow("g", "g", {}, 4, _log(2, 4))
        take({"step": 5, "loss": 5.5})
    [run] = memory.opened
    assert run.got == [(step, {"loss": step + 0.5}) for step in sent]
    assert (run.followed.again, run.followed.id, run.followed.step) == (True, "x1", 4)


def test_an_error_is_one_warning_and_the_other_tracker_goes_on(
    memory: type[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Memory):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            if step == 2:
                raise OSError("quota\nexceeded")
            super().log(step, values)

    monkeypatch.setitem(tracker_kinds.KINDS, "wandb", Failing)
    remarks = Listener()
    with Trackers(["wandb", "trackio"], "g", tmp_path, remarks) as feed:  # type: ignore[arg-type]
        feed.begin(["g"], None)
        take = feed.follow("g", "g", {}, 0, b"")
        for step in range(1, 6):
            take({"step": step})
        feed.leave("g")
    assert remarks.warnings == ["--log-to wandb: quota exceeded; going on without it, metrics.jsonl has every line"]
    assert [[step for step, _ in run.got] for run in memory.opened] == [[1], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("where", ["open", "log"])
def test_one_that_hangs_costs_training_nothing(
    memory: type[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    release = threading.Event()

    class Hanging(Memory):
        def __init__(self, followed: Followed) -> None:
            if where == "open":
                release.wait(30)
            super().__init__(followed)

        def log(self, step: int, values: Mapping[str, float]) -> None:
            release.wait(30)

    monkeypatch.setitem(tracker_kinds.KINDS, "wandb", Hanging)
    monkeypatch.setattr(trackers, "_PATIENCE", 0.05)
    remarks = Listener()
    started = time.monotonic()
    with Trackers(["wandb"], "g", tmp_path, remarks) as feed:  # type: ignore[arg-type]
        feed.begin(["g"], None)
        take = feed.follow("g", "g", {}, 0, b"")
        for step in range(1, 1001):
            take({"step": step})
        assert time.monotonic() - started < 5
    assert time.monotonic() - started < 5
    [warning] = remarks.warnings
    assert warning.startswith("wandb has not taken everything after 0.05 s and is left behind")
    release.set()
    feed._thread.join(30)


def test_none_starts_no_thread(tmp_path: Path) -> None:
    with Trackers([], "g", tmp_path, Listener()) as feed:
        assert feed.begin(["g"], None) == {}
        feed.follow("g", "g", {}, 0, _log(1))({"step": 2})
        feed.leave("g")
        assert not feed._thread.is_alive()


def followed(tmp_path: Path, **changes: Any) -> Followed:
    """A first following of g/a."""
    given = {"name": "g/a", "group": "g", "id": "a1b2c3d4e5f60718", "again": False, "step": 0, "workspace": tmp_path}
    return Followed(**{**given, "config": {"act": "relu", "lr": 1e-3, "k": None}, **changes})

"""Trackers of experiments that are fed beside metrics.jsonl, with the same records: `--log-to`.

A tracker sees what was trained and changes nothing of it. It is spoken to from one thread of its own, so that one that
is slow, asks or fails costs training nothing: after its first error a tracker is left alone, with one warning.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator

from nsae_cli.metrics.training_batch import GROUP_NAMES
from nsae_cli.reporter import Reporter
from nsae_cli.values import split_list

#: Seconds that the end of a run waits for what is still to be sent; where it was stopped, and may be killed soon.
_PATIENCE, _PATIENCE_STOPPED = 30.0, 5.0

TrackerName = Literal["wandb", "tensorboard", "trackio"]


def _installed(names: list[TrackerName]) -> list[TrackerName]:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"expected an installed package, and {name} is not: pip install 'nsae[{name}]'")
    return names


#: The option's type: each tracker once, and installed.
LogTo = Annotated[list[TrackerName], BeforeValidator(split_list), AfterValidator(_installed)]
#: By tracker and cell, what a tracker knows a run as. Kept while the run is not finished.
RunIds = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Followed:
    """What a tracker is told about one SAE when it begins to follow it.

    Attributes:
        name: NAME, or NAME/CELL in a grid.
        group: NAME.
        id: made at random when the training was begun, the same whenever it goes on.
        again: whether the tracker followed this training before it was interrupted.
        step: steps done before, as of the checkpoint that training goes on from.
        config: the SAE's configuration.
        workspace: where a tracker may keep files.
    """

    name: str
    group: str
    id: str
    again: bool
    step: int
    config: Mapping[str, Any]
    workspace: Path


class TrackerRun(Protocol):
    """One SAE in one tracker.

    Attributes:
        known: the last step that it has already; records up to there are not sent again.
        where: how to look at it.
    """

    known: int
    where: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of a step; steps rise."""

    def close(self, finished: bool) -> None:
        """Sends what is left. `finished` is False where training stopped before its end."""


def series(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name: ``loss``, ``loss_share/sinks``, ``bias_ratio/b3``; what is null is left out."""
    found: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, list):
            value = dict(zip(GROUP_NAMES, value, strict=True))
        if isinstance(value, Mapping):
            found |= series(value, f"{name}/")
        elif value is not None and name != "step":
            found[name] = float(value)
    return found


def run_ids(trackers: Sequence[str], cells: Sequence[str], earlier: RunIds | None) -> RunIds:
    """The ids under which trackers know a training's SAEs: those from before, and new ones for the rest."""
    ids = {tracker: dict(known) for tracker, known in (earlier or {}).items()}
    for tracker in trackers:
        known = ids.setdefault(tracker, {})
        for cell in cells:
            known.setdefault(cell, uuid.uuid4().hex[:16])
    return ids


class Trackers:
    """Feeds the trackers of a training, in a thread. A context manager; at its end it waits for them, but not long.

    Args:
        names: which; none for none.
        group: NAME of the training.
        workspace: where trackers may keep files.
        reporter: for where to look, and for the warning after a failure.
    """

    def __init__(self, names: Sequence[str], group: str, workspace: Path, reporter: Reporter) -> None:
        self._names, self._group, self._workspace, self._reporter = names, group, workspace, reporter
        self._ids: RunIds = {}
        self._known: RunIds = {}
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        # Only the thread touches these two.
        self._runs: dict[tuple[str, str], TrackerRun] = {}
        self._failed: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="nsae-trackers", daemon=True)

    def begin(self, cells: Sequence[str], earlier: RunIds | None) -> RunIds:
        """Chooses ids for the SAEs; returns all that are to be kept.

        Args:
            cells: all SAEs of the training.
            earlier: what `begin` returned before the training was interrupted.
        """
        self._known = earlier or {}
        self._ids = run_ids(self._names, cells, earlier)
        return self._ids

    def follow(
        self, cell: str, name: str, config: Mapping[str, Any], step: int, log: bytes
    ) -> Callable[[dict[str, Any]], None]:
        """Begins to follow an SAE; returns what takes its records.

        Args:
            cell: the SAE, among those of `begin`.
            name: NAME or NAME/CELL.
            config: its configuration.
            step: steps done before.
            log: the lines of its metrics.jsonl up to there; a tracker is sent those that it lacks.
        """
        for tracker in self._names:
            again = cell in self._known.get(tracker, {})
            followed = Followed(name, self._group, self._ids[tracker][cell], again, step, config, self._workspace)
            self._do(tracker, lambda tracker=tracker, followed=followed: self._open(tracker, cell, followed, log))  # type: ignore[misc]

        def take(record: dict[str, Any]) -> None:
            for tracker in self._names:
                self._do(tracker, lambda tracker=tracker: _send(self._runs[tracker, cell], record))  # type: ignore[misc]

        return take

    def leave(self, cell: str) -> None:
        """An SAE has taken its last step."""
        for tracker in self._names:
            self._do(tracker, lambda tracker=tracker: self._runs.pop((tracker, cell)).close(True))  # type: ignore[misc]

    def __enter__(self) -> Trackers:
        if self._names:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._names:
            return
        for tracker in self._names:
            self._do(tracker, lambda tracker=tracker: self._close_rest(tracker))  # type: ignore[misc]
        self._jobs.put(None)
        patience = _PATIENCE if kind is None else _PATIENCE_STOPPED
        self._thread.join(patience)
        if self._thread.is_alive():
            self._reporter.warn(
                f"{' or '.join(self._names)} has not taken everything after {patience:g} s and is left behind; "
                f"metrics.jsonl has every line"
            )

    def _do(self, tracker: str, job: Callable[[], None]) -> None:
        self._jobs.put((tracker, job))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            tracker, act = job
            if tracker in self._failed:
                continue
            try:
                act()
            except Exception as error:  # whatever goes wrong in somebody else's package, training goes on
                self._failed.add(tracker)
                reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
                self._reporter.warn(f"--log-to {tracker}: {reason}; going on without it, metrics.jsonl has every line")

    def _open(self, tracker: str, cell: str, followed: Followed, log: bytes) -> None:
        from nsae_cli.training.tracker_kinds import KINDS

        first = all(of != tracker for of, _ in self._runs)
        run = self._runs[tracker, cell] = KINDS[tracker](followed)
        if first:
            self._reporter.note(f"{tracker}: {run.where}")
        for line in log.splitlines():
            _send(run, json.loads(line))

    def _close_rest(self, tracker: str) -> None:
        for key in [key for key in self._runs if key[0] == tracker]:
            self._runs.pop(key).close(False)


def _send(run: TrackerRun, record: Mapping[str, Any]) -> None:
    if record["step"] > run.known:
        run.log(record["step"], series(record))

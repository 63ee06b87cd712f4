"""Power loss: what was not flushed may be gone (C9). And a clock that jumps back (C10).

Dying processes leave what they wrote in the system's memory; a power cut does not. `Disk` replays the operations of a
command onto a model of a disk that keeps only what the standard promises: the content of a file as of its last fsync,
and the entries of a folder as of the folder's last fsync. Of everything later any part may have reached the disk.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import checks
from forked import Ended, Operation, Server
from stages import Prepared
from tally import Tally


@dataclass
class _File:
    """A file, whatever its name: what is durable of its content, and what it held last."""

    durable: bytes = b""
    latest: bytes | None = None


@dataclass
class Disk:
    """A disk with what is durable on it and what is on its way.

    Args:
        root: the workspace that the operations were performed in.
    """

    root: Path
    _now: dict[str, _File | None] = field(default_factory=dict)
    _durable: dict[str, _File | None] = field(default_factory=dict)
    _pending: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)

    def begin_with(self, folder: Path) -> None:
        """Everything below a folder has been durable for long. A folder's entry is None."""
        for path in sorted(folder.rglob("*")):
            entry = None if path.is_dir() else _File(path.read_bytes())
            self._now[path.relative_to(folder).as_posix()] = entry
        self._durable = dict(self._now)

    def perform(self, operation: Operation, flushed: bytes | None) -> None:
        """Performs an operation; `flushed` is the file's content at an fsync."""
        paths = [os.path.relpath(path, self.root) for path in operation.paths]
        path = paths[-1]
        if operation.kind in ("write", "create", "open"):
            if path not in self._now:
                self._now[path] = _File()
                self._change(path, "enter", path, "")
        elif operation.kind == "mkdir":
            if path not in self._now:
                self._now[path] = None
                self._change(path, "enter", path, "")
        elif operation.kind == "fsync":
            file = self._now.get(path)
            if path == "." or (path in self._now and file is None):
                self._settle(path)
            elif file is not None:
                file.durable = flushed if flushed is not None else file.durable
        elif operation.kind == "rename":
            for old in [old for old in self._now if old == paths[0] or old.startswith(f"{paths[0]}/")]:
                self._now[path + old[len(paths[0]) :]] = self._now.pop(old)
            self._change(path, "rename", path, paths[0])
        elif operation.kind == "remove":
            for old in [old for old in self._now if old == path or old.startswith(f"{path}/")]:
                del self._now[old]
            self._change(path, "remove", path, "")

    def _change(self, path: str, kind: str, name: str, source: str) -> None:
        self._pending.setdefault(os.path.dirname(path) or ".", []).append((kind, name, source))
        if kind == "enter":
            self._entered.setdefault(name, []).append(self._now[name])
        if kind == "rename":
            self._entered.setdefault(name, []).append(self._now.get(name))

    _entered: dict[str, list[_File | None]] = field(default_factory=dict)

    def _settle(self, folder: str) -> None:
        for kind, name, source in self._pending.pop(folder, []):
            self._apply(self._durable, kind, name, source)

    def _apply(self, entries: dict[str, _File | None], kind: str, name: str, source: str) -> None:
        """Brings one change of a folder into `entries`."""
        if kind == "remove":
            for old in [old for old in entries if old == name or old.startswith(f"{name}/")]:
                del entries[old]
        elif kind == "enter":
            entries[name] = self._entered[name].pop(0)
        else:
            entered = self._entered[name].pop(0)
            below = {old: entries.pop(old) for old in list(entries) if old == source or old.startswith(f"{source}/")}
            for old in [old for old in entries if old == name]:
                del entries[old]
            entries |= {name + old[len(source) :]: entry for old, entry in below.items()}
            entries.setdefault(name, entered)

    def cut(self, draw: random.Random, target: Path) -> None:
        """Writes to `target` one of the states in which a power cut now may leave the disk."""
        for path, file in self._now.items():
            if file is not None and (self.root / path).is_file():
                file.latest = (self.root / path).read_bytes()
        entries = dict(self._durable)
        for folder in list(self._pending):
            for kind, name, source in self._pending[folder]:
                if draw.random() < 0.5:
                    self._apply(entries, kind, name, source)
                elif kind != "remove":
                    self._entered[name].pop(0)
        for path in sorted(entries):
            parents = path.split("/")[:-1]
            if any(entries.get("/".join(parents[: n + 1]), _File()) is not None for n in range(len(parents))):
                continue  # its folder has not reached the disk
            file = entries[path]
            if file is None:
                (target / path).mkdir(parents=True, exist_ok=True)
            else:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(_survived(file, draw))


def _survived(file: _File, draw: random.Random) -> bytes:
    """Content after a power cut: what was flushed, or any mixture with what was written since."""
    latest = file.durable if file.latest is None else file.latest
    if latest == file.durable:
        return file.durable
    choice = draw.randrange(4)
    if choice == 0:
        return file.durable
    if choice == 1:
        return latest
    if latest.startswith(file.durable):
        size = draw.randrange(len(file.durable), len(latest) + 1)
        return latest[:size] if choice == 2 else file.durable + bytes(size - len(file.durable))
    return latest[: draw.randrange(len(latest) + 1)] if choice == 2 else bytes(len(latest))


def replay(prepared: Prepared, workspace: Path, ended: Ended, snapshots: Path) -> Disk:
    """The disk after the operations that a command began; the last one was not performed if a fault hit it."""
    disk = Disk(workspace)
    if prepared.start.exists():
        disk.begin_with(prepared.start)
    operations = ended.operations[: -1 if ended.faulted else None]
    flushed = {int(fields[0]) for fields in ended.of("flushed")}
    for operation in operations:
        content = None
        if operation.number in flushed:
            content = (snapshots / f"{operation.number}").read_bytes()
        disk.perform(operation, content)
    return disk


def cut_power(
    server: Server, prepared: Prepared, folder: Path, points: Iterable[int], outcomes: int, seed: int
) -> Tally:
    """Cuts the power before an operation; for each, several states of the disk in which that may leave it.

    The command, run again, must end in the undisturbed bytes, or refuse (exit 3) and name the file.
    """
    tally = Tally("power cut", prepared.stage.name)
    draw = random.Random(seed)
    for k in points:
        workspace = prepared.begin(folder)
        snapshots = workspace.with_name(f"{workspace.name}-snapshots")
        snapshots.mkdir()
        died = server.run(prepared.trial(workspace, fault={"at": k, "how": "kill"}, snapshots=str(snapshots)))
        for _ in range(outcomes if died.faulted else 0):
            target = workspace.with_name(f"{workspace.name}-after")
            target.mkdir()
            replay(prepared, workspace, died, snapshots).cut(draw, target)
            again = server.run(prepared.trial(target))
            if again.code == 3:
                tally.counts["refused, naming the file"] += 1
                problems = checks.failed_in_one_line(again, 3)
                names = [path.name for path in target.rglob("*") if path.is_file()]
                if not any(name in again.last_line for name in names):
                    problems.append(f"it names no file: {again.last_line}")
            else:
                tally.counts["the same bytes"] += again.code == 0
                problems = [] if again.code == 0 else [again.describe()]
                problems += checks.differences(prepared, target)
            tally.add(f"before operation {k} {died.of('fault')}", problems)
            shutil.rmtree(target)
        shutil.rmtree(workspace)
        shutil.rmtree(snapshots)
    return tally


def order_of_operations(prepared: Prepared) -> Tally:
    """Every file gets its final name only once its content is flushed, and the mark comes after all of them."""
    tally = Tally("order: fsync, rename, fsync of the folder, mark", prepared.stage.name)
    operations = prepared.undisturbed.operations
    marks = ("manifest.json", "norms.json", "run.json", "top_norms.json", "eval.json", "table.json", "features.json")
    for number, operation in enumerate(operations):
        if operation.kind != "rename":
            continue
        source, target = operation.paths
        if os.path.basename(target).startswith("."):
            continue  # what is to be removed loses its name first
        before, after = operations[:number], operations[number + 1 :]
        problems = []
        content = [o.kind for o in before if o.paths[-1] == source]
        if not content or content[-1] != "fsync":
            problems.append(f"{os.path.basename(target)} is renamed before its content is flushed ({content})")
        name = os.path.basename(target)
        if not any(o.kind == "fsync" and o.paths[-1] == os.path.dirname(target) for o in after) and name in marks:
            problems.append(f"the folder of {name} is not flushed")
        if name in marks:
            problems += _written_after_mark(target, after)
            problems += _not_flushed_before_mark(target, before)
        tally.add(f"rename to {name}", problems)
    return tally


_OF_NO_CONSEQUENCE = ("timings.jsonl", "verified.jsonl")


def _written_after_mark(mark: str, after: list[Operation]) -> list[str]:
    folder = os.path.dirname(mark) + os.sep
    return [
        f"{os.path.basename(o.paths[-1])} is written after {os.path.basename(mark)}"
        for o in after
        if o.kind in ("write", "create", "open")
        and os.path.dirname(o.paths[-1]) + os.sep == folder
        and not os.path.basename(o.paths[-1]).startswith(".")
        and os.path.basename(o.paths[-1]) not in _OF_NO_CONSEQUENCE
    ]


def _not_flushed_before_mark(mark: str, before: list[Operation]) -> list[str]:
    """Files in the mark's folder that were written in place and not flushed since."""
    dirty: dict[str, bool] = {}
    for operation in before:
        path = operation.paths[-1]
        if os.path.dirname(path) == os.path.dirname(mark) and not os.path.basename(path).startswith("."):
            if operation.kind in ("create", "open"):
                dirty[path] = True
            elif operation.kind in ("fsync", "remove"):
                dirty[path] = False
    return [
        f"{os.path.basename(path)} is not flushed before {os.path.basename(mark)}"
        for path, waiting in dirty.items()
        if waiting and os.path.basename(path) not in _OF_NO_CONSEQUENCE
    ]


def turn_clock_back(server: Server, prepared: Prepared, folder: Path, points: Iterable[int]) -> Tally:
    """The wall clock runs backwards, an hour at every look, in the run that is killed and in the one that goes on."""
    tally = Tally("clock runs backwards", prepared.stage.name)
    for k in points:
        workspace = prepared.begin(folder)
        died = server.run(prepared.trial(workspace, clock="backwards", fault={"at": k, "how": "kill"}))
        again = server.run(prepared.trial(workspace, clock="backwards"))
        problems = [] if again.code == 0 else [again.describe()]
        problems += checks.differences(prepared, workspace)
        problems += checks.too_much_lost(prepared, [died, again])[1]
        tally.add(f"operation {k}", problems)
        shutil.rmtree(workspace)
    return tally

"""Checkpoints of a training run: a folder per step, complete once it carries its final name.

`checkpoints/begun.json` holds the configurations that the run was begun with. A checkpoint is written into
``step-N.tmp-…``: `state.safetensors` (tensors of all cells under CELL/NAME, among them the bytes of each cell's
metrics.jsonl), `state.json` (the step) and `files.json` (their hashes); then the folder is renamed to ``step-N``. Two
are kept. `CheckpointWriter` does this while training goes on.
"""

from __future__ import annotations

import shutil
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nsae_cli import catalogue
from nsae_cli.errors import ArtifactError
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit

KEEP = 2
BEGUN = "begun.json"
_FILES = ("state.safetensors", "state.json")
_LOG = "metrics.jsonl"


class _Damaged(Exception):  # noqa: N818 - never leaves this module: an older checkpoint stands in
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: steps done, and by cell its state and the content of its metrics.jsonl."""

    step: int
    cells: dict[str, dict[str, torch.Tensor]]
    logs: dict[str, bytes]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    folder: Path

    @classmethod
    def of(cls, run: Path) -> Checkpoints:
        """Those of the run that writes into a folder."""
        return cls(run / "checkpoints")

    def begin(self, configs: dict[str, Any]) -> None:
        """Records what the run trains and removes what a killed run left half-written."""
        commit.make_folder(self.folder)
        commit.remove_leftovers(self.folder)
        commit.write_document(self.folder / BEGUN, configs)

    def configs(self) -> dict[str, Any] | None:
        """What the run was begun with, or None where there is no run."""
        path = self.folder / BEGUN
        configs = commit.read_json(path) if path.is_file() else None
        return configs if isinstance(configs, dict) else None

    def save(self, step: int, cells: dict[str, dict[str, torch.Tensor]], logs: dict[str, bytes]) -> None:
        """Writes the checkpoint of `step` and removes all but the newest two."""
        final = self.folder / f"step-{step}"
        if final.exists():
            return  # whole, since `latest` has read it or removed it
        temporary = self.folder / f"step-{step}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            commit.make_folder(temporary)
            self._write(temporary, step, cells, logs)
            commit.rename_folder(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in self.steps()[:-KEEP]:
            commit.remove_folder(self.folder / f"step-{old}")

    @staticmethod
    def _write(folder: Path, step: int, cells: dict[str, dict[str, torch.Tensor]], logs: dict[str, bytes]) -> None:
        tensors = {f"{cell}/{name}": tensor for cell, state in cells.items() for name, tensor in state.items()}
        for cell, log in logs.items():
            tensors[f"{cell}/{_LOG}"] = torch.tensor(bytearray(log), dtype=torch.uint8)
        commit.write_tensors(folder / "state.safetensors", tensors)
        commit.write_json(folder / "state.json", {"step": step})
        commit.write_json(folder / "files.json", {name: commit.file_sha256(folder / name) for name in _FILES})

    def latest(self, reporter: Reporter) -> Checkpoint | None:
        """The newest checkpoint that is intact; damaged ones are removed, and a warning says so."""
        damaged: list[str] = []
        found: Checkpoint | None = None
        for step in reversed(self.steps()):
            try:
                found = self._read(step)
                break
            except (_Damaged, ArtifactError) as error:
                damaged.append(f"step-{step} ({error})")
                commit.remove_folder(self.folder / f"step-{step}")
        if damaged:
            instead = f"going on from step-{found.step}" if found else "beginning again"
            reporter.warn(f"damaged checkpoint {', '.join(damaged)}: {instead}")
        return found

    def at_step(self, step: int) -> Checkpoint:
        """The checkpoint of a step that another process has found intact.

        Raises:
            ArtifactError: it looks otherwise from here.
        """
        try:
            return self._read(step)
        except _Damaged as error:
            raise catalogue.RANKS_SEE_OTHERS(
                f"{self.folder / f'step-{step}'} is intact for the first process, and not here ({error}); give all "
                f"processes the same file system"
            ) from error

    def damaged(self) -> dict[int, str]:
        """Of every checkpoint that cannot be used why, by step; reads them all."""
        found = {}
        for step in self.steps():
            try:
                self._read(step)
            except (_Damaged, ArtifactError) as error:
                found[step] = str(error)
        return found

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, damaged or not, rising."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def _read(self, step: int) -> Checkpoint:
        folder = self.folder / f"step-{step}"
        for name in ("files.json", *_FILES):
            if not (folder / name).is_file():
                raise _Damaged(f"{name} is missing")
        expected = commit.read_json(folder / "files.json")
        for name in _FILES:
            if not isinstance(expected, dict) or commit.file_sha256(folder / name) != expected.get(name):
                raise _Damaged(f"{name} is not what was written")
        if commit.read_json(folder / "state.json") != {"step": step}:
            raise _Damaged("it is of another step")
        try:
            tensors = load_file(folder / "state.safetensors", backend="pread")
        except (SafetensorError, OSError) as error:
            commit.refuse_unread(error, folder / "state.safetensors")
            raise _Damaged(str(error).splitlines()[0]) from error
        cells: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            cell, _, name = key.partition("/")
            cells.setdefault(cell, {})[name] = tensor
        logs = {cell: state.pop(_LOG).numpy().tobytes() for cell, state in cells.items() if _LOG in state}
        return Checkpoint(step, cells, logs)

    def clear(self) -> None:
        """Removes the checkpoints of a wave of cells that is finished; the run goes on."""
        for step in self.steps():
            commit.remove_folder(self.folder / f"step-{step}")

    def remove(self) -> None:
        """Removes all checkpoints: the run is complete."""
        commit.remove_folder(self.folder)


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, in a thread of its own where training need not wait for them.

    A context manager: at its end what is being written is written, or has failed.

    Args:
        checkpoints: where they go.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nsae-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, cells: dict[str, dict[str, torch.Tensor]], logs: dict[str, bytes]) -> None:
        """Writes a checkpoint now, after the one that is being written.

        Raises:
            ResourceError: this one, or the one before, could not be written.
        """
        self.wait()
        self._checkpoints.save(step, cells, logs)

    def save_later(self, step: int, cells: dict[str, dict[str, torch.Tensor]], logs: dict[str, bytes]) -> None:
        """Writes a checkpoint while the caller goes on; first waits for the one before.

        Args:
            step: steps done.
            cells: by cell its state: copies, which nobody changes.
            logs: by cell the content of its metrics.jsonl.

        Raises:
            ResourceError: the one before could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._checkpoints.save, step, cells, logs)

    def raise_failure(self) -> None:
        """Raises what the checkpoint in the thread has failed with, if it has; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint in the thread.

        Raises:
            ResourceError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

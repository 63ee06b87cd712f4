"""Checkpoints of a training run: a folder per step, complete once it carries its final name.

`checkpoints/run.json` holds the configurations that the run was begun with. A checkpoint is written into
``step-N.tmp-…``: `state.safetensors` (tensors of all cells under CELL/NAME), `state.json` (step, length of each cell's
metrics.jsonl) and `files.json` (their hashes); then the folder is renamed to ``step-N``. Two are kept.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nsae_cli.errors import ArtifactError
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: steps done, state by cell, bytes of each cell's metrics.jsonl."""

    step: int
    cells: dict[str, dict[str, torch.Tensor]]
    metrics_bytes: dict[str, int]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    folder: Path

    def begin(self, configs: dict[str, Any]) -> None:
        """Records what the run trains and removes what a killed run left half-written."""
        commit.make_folder(self.folder)
        commit.remove_leftovers(self.folder)
        commit.write_json(self.folder / "run.json", configs)

    def configs(self) -> dict[str, Any] | None:
        """What the run was begun with, or None where there is no run."""
        path = self.folder / "run.json"
        return commit.read_json(path) if path.is_file() else None

    def save(self, step: int, cells: dict[str, dict[str, torch.Tensor]], metrics_bytes: dict[str, int]) -> None:
        """Writes the checkpoint of `step` and removes all but the newest two."""
        final = self.folder / f"step-{step}"
        if final.exists():
            return
        temporary = self.folder / f"step-{step}.tmp-{uuid.uuid4().hex[:8]}"
        with commit.disk_errors(final):
            temporary.mkdir()
        tensors = {f"{cell}/{name}": tensor for cell, state in cells.items() for name, tensor in state.items()}
        commit.write_tensors(temporary / "state.safetensors", tensors)
        commit.write_json(temporary / "state.json", {"step": step, "metrics_bytes": metrics_bytes})
        hashes = {name: commit.file_sha256(temporary / name) for name in ("state.safetensors", "state.json")}
        commit.write_json(temporary / "files.json", hashes)
        with commit.disk_errors(final):
            os.rename(temporary, final)
        for old in self._steps()[:-KEEP]:
            shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)

    def latest(self, reporter: Reporter) -> Checkpoint | None:
        """The newest checkpoint that is intact; a damaged one is passed over with a warning."""
        for step in reversed(self._steps()):
            try:
                return self._read(step)
            except ArtifactError as error:
                reporter.warn(f"checkpoint step-{step} cannot be used ({error}); trying the one before")
        return None

    def _steps(self) -> list[int]:
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def _read(self, step: int) -> Checkpoint:
        folder = self.folder / f"step-{step}"
        for name in ("files.json", "state.json", "state.safetensors"):
            if not (folder / name).is_file():
                raise ArtifactError(f"{name} is missing")
        for name, expected in commit.read_json(folder / "files.json").items():
            if commit.file_sha256(folder / Path(name).name) != expected:
                raise ArtifactError(f"{name} is not what was written")
        description = commit.read_json(folder / "state.json")
        try:
            tensors = load_file(folder / "state.safetensors", backend="pread")
        except (SafetensorError, OSError) as error:
            raise ArtifactError(str(error).splitlines()[0]) from error
        cells: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            cell, _, name = key.partition("/")
            cells.setdefault(cell, {})[name] = tensor
        return Checkpoint(int(description["step"]), cells, description["metrics_bytes"])

    def remove(self) -> None:
        """Removes all checkpoints: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

"""Scenarios that bring about the classes of failure: what each is given to work with, and the register of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nsae_cli import assets

GOLDEN = Path(__file__).parents[1] / "interop" / "golden"


@dataclass
class Place:
    """What a scenario works with.

    Attributes:
        finished: the shared workspace, which it only reads.
        tmp: an empty folder of its own.
        patch: for what lies outside nsae: libraries, the operating system.
        workspace: where its command runs; `damaged()` makes it a copy.
    """

    finished: Path
    tmp: Path
    patch: pytest.MonkeyPatch
    workspace: Path

    def damaged(self) -> Path:
        """A copy of the shared workspace, in which the command will run."""
        self.workspace = Path(shutil.copytree(self.finished, self.tmp / "runs"))
        return self.workspace

    def empty(self) -> Path:
        """A workspace without anything."""
        self.workspace = self.tmp / "empty"
        return self.workspace

    @property
    def store(self) -> Path:
        """The store's folder."""
        return self._only("activations")

    @property
    def group(self) -> Path:
        """The folder of the two SAEs."""
        return self._only("saes")

    def _only(self, kind: str) -> Path:
        [folder] = (path for path in (self.workspace / kind).iterdir() if path.is_dir())
        return folder

    @property
    def cell(self) -> Path:
        """The folder of one of them."""
        return self.group / "L2-relu"

    @property
    def cell_name(self) -> str:
        """Its name in the workspace."""
        return f"{self.group.name}/L2-relu"

    def model(self) -> Path:
        """A local folder with the model mini."""
        return Path(shutil.copytree(assets.model_dir("mini"), self.tmp / "model"))

    def golden(self, name: str, file: str = "cfg.json", **changes: Any) -> Path:
        """An SAE of another package, with changes in its configuration."""
        folder = Path(shutil.copytree(GOLDEN / name, self.tmp / Path(name).name))
        edit(folder / file, **changes)
        return folder

    def corpus(self, name: str, content: bytes) -> Path:
        """A corpus file."""
        path = self.tmp / name
        path.write_bytes(content)
        return path

    def raises(self, target: str, error: BaseException) -> None:
        """Makes something outside nsae fail."""

        def fail(*arguments: Any, **options: Any) -> None:
            raise error

        self.patch.setattr(target, fail)


#: By the constant's name: brings the failure about and returns the command that meets it.
SCENARIOS: dict[str, Callable[[Place], list[Any]]] = {}


def scenario(entry: str) -> Callable[[Callable[[Place], list[Any]]], Callable[[Place], list[Any]]]:
    """Registers a scenario for an entry of the catalogue."""

    def register(provoke: Callable[[Place], list[Any]]) -> Callable[[Place], list[Any]]:
        assert entry not in SCENARIOS
        SCENARIOS[entry] = provoke
        return provoke

    return register


def commands(**lines: str) -> None:
    """Registers entries that one command on the finished workspace brings about."""
    for entry, line in lines.items():
        scenario(entry)(lambda place, line=line: [part.format(place=place) for part in line.split()])


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file as its writer would have written them: without a checksum that fits no more."""
    document = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in document.items() if key not in ("checksum", "files")}
    path.write_text(json.dumps(kept | changes), encoding="utf-8")


def flip(path: Path) -> None:
    """Changes one bit near the end of a file."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def rewrite_shard(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the tensors of a store's first shard, and its manifest so that it states no hashes."""
    path = store / "shard-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    shards = json.loads((store / "manifest.json").read_text())["shards"]
    edit(store / "manifest.json", shards=[{"file": shard["file"], "rows": shard["rows"]} for shard in shards])


def system_error(code: int, path: object = None) -> OSError:
    """As the operating system raises it."""
    return OSError(code, os.strerror(code), None if path is None else str(path))

"""The golden folders, and changing copies of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("expected.safetensors"))


def copied(name: str, tmp_path: Path) -> Path:
    """A golden folder to change."""
    return Path(shutil.copytree(GOLDEN / name, tmp_path / Path(name).name))


def change_config(folder: Path, name: str = "cfg.json", **changes: object) -> None:
    """Overwrites keys of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, name: str = "sae_weights.safetensors", **changes: torch.Tensor) -> None:
    """Overwrites tensors."""
    save_file(load_file(folder / name) | changes, folder / name)

"""Shards that a pass will read next are hashed meanwhile; what is handed out is checked all the same."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from nsae_cli.errors import ArtifactError
from nsae_cli.store.shards import open_activations
from nsae_cli.store.verified import VERIFIED
from nsae_cli.store.writer import StoreWriter

HOOK = "blocks.0.hook_resid_post"
#: More rows than are hashed at a time.
ROWS = 5000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of four shards."""
    folder = tmp_path / "store"
    writer = StoreWriter(folder, {})
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        writer.write(index, {HOOK: torch.randn(ROWS, 3, generator=generator).half()}, nonfinite_rows=0)
    writer.finish({"hooks": [HOOK], "d_in": 3, "dtype": "float16"})
    return folder


def _verified(folder: Path) -> list[str]:
    path = folder / VERIFIED
    return [json.loads(line)["file"] for line in path.read_text().splitlines()] if path.exists() else []


def test_the_next_shard_is_hashed_before_it_is_read(folder: Path) -> None:
    open_activations(folder).read(0, [HOOK])
    deadline = time.monotonic() + 30
    while "shard-00001.safetensors" not in _verified(folder):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "shard-00002.safetensors" not in _verified(folder)


def test_each_tensor_is_hashed_once_in_a_pass(folder: Path) -> None:
    store = open_activations(folder)
    for shard in range(4):
        store.read(shard, [HOOK])
    assert sorted(_verified(folder)) == [f"shard-{shard:05d}.safetensors" for shard in range(4)]


def test_shards_in_another_order_are_not_hashed_ahead(folder: Path) -> None:
    store = open_activations(folder)
    for shard in (2, 0):
        store.read(shard, [HOOK])
    time.sleep(0.2)
    assert sorted(_verified(folder)) == ["shard-00000.safetensors", "shard-00002.safetensors"]


@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_a_changed_byte_is_found_by_the_reader_of_its_shard(folder: Path, damaged: int) -> None:
    path = folder / f"shard-{damaged:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = open_activations(folder)
    for shard in range(damaged):
        store.read(shard, [HOOK])
    with pytest.raises(ArtifactError, match=f"{path.name}.*SHA-256 differs"):
        store.read(damaged, [HOOK])
    assert path.name not in _verified(folder)


def test_a_shard_that_is_gone_or_no_shard_is_named_by_its_reader(folder: Path) -> None:
    (folder / "shard-00002.safetensors").write_bytes(b"\0" * (folder / "shard-00002.safetensors").stat().st_size)
    (folder / "shard-00003.safetensors").unlink()
    store = open_activations(folder)
    store.read(0, [HOOK])
    store.read(1, [HOOK])
    with pytest.raises(ArtifactError, match="shard-00002"):
        store.read(2, [HOOK])
    with pytest.raises(ArtifactError, match=r"shard-00003.*missing"):
        store.read(3, [HOOK])

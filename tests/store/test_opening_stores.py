"""Stores of other tools, and stores that are damaged or hostile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from hand_store import HOOK, make_rows, write_foreign, write_full
from nsae_cli import open_activations
from nsae_cli.errors import ArtifactError, NumericalError
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import profile_hook
from nsae_cli.store.shards import ActivationStore
from nsae_cli.store.writer import StoreWriter
from sealed_json import edit_json

SHARDS = [16, 0, 24]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return write_full(tmp_path / "store", make_rows(5), SHARDS)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "foreign", make_rows(5), SHARDS)


def change_manifest(folder: Path, **changes: object) -> None:
    edit_json(folder / "manifest.json", **changes)


def read_vectors(folder: Path) -> None:
    store = open_activations(folder)
    for shard in range(len(store.manifest.shards)):
        store.read(shard, store.manifest.hooks)


def read_everything(folder: Path) -> None:
    store = open_activations(folder)
    for shard in range(len(store.manifest.shards)):
        store.read(shard, [*store.manifest.hooks, "tokens", "positions", "documents", "norms"])


def test_rows_come_back_bit_for_bit(full):
    rows, store = make_rows(5), open_activations(full)
    read = torch.cat([store.read(shard, [HOOK])[HOOK] for shard in range(3)])
    assert torch.equal(read, rows.x[HOOK])
    assert torch.equal(torch.cat([store.positions(shard) for shard in range(3)]), rows.positions)
    expected = torch.linalg.vector_norm(rows.x[HOOK].float(), dim=1)
    assert torch.equal(torch.cat([store.norms(shard, HOOK) for shard in range(3)]), expected)


@pytest.mark.parametrize("verified_before", [False, True])
def test_some_rows_of_a_shard_equal_those_rows_of_the_whole(full, verified_before):
    store = open_activations(full)
    whole = store.read(2, [HOOK])[HOOK] if verified_before else make_rows(5).x[HOOK][16:]
    for chosen in ([], [0], [23], [3, 4, 5], [0, 2, 3, 9, 23], list(range(24))):
        keep = torch.zeros(24, dtype=torch.bool)
        keep[chosen] = True
        assert torch.equal(store.read_rows(2, HOOK, keep), whole[keep])


def test_a_store_with_the_required_keys_only(foreign):
    store = open_activations(foreign)
    assert not store.has_positions
    assert not store.has_tokens
    assert store.positions(0) is None
    assert store.tokens(0) is None
    expected = torch.linalg.vector_norm(make_rows(5).x[HOOK].float(), dim=1)
    torch.testing.assert_close(torch.cat([store.norms(shard, HOOK) for shard in range(3)]), expected)
    profile = profile_hook(store, HOOK, Contexts(store))
    assert profile.thresholds.position0_active is None
    assert profile.sink_counts.to_json()["position"] is None


def test_stored_norms_without_norm_hooks_are_not_trusted(tmp_path, full):
    change_manifest(full, norm_hooks=None)
    store = open_activations(full)
    assert not store.has_stored_norms(HOOK)
    assert store.norms(0, HOOK).shape == (16,)


def test_a_store_is_named_by_its_folder_however_it_is_reached(full, monkeypatch):
    monkeypatch.chdir(full)
    assert open_activations(".").name == "store"


def test_every_byte_of_a_shard_is_guarded(full):
    """A bit flipped anywhere in the data is found by hash; in the header, by structure or by hash."""
    path = full / "shard-00000.safetensors"
    intact = path.read_bytes()
    for position in [*range(0, 24), *range(40, len(intact), 37), len(intact) - 1]:
        damaged = bytearray(intact)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            read_everything(full)
    path.write_bytes(intact)
    read_everything(full)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_truncated_shards_say_what_was_expected(full, kept):
    path = full / "shard-00002.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[:kept])
    with pytest.raises(ArtifactError, match=f"expected {len(intact):,}") as raised:
        read_everything(full)
    assert "get it again from where the store came from" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"\x80\x04\x95pickle"])
def test_foreign_shards_that_are_no_safetensors(foreign, content):
    (foreign / "part0.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        open_activations(foreign).norms(0, HOOK)


def test_swapped_and_missing_shards(tmp_path):
    folder = write_full(tmp_path / "store", make_rows(5), [20, 20])
    first, second = folder / "shard-00000.safetensors", folder / "shard-00001.safetensors"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        read_everything(folder)
    second.unlink()
    with pytest.raises(ArtifactError, match="the file is missing"):
        open_activations(folder).read(1, [HOOK])


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "/etc/passwd", "..", ".", "", "C:\\x.safetensors", "\\\\host\\share", "a/b",
        "a\x00b", "a\nb", "~", "%2e%2e/x", ".hidden", "x" * 4096, "shärd",
    ],
)  # fmt: skip
def test_names_that_leave_the_folder(foreign, tmp_path, name):
    shutil.copy(foreign / "part0.safetensors", tmp_path / "secret.safetensors")
    change_manifest(foreign, shards=[{"file": name, "rows": 40}])
    with pytest.raises(ArtifactError, match=r"shards.0.file") as raised:
        open_activations(foreign)
    assert "\n" not in str(raised.value)


def test_links_and_devices_are_no_shards(foreign, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(foreign / "part0.safetensors", outside)
    (foreign / "part0.safetensors").symlink_to(outside)
    with pytest.raises(ArtifactError, match="symbolic link"):
        open_activations(foreign).norms(0, HOOK)
    (foreign / "part0.safetensors").unlink()
    os.mkfifo(foreign / "part0.safetensors")
    with pytest.raises(ArtifactError, match="missing"):
        open_activations(foreign).norms(0, HOOK)


def test_a_linked_store_folder_is_fine(full, tmp_path):
    (tmp_path / "link").symlink_to(full)
    read_everything(tmp_path / "link")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 41}, "rows is 41 but the shards hold 40"),
        ({"d_in": 13}, r"\[16, 12\]"),
        ({"dtype": "bfloat16"}, "float16"),
        ({"dtype": "float64"}, "dtype"),
        ({"d_in": 0}, "d_in"),
        ({"hooks": []}, "hooks"),
        ({"hooks": [HOOK, HOOK]}, "hooks names one entry twice"),
        ({"hooks": ["blocks.9.hook_resid_post"]}, "no tensor 'blocks.9.hook_resid_post'"),
        ({"format_version": 2}, "format 2"),
        ({"shards": None}, "shards"),
        ({"shards": [{"file": "part0.safetensors", "rows": 20}] * 2}, "twice"),
        ({"shards": [{"file": "part0.safetensors", "rows": 40}]}, r"\[40, 12\]"),
        ({"shards": [{"file": "part0.safetensors", "rows": -1}], "rows": -1}, "rows"),
    ],
)
def test_manifests_that_do_not_fit_name_the_field(foreign, changes, said):
    change_manifest(foreign, **changes)
    with pytest.raises(ArtifactError, match=said):
        read_vectors(foreign)


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "{}", "[" * 10_000, '{"format_version": 1, "rows": NaN}'])
def test_manifests_that_are_none(foreign, text):
    (foreign / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError):
        open_activations(foreign)


def test_unknown_keys_of_a_newer_writer_are_ignored(foreign):
    change_manifest(foreign, colour="blue")
    assert open_activations(foreign).manifest.rows == 40


def test_an_unfinished_store_says_how_far_it_came(tmp_path):
    writer = StoreWriter(tmp_path / "store", {"a": 1})
    writer.write(0, {HOOK: torch.zeros(4, 2)}, 0)
    writer.wait()
    with pytest.raises(ArtifactError, match=r"not finished \(1 shards"):
        open_activations(tmp_path / "store")
    with pytest.raises(ArtifactError, match="not an activation store"):
        open_activations(tmp_path)


def test_rows_that_are_not_finite_are_refused(full, foreign):
    shards = json.loads((full / "manifest.json").read_text())["shards"]
    shards[2]["nonfinite_rows"] = 3
    change_manifest(full, shards=shards)
    store = open_activations(full)
    with pytest.raises(NumericalError, match="3 rows"):
        profile_hook(store, HOOK, Contexts(store))

    rows = make_rows(5)
    rows.x[HOOK][7, 3] = float("nan")
    store = open_activations(write_foreign(foreign.parent / "nan", rows, [40]))
    with pytest.raises(NumericalError):
        profile_hook(store, HOOK, Contexts(store))


class CountingHash:
    """Counts the tensors that are hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nsae_cli.store import commit

        self.count, self._hash = 0, commit.tensor_sha256
        monkeypatch.setattr(commit, "tensor_sha256", self)

    def __call__(self, tensor: torch.Tensor) -> str:
        self.count += 1
        return self._hash(tensor)


def test_only_what_is_read_is_hashed_and_once_per_version_of_the_file(full, monkeypatch):
    hashes = CountingHash(monkeypatch)
    open_activations(full).read(0, [HOOK])
    assert hashes.count == 1
    open_activations(full).read(0, [HOOK, "norms"])
    assert hashes.count == 2
    open_activations(full).read(0, [HOOK, "norms"])
    assert hashes.count == 2
    path = full / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        read_everything(full)


def test_what_was_verified_may_be_forgotten_or_torn(full, monkeypatch):
    read_everything(full)
    memory = full / "verified.jsonl"
    memory.write_bytes(memory.read_bytes()[:-20] + b"\xff{")
    read_everything(full)
    memory.unlink()
    memory.mkdir()  # cannot be written
    hashes = CountingHash(monkeypatch)
    store = open_activations(full)
    store.read(0, [HOOK])
    store.read(0, [HOOK])
    assert hashes.count == 1


def test_a_store_without_rows_says_so(tmp_path):
    store = open_activations(write_foreign(tmp_path / "empty", make_rows(1), [0]))
    with pytest.raises(ArtifactError, match="no rows"):
        profile_hook(store, HOOK, Contexts(store))


def test_a_store_without_shards_says_so(tmp_path):
    store = ActivationStore(write_foreign(tmp_path / "empty", make_rows(1), []))
    with pytest.raises(ArtifactError, match="no rows"):
        profile_hook(store, HOOK, Contexts(store))

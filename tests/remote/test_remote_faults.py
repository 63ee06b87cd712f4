"""Whatever fails at a URL, and wherever: nothing damaged is used, and the same work again ends with the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty_place import URL, Faulty

from hand_store import HOOK, make_rows, write_full
from nsae_cli.errors import ArtifactError, NsaeError, ResourceError
from nsae_cli.reporter import SilentReporter
from nsae_cli.store import commit, presence
from nsae_cli.store.manifest import read_manifest
from nsae_cli.store.progress import progress_text
from nsae_cli.store.remote import lease
from nsae_cli.store.shards import open_activations
from nsae_cli.store.workspace import Kind, Workspace
from nsae_cli.store.writer import unneeded_files
from nsae_cli.training.checkpoint import Checkpoints

ROWS, SHARDS, STEPS = make_rows(contexts=30), [80, 80, 80], 3
QUIET = SilentReporter()


def opened() -> Workspace:
    """The workspace, as a new command finds it."""
    presence.begin(QUIET)
    commit.observer = None
    workspace = Workspace.at(URL)
    workspace.open()
    return workspace


def make_store() -> None:
    """As `nsae collect`: finds the store, or goes on with it."""
    workspace = opened()
    folder = workspace.folder(Kind.ACTIVATIONS, "store")
    if (folder / "manifest.json").is_file():
        workspace.tidy(folder, QUIET, unneeded_files(folder))
        return
    with workspace.writing(folder, QUIET):
        if not (folder / "manifest.json").is_file():
            write_full(folder, ROWS, SHARDS)


def state_of(step: int) -> dict[str, torch.Tensor]:
    """What the made-up training of `make_sae` has come to."""
    return {"weights": torch.arange(12.0) * step}


def make_sae() -> None:
    """As `nsae train` of a grid of two, some steps with a checkpoint each; the end depends on the last one."""
    workspace = opened()
    folder = workspace.folder(Kind.SAE, "grid")
    cells = {cell: folder / cell for cell in ("L1", "L2")}
    checkpoints = Checkpoints(folder / "checkpoints")
    if all((cell / "run.json").is_file() for cell in cells.values()):
        workspace.tidy(folder, QUIET, [checkpoints.folder] if checkpoints.folder.exists() else [])
        return
    with workspace.writing(folder, QUIET):
        for path in (folder, *cells.values()):
            commit.make_folder(path)
        checkpoints.begin({"cells": list(cells)})
        found = checkpoints.latest(QUIET)
        first = found.step if found else 0
        if found:
            assert torch.equal(found.cells["L1"]["weights"], state_of(first)["weights"])
        DONE.extend(range(first, STEPS))
        for step in range(first, STEPS):
            checkpoints.save(step + 1, {"L1": state_of(step + 1)}, {"L1": b"line\n" * step})
        commit.write_document(folder / "group.json", {"format_version": 1, "cells": list(cells)})
        for name, cell in cells.items():
            if not (cell / "run.json").is_file():
                commit.write_tensors(cell / "sae_weights.safetensors", state_of(STEPS))
                document = {"format_version": 1, "cell": name}
                commit.write_document(cell / "run.json", document, ["sae_weights.safetensors"])
        checkpoints.remove()


#: Steps that `make_sae` took.
DONE: list[int] = []


def assert_consistent(expected: dict[str, bytes]) -> None:
    """Where a completion mark is, its files are, as they should be."""
    there = Faulty.objects()
    for mark in (name for name in there if name.rpartition("/")[2] in ("manifest.json", "run.json")):
        folder = mark.rpartition("/")[0] + "/"
        for name in expected:
            if name.startswith(folder):
                assert there.get(name) == expected[name], name


def _steps(file: str) -> int:
    """The newest checkpoint at the URL of which that file is there; 0 where none is."""
    names = [name.split("/") for name in Faulty.objects() if "/step-" in name and name.endswith(file)]
    return max((int(parts[3].removeprefix("step-")) for parts in names), default=0)


@pytest.mark.parametrize(
    ("make", "fault", "where"),
    [
        (make_store, "away", "here"),
        (make_store, "away", "elsewhere"),
        (make_store, "error", "here"),
        (make_store, "after", "elsewhere"),
        (make_sae, "away", "here"),
        (make_sae, "away", "elsewhere"),
    ],
)
def test_the_same_work_again_after_any_failure(
    make: Callable[[], None], where: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "ABANDONED", 0.0)  # this process, which holds the lock, is not killed
    make()
    expected = Faulty.objects()
    assert len(expected) > 3
    for at in range(1000):
        shutil.rmtree(tmp_path / "cache")
        Faulty.clear()
        DONE.clear()
        Faulty.arm(fault, at, times=3)  # as often as it is tried
        failure: NsaeError | None = None
        try:
            make()
        except NsaeError as error:
            failure = error
        if failure is not None:
            assert isinstance(failure, ResourceError), repr(failure)
            assert URL in str(failure)
            assert "secret" not in str(failure)
            assert "Signature" not in str(failure)
        hit = Faulty.count > at
        Faulty.heal()
        assert_consistent(expected)
        uploaded = [name for name, _ in expected.items() if name in Faulty.objects() and "shard-" in name]
        durable = Faulty.objects().get("activations/store/progress.jsonl", b"").decode()
        newest, begun = _steps("files.json"), _steps("state.safetensors")
        assert begun - newest <= 1 or "saes/grid/L2/run.json" in Faulty.objects(), "more than one checkpoint is lost"
        before, taken = len(Faulty.log), len(DONE)
        if where == "elsewhere":
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        make()
        assert Faulty.objects() == expected, (at, fault, failure)
        again = [name for what, name in Faulty.log[before:] if what == "put" and "shard-" in name]
        assert not any(name.rpartition("/")[2] in durable for name in again), "a durable shard was made again"
        assert len(again) <= len(SHARDS) - len(uploaded) + 1
        assert len(DONE) - taken in (0, STEPS - newest)
        if not hit:
            break
    assert at > 15


@pytest.mark.parametrize("fault", ["flip", "truncate"])
def test_no_damaged_byte_is_read(fault: str, tmp_path: Path) -> None:
    make_store()
    expected = [rows for rows in ROWS.x[HOOK].split(SHARDS)]
    outcomes = set()
    for times in (1, 1000):
        for at in range(1000):
            shutil.rmtree(tmp_path / "cache")
            Faulty.arm(fault, at, times)
            try:
                store = open_activations(opened().find(Kind.ACTIVATIONS, "store")[0].path)
                for shard, rows in enumerate(expected):
                    assert torch.equal(store.read(shard, [HOOK])[HOOK], rows)
                outcomes.add((times, "read"))
            except NsaeError as error:
                assert times > 1, "once is tried again"
                outcomes.add((times, type(error).__name__))
                assert list((tmp_path / "cache").rglob("*.tmp")) == []
            hit = Faulty.count > at
            Faulty.heal()
            store = open_activations(opened().find(Kind.ACTIVATIONS, "store")[0].path)
            for shard, rows in enumerate(expected):  # nothing damaged has stayed in the copy
                assert torch.equal(store.read(shard, [HOOK])[HOOK], rows)
            if not hit:
                break
        assert at >= 5
    assert outcomes == {(1, "read"), (1000, "ArtifactError"), (1000, "read")}


def test_shards_come_one_at_a_time_and_only_those_that_are_read(tmp_path: Path) -> None:
    make_store()
    shutil.rmtree(tmp_path / "cache")
    store = open_activations(opened().find(Kind.ACTIVATIONS, "store")[0].path)
    assert list(store.path.glob("*.safetensors")) == []
    store.read(1, ["positions"])
    assert [path.name for path in store.path.glob("*.safetensors")] == ["shard-00001.safetensors"]


def test_a_file_of_another_version_is_fetched_again(tmp_path: Path) -> None:
    make_store()
    old = open_activations(opened().find(Kind.ACTIVATIONS, "store")[0].path).read(0, [HOOK])[HOOK]
    Faulty.store.clear()
    other, cache = make_rows(contexts=30, sink=3.0), tmp_path / "cache"
    shutil.move(cache, tmp_path / "aside")  # another machine makes another store under the name
    workspace = opened()
    with workspace.writing(folder := workspace.folder(Kind.ACTIVATIONS, "store"), QUIET):
        write_full(folder, other, SHARDS)
    shutil.rmtree(cache)
    shutil.move(tmp_path / "aside", cache)
    new = open_activations(opened().find(Kind.ACTIVATIONS, "store")[0].path).read(0, [HOOK])[HOOK]
    assert not torch.equal(old, new)
    assert torch.equal(new, other.x[HOOK][:80])


@pytest.mark.parametrize("name", ["../../out.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden", "C:\\x"])
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    make_store()
    path = "/bucket/ws/activations/store/manifest.json"
    document = json.loads(bytes(Faulty.store[path].getbuffer()))
    document["shards"][0]["file"] = name
    del document["checksum"]
    fs = Faulty()
    fs.pipe_file(path, json.dumps(document).encode())
    fs.pipe_file("/bucket/ws/activations/out.safetensors", b"canary")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ArtifactError, match="leaves the folder"):
        open_activations(opened().find(Kind.ACTIVATIONS, "store")[0].path)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_what_the_url_lost_is_dropped_from_the_copy() -> None:
    make_store()
    assert len(list(opened().complete(Kind.ACTIVATIONS))) == 1
    Faulty.store.clear()
    workspace = opened()
    assert list(workspace.complete(Kind.ACTIVATIONS)) == []
    assert list(workspace.unfinished(Kind.ACTIVATIONS)) == []


def test_shards_that_another_machine_made_otherwise_are_not_mixed(tmp_path: Path) -> None:
    """The copy has a shard that was never uploaded; meanwhile another machine has written it with other bytes."""
    workspace = opened()
    folder = workspace.folder(Kind.ACTIVATIONS, "store")
    other = make_rows(contexts=30, sink=3.0)

    def begin() -> None:
        with workspace.writing(folder, QUIET):
            Faulty.arm("away", 1)  # progress.jsonl goes up, the first shard does not
            write_full(folder, other, SHARDS)

    with pytest.raises(ResourceError):
        begin()
    assert (folder / "shard-00000.safetensors").is_file()
    Faulty.clear()
    shutil.move(tmp_path / "cache", tmp_path / "kept")
    make_store()
    expected = Faulty.objects()
    progress = progress_text({"tokens": 240}, read_manifest(folder)[0].shards[:1]).encode()
    Faulty.store.clear()  # … and was preempted after one shard
    place = Faulty()
    place.pipe_file(f"{URL}/activations/store/progress.jsonl", progress)
    place.pipe_file(
        f"{URL}/activations/store/shard-00000.safetensors", expected["activations/store/shard-00000.safetensors"]
    )
    shutil.rmtree(tmp_path / "cache")
    shutil.move(tmp_path / "kept", tmp_path / "cache")
    make_store()
    assert Faulty.objects() == expected
    store = open_activations(opened().find(Kind.ACTIVATIONS, "store")[0].path)
    assert torch.equal(store.read(0, [HOOK])[HOOK], ROWS.x[HOOK][:80])

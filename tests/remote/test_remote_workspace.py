"""`nsae --workspace URL`: the bytes are those of a local workspace, and whatever fails, the same command goes on."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from faulty_place import URL, Faulty

from command import TRAIN, Outcome, contents, nsae
from hand_store import make_rows, write_foreign
from nsae_cli import interrupt
from nsae_cli.errors import BusyError
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.remote import lease
from nsae_cli.store.remote.workspace import RemoteWorkspace
from nsae_cli.store.workspace import Workspace

COLLECT = ("collect", "--model", "mini-sink", "--tokens", "20k", "--device", "cpu")
MARKS = ("manifest.json", "norms.json", "run.json", "top_norms.json", "eval.json", "audit.json")


def remote(*arguments: object) -> Outcome:
    return nsae("--workspace", URL, *arguments)


def local_part(folder: Path, kind: str) -> dict[str, bytes]:
    return {f"{kind}/{name}": content for name, content in contents(folder / kind).items()}


def new_machine(tmp_path: Path) -> None:
    """Nothing of the local copy is left."""
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def put(name: str) -> int:
    """When an object was last written."""
    return max(number for number, entry in enumerate(Faulty.log) if entry == ("put", name))


def assert_marks_come_last() -> None:
    """Of every artifact: whatever else is there was written before its completion mark."""
    for mark in (name for name in Faulty.objects() if name.rpartition("/")[2] in MARKS):
        folder = mark.rpartition("/")[0]
        others = [name for name in Faulty.objects() if name.rpartition("/")[0] == folder and name != mark]
        assert all(put(other) < put(mark) for other in others), mark


def test_a_chain_makes_the_bytes_of_a_local_one(finished: Path, tmp_path: Path) -> None:
    for command in (COLLECT, ("norms",), (*TRAIN, "--device", "cpu"), ("analyze-top-norms", "--top", "2%")):
        outcome = remote(*command)
        assert outcome.code == 0, outcome.err
        assert f"saved: {URL}/" in outcome.err or "saved: 2 artifacts in" in outcome.err
        new_machine(tmp_path)  # every command on a machine of its own
    expected = {}
    for kind in ("activations", "norms", "saes", "top-norms"):
        expected |= local_part(finished, kind)
    found = Faulty.objects()
    assert {name: content for name, content in found.items() if name in expected} == expected
    assert found.keys() == expected.keys()
    assert_marks_come_last()

    inventory = remote("--json", "list")
    sizes = {(row["kind"], row["name"]): row["size"] for row in inventory.json["result"]}
    store = next(row for row in inventory.json["result"] if row["kind"] == "activations")
    assert store["status"] == "complete"
    size = sum(len(content) for name, content in found.items() if name.startswith("activations/"))
    assert sizes["activations", store["name"]] == size
    listed = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert listed == 0, "listing fetches no data"

    again = remote(*COLLECT)
    assert again.code == 0
    assert "already complete" in again.err
    assert nsae("--workspace", URL, "verify").code == 0
    report = remote("report", "--browse", "none")
    assert report.code == 0, report.err
    assert report.out.strip() == f"{URL}/reports/workspace/report.html"
    assert Faulty.objects()["reports/workspace/report.html"].startswith(b"<!")


def test_inputs_named_by_urls(finished: Path, store: str, tmp_path: Path) -> None:
    fs_root = tmp_path / "elsewhere"
    shutil.copytree(finished, fs_root)
    url = f"file://{fs_root}/activations/{store}"
    local = nsae("--workspace", tmp_path / "here", "norms", finished / "activations" / store)
    assert local.code == 0
    outcome = nsae("--workspace", tmp_path / "there", "norms", url)
    assert outcome.code == 0, outcome.err
    assert f"fetching from {url}" in outcome.err
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    [group] = (finished / "saes").iterdir()
    for place, sae in (("here", str(finished / "saes" / group.name)), ("there", f"file://{fs_root}/saes/{group.name}")):
        outcome = nsae(
            "--workspace", tmp_path / place, "analyze-top-norms", sae, "--top", "2%", "--activations",
            url if place == "there" else finished / "activations" / store,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    audited = nsae("--workspace", tmp_path / "there", "audit", f"file://{fs_root}/saes/{group.name}/L2-relu",
                   "--tokens", "2560", "--device", "cpu")  # fmt: skip
    assert audited.code == 0, audited.err
    several = nsae("--workspace", tmp_path / "there", "audit", f"file://{fs_root}/saes/{group.name}")
    assert several.code == 2
    assert "name one of them" in several.message
    assert nsae("--workspace", tmp_path / "there", "verify", url).code == 0


def test_a_failed_upload_ends_with_one_line_and_the_same_command_goes_on(finished: Path, tmp_path: Path) -> None:
    """Training is cut at every third operation of its uploads, and each time goes on elsewhere."""
    assert remote(*COLLECT).code == 0
    train = (*TRAIN, "--device", "cpu", "--checkpoint-every", "50")
    cuts = 0
    for at in range(1, 100, 3):
        Faulty.arm("away", at)
        outcome = remote(*train)
        Faulty.heal()
        new_machine(tmp_path)
        for name in [name for name in Faulty.objects() if name.endswith(".lock")]:
            del Faulty.store[f"/bucket/ws/{name}"]  # as if three minutes had passed
        if outcome.code == 0:
            break
        assert outcome.code == 4
        assert URL in outcome.message
        assert "secret" not in outcome.err
        cuts += 1
    assert cuts > 5
    found, expected = Faulty.objects(), local_part(finished, "saes")
    assert {name: content for name, content in found.items() if name in expected} == expected
    assert {name for name in found if name.startswith("saes/")} == expected.keys()


def test_a_preempted_job_goes_on_on_another_machine(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remote(*COLLECT).code == 0
    steps = iter(range(10**6))
    requested = interrupt.stop_requested
    monkeypatch.setattr(interrupt, "stop_requested", lambda: 15 if next(steps) > 150 else requested())
    outcome = remote(*TRAIN, "--device", "cpu", "--checkpoint-every", "1000")
    assert outcome.code == 143
    monkeypatch.undo()
    monkeypatch.setenv("NSAE_CACHE", str(tmp_path / "another"))
    assert any("/checkpoints/step-" in name for name in Faulty.objects())
    assert not any(name.endswith(".lock") for name in Faulty.objects())
    again = remote(*TRAIN, "--device", "cpu", "--checkpoint-every", "1000")
    assert again.code == 0, again.err
    assert "fetching the checkpoint" in again.err
    expected = local_part(finished, "saes")
    assert {name: content for name, content in Faulty.objects().items() if name.startswith("saes/")} == expected


def test_two_writers_at_a_url() -> None:
    workspace = Workspace.at(URL)
    assert isinstance(workspace, RemoteWorkspace)
    name = ("--name", "shared")
    with lease.writing(workspace.mirror.objects, "activations/shared", SilentReporter()):
        outcome = remote(*COLLECT, *name)
        assert outcome.code == 6
        assert f"process {os.getpid()} on {socket.gethostname()}" in outcome.message
        assert remote("--break-lock", *COLLECT, *name).code == 0
    assert not any(entry.endswith(".lock") for entry in Faulty.objects())


def test_a_lease_that_was_taken_over_uploads_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace.at(URL)
    assert isinstance(workspace, RemoteWorkspace)
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.01)
    with lease.writing(workspace.mirror.objects, "activations/shared", SilentReporter()) as held:
        held.check()
        before = Faulty.objects()["activations/.shared.lock"]
        for _ in range(500):
            if Faulty.objects()["activations/.shared.lock"] != before:
                break
            time.sleep(0.01)
        else:
            pytest.fail("it was not renewed")
        with lease.writing(workspace.mirror.objects, "activations/shared", SilentReporter(), break_lock=True) as other:
            while held.look():
                time.sleep(0.01)
            other.check()
            with pytest.raises(BusyError, match="was taken over by process"):
                held.check()


def test_damage_at_a_url_is_found_and_repaired(tmp_path: Path) -> None:
    assert remote(*COLLECT).code == 0
    expected = Faulty.objects()
    [shard] = [name for name in expected if name.endswith("shard-00000.safetensors")]
    flipped = bytearray(expected[shard])
    flipped[-100] ^= 1
    Faulty().pipe_file(f"{URL}/{shard}", bytes(flipped))
    new_machine(tmp_path)
    outcome = remote("norms")
    assert outcome.code == 3
    assert f"{URL}/{shard}" in outcome.message
    verified = remote("verify")
    assert verified.code == 3
    assert "not what was written" in verified.out
    assert remote("verify", "--repair").code == 0
    assert not any(name.endswith("manifest.json") or name == shard for name in Faulty.objects())
    new_machine(tmp_path)
    assert remote(*COLLECT).code == 0
    assert Faulty.objects() == expected


def test_a_store_of_another_tool_has_no_hashes_and_is_known_by_its_version(tmp_path: Path) -> None:
    url, place = f"{URL}/activations/foreign", tmp_path / "here"
    for sink in (30.0, 3.0):
        folder = write_foreign(tmp_path / f"made-{sink}", make_rows(sink=sink), [240, 240])
        for path in folder.iterdir():
            Faulty().put_file(str(path), f"{url}/{path.name}")
        outcome = nsae("--workspace", place, "norms", url, "--name", f"norms-{sink:g}")
        assert outcome.code == 0, outcome.err
        local = nsae("--workspace", place, "norms", folder, "--name", f"local-{sink:g}")
        assert local.code == 0, local.err
    for sink in ("30", "3"):
        found, expected = (place / "norms" / f"{what}-{sink}" / "norms.safetensors" for what in ("norms", "local"))
        assert found.read_bytes() == expected.read_bytes()


def test_what_is_wrong_with_a_url_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = ("--workspace", tmp_path / "here")
    missing = nsae(*here, "norms", f"{URL}/activations/nothing")
    assert missing.code == 2
    assert "there is nothing at" in missing.message
    assert remote("norms").message.startswith(f"no complete activations in {URL}")
    Faulty().pipe_file(f"{URL}/activations/begun/progress.jsonl", b"")
    unfinished = nsae(*here, "norms", f"{URL}/activations/begun")
    assert unfinished.code == 2 or "not finished" in unfinished.message
    monkeypatch.setenv("NSAE_WORKSPACE", "nowhere://bucket/ws")
    unknown = nsae("list")
    assert unknown.code == 2
    assert "no package opens nowhere://" in unknown.message
    monkeypatch.setenv("NSAE_WORKSPACE", "ftp://user:hunter2@127.0.0.1:1/ws?token=hunter2")
    refused = nsae("list")
    assert refused.code == 4
    assert "hunter2" not in refused.err

"""`nsae --workspace URL`: the bytes are those of a local workspace, and whatever fails, the same command goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from faulty_place import URL, Faulty

from command import TRAIN, Outcome, contents, nsae

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


@pytest.mark.parametrize("fault", ["error", "after"])
def test_a_passing_failure_is_not_noticed(fault: str) -> None:
    Faulty.arm(fault, at=0)
    operations = 0
    while True:
        Faulty.clear()
        Faulty.arm(fault, at=operations)
        outcome = remote("--quiet", *COLLECT)
        assert outcome.code == 0, outcome.err
        if Faulty.count <= operations:
            break
        operations += 5
    assert operations > 10

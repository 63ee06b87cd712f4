"""`nsae verify`: finds every damage, and --repair drops just that, so that the same command makes it anew."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import TRAIN, Outcome, contents, nsae
from hand_store import HOOK, make_rows, write_foreign, write_full
from nsae_cli.store.commit import tensor_sha256
from sealed_json import edit_json, seal_again

COLLECT = ("collect", "--model", "mini-sink", "--device", "cpu", "--tokens", "4k", "--batch-size", "8", "--name", "st")


def verify(workspace: Path, *arguments: object) -> tuple[Outcome, dict[str, dict]]:
    """Runs ``nsae --json verify``; by kind/name what it says of each artifact."""
    outcome = nsae("--workspace", workspace, "--json", "verify", *arguments)
    return outcome, {f"{row['kind']}/{row['name']}": row for row in json.loads(outcome.out)["result"]}


def flip(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def damage_of(row: dict) -> list[str]:
    return [f"{finding['file']}: {finding['text']}" for finding in row["findings"] if finding["level"] == "damaged"]


def test_a_whole_workspace_is_ok(finished: Path) -> None:
    before = contents(finished)
    outcome, found = verify(finished)
    assert outcome.code == 0, outcome.err
    kinds = {name.partition("/")[0] for name in found}
    assert kinds == {"activations", "norms", "saes", "top-norms", "evals", "audits"}
    assert {row["state"] for row in found.values()} == {"ok"}
    assert all(row["findings"] == [] for row in found.values()), found
    assert contents(finished) == before
    printed = nsae("--workspace", finished, "verify")
    assert printed.code == 0
    assert printed.out.count(" ok") == len(found)


@pytest.mark.parametrize(
    ("pattern", "artifact"),
    [
        ("activations/*/shard-00000.safetensors", "activations"),
        ("activations/*/manifest.json", "activations"),
        ("norms/*/norms.json", "norms"),
        ("norms/*/norms.safetensors", "norms"),
        ("saes/*/group.json", "saes"),
        ("saes/*/L2-relu/cfg.json", "saes"),
        ("saes/*/L2-relu/run.json", "saes"),
        ("saes/*/L2-relu/metrics.jsonl", "saes"),
        ("saes/*/L2-relu/features.safetensors", "saes"),
        ("saes/*/L2-relu/sae_weights.safetensors", "saes"),
        ("top-norms/*L2-relu/top_norms.safetensors", "top-norms"),
        ("top-norms/*L2-relu/top_norms.json", "top-norms"),
        ("evals/*L2-relu/contexts.safetensors", "evals"),
        ("evals/*L2-relu/eval.json", "evals"),
        ("audits/*/audit.json", "audits"),
    ],
)
def test_one_bit_of_any_file_is_found(workspace: Path, pattern: str, artifact: str) -> None:
    path = sorted(workspace.glob(pattern))[0]
    digits = [match.start() for match in re.finditer(rb"(?<=[ :])[1-8]", path.read_bytes())]
    flip(path, digits[len(digits) // 2] if path.suffix in (".json", ".jsonl") else -5)
    outcome, found = verify(workspace)
    assert outcome.code == 3
    [line] = [line for line in outcome.err.splitlines() if line.startswith("nsae: ")]
    assert "1 finding of damage" in line
    assert "nsae verify --repair" in line
    damaged = {name: damage_of(row) for name, row in found.items() if row["state"] == "damaged"}
    [(name, [said])] = damaged.items()
    assert name.startswith(artifact)
    assert path.name in said


@pytest.mark.parametrize("kind", ["norms", "top-norms", "evals", "audits", "saes"])
def test_repair_lets_the_same_command_make_an_artifact_again(workspace: Path, kind: str) -> None:
    whole = contents(workspace)
    mark = sorted(workspace.glob(f"{kind}/*/*.json" if kind != "saes" else "saes/*/L2-relu/run.json"))[0]
    flip(mark, -10)  # in the checksum itself
    outcome, found = verify(workspace, "--repair")
    assert outcome.code == 0, outcome.err
    [row] = [row for row in found.values() if row["state"] == "repaired"]
    assert "run the same `nsae" in row["repaired"][-1]
    assert not mark.exists()
    states = {name: row["state"] for name, row in verify(workspace)[1].items()}
    assert states["saes/" + mark.parents[1].name if kind == "saes" else f"{kind}/{mark.parent.name}"] == "unfinished"
    command = {
        "norms": ("norms",),
        "top-norms": ("analyze-top-norms", "--top", "2%"),
        "evals": ("eval", "--device", "cpu"),
        "audits": ("audit", "--device", "cpu", "--tokens", "2560"),
        "saes": (*TRAIN, "--device", "cpu"),
    }[kind]
    assert nsae("--workspace", workspace, *command).code == 0
    again = contents(workspace)
    again = {name: content for name, content in again.items() if not name.endswith(".damaged.tmp")}
    assert again == whole
    assert verify(workspace)[0].code == 0


def test_only_the_damaged_shard_of_a_store_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsae_cli.lm import plan
    from nsae_cli.store.writer import StoreWriter

    monkeypatch.setattr(plan, "MAX_SHARD_BYTES", 200_000)
    assert nsae("--workspace", tmp_path, *COLLECT).code == 0
    store = tmp_path / "activations" / "st"
    whole = contents(store)
    shards = sorted(name for name in whole if name.startswith("shard"))
    assert len(shards) > 3
    flip(store / shards[1], len(whole[shards[1]]) // 2)
    outcome = nsae("--workspace", tmp_path, *TRAIN, "--device", "cpu")
    assert (outcome.code, "nsae verify --repair" in outcome.message) == (3, True)
    outcome, found = verify(tmp_path, "--repair", "st")
    assert outcome.code == 0, outcome.err
    assert "dropped 1 shard" in found["activations/st"]["repaired"][0]
    assert verify(tmp_path)[1]["activations/st"]["state"] == "unfinished"
    written: list[int] = []
    write = StoreWriter.write

    def record(self: StoreWriter, index: int, *rest: Any, **named: Any) -> None:
        written.append(index)
        write(self, index, *rest, **named)

    monkeypatch.setattr(StoreWriter, "write", record)
    assert nsae("--workspace", tmp_path, *COLLECT).code == 0
    assert written == [1]
    assert contents(store) == whole
    assert verify(tmp_path)[1]["activations/st"]["state"] == "ok"


def test_an_altered_store_is_repaired_too(tmp_path: Path) -> None:
    write_full(tmp_path / "activations" / "s", make_rows(), [160, 160, 160])
    alter = ("--workspace", tmp_path, "alter", "s", "--permute-norms", "--name", "a")
    assert nsae(*alter).code == 0
    whole = contents(tmp_path / "activations" / "a")
    flip(tmp_path / "activations" / "a" / "shard-00002.safetensors")
    (tmp_path / "activations" / "a" / "shard-00000.safetensors").unlink()
    _, found = verify(tmp_path, "a", "--repair")
    assert "`nsae alter`" in found["activations/a"]["repaired"][1]
    assert nsae(*alter).code == 0
    assert contents(tmp_path / "activations" / "a") == whole


def hand_store(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A store whose second shard is changed and whose hashes say that it is right so."""
    write_full(folder, make_rows(), [160, 160, 160])
    path = folder / "shard-00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[1] |= {
        "bytes": path.stat().st_size,
        "tensors": {name: tensor_sha256(tensor) for name, tensor in sorted(tensors.items())},
    }
    edit_json(folder / "manifest.json", shards=shards)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["norms"].__setitem__((7, 0), t["norms"][7, 0] * 1.01), "norms at .* row 7:"),
        (lambda t: t["norms"].__setitem__((3, 0), float("nan")), "1 rows of norms are not finite"),
        (lambda t: t[HOOK].__setitem__((5, 2), float("inf")), "1 rows hold NaN or infinity, the first is row 5"),
        (lambda t: t["positions"].__setitem__(9, 5), "positions do not go on"),
        (lambda t: t["positions"].__setitem__(slice(8, 16), torch.arange(8, dtype=torch.int32) + 1), "positions"),
        (lambda t: t["tokens"].__setitem__(0, -3), "tokens holds -3"),
        (lambda t: t.__setitem__(HOOK, t[HOOK].float()), "float32, the manifest says"),
        (lambda t: t.pop(HOOK), "no tensor"),
    ],
)
def test_values_that_cannot_be_are_found_even_under_right_hashes(tmp_path, change, said):
    hand_store(tmp_path / "activations" / "s", change)
    outcome, found = verify(tmp_path)
    assert outcome.code == 3
    assert all(text.startswith("shard-00001") for text in damage_of(found["activations/s"]))
    assert any(re.search(said, text) for text in damage_of(found["activations/s"])), damage_of(found["activations/s"])


def test_a_store_of_another_tool(tmp_path: Path) -> None:
    rows = make_rows()
    folder = write_foreign(tmp_path / "activations" / "mine", rows, [200, 280])
    outcome, found = verify(tmp_path)
    assert outcome.code == 0
    assert [finding["level"] for finding in found["activations/mine"]["findings"]] == ["note"]
    (folder / "part1.safetensors").write_bytes(b"\x80\x04pickle")
    outcome, found = verify(tmp_path, "--repair")
    assert outcome.code == 3
    assert "mine was not made by nsae: get it again" in outcome.err
    assert (folder / "manifest.json").exists()


def test_leftovers_and_strangers_are_notes(workspace: Path, store: str) -> None:
    folder = workspace / "activations" / store
    (folder / ".shard-00009.safetensors.01234567.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    outcome, found = verify(workspace, store)
    assert outcome.code == 0
    texts = [finding["text"] for finding in found[f"activations/{store}"]["findings"]]
    assert len(texts) == 2
    assert "killed" in texts[0]
    assert texts[1] == "not of this artifact"


def test_a_number_in_an_sae_that_is_not_finite(workspace: Path) -> None:
    cell = sorted(workspace.glob("saes/*/L2-relu"))[0]
    weights = load_file(cell / "sae_weights.safetensors")
    weights["b_dec"][0] = float("nan")
    save_file(weights, cell / "sae_weights.safetensors")
    hashes = json.loads((cell / "run.json").read_text())["weights_sha256"]
    edit_json(cell / "run.json", weights_sha256=hashes | {"b_dec": tensor_sha256(weights["b_dec"])})
    seal_again(cell / "run.json")
    _, found = verify(workspace, cell)
    [row] = found.values()
    assert damage_of(row) == ["sae_weights.safetensors: b_dec holds 1 values that are not finite"]


def test_names_paths_and_what_is_not_there(workspace: Path, store: str, tmp_path: Path) -> None:
    [group] = [folder.name for folder in (workspace / "saes").iterdir()]
    assert set(verify(workspace, store)[1]) == {f"activations/{store}", f"norms/{store}"}
    assert set(verify(workspace, f"{group}/L2-relu")[1]) == {f"saes/{group}/L2-relu"}
    assert set(verify(workspace, workspace / "activations" / store)[1]) == {f"activations/{store}"}
    assert len(verify(tmp_path / "elsewhere", workspace)[1]) == len(verify(workspace)[1])
    outcome = nsae("--workspace", workspace, "verify", "nothing")
    assert outcome.code == 2
    assert "nothing" in outcome.message
    assert nsae("--workspace", tmp_path / "none", "verify").code == 2


def test_damaged_checkpoints_are_removed(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsae_cli.errors import Interrupted
    from nsae_cli.training import loop

    shutil.rmtree(workspace / "saes")

    def stop(*_: object) -> None:
        raise Interrupted(15, "stopped")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish_cell", stop)
        assert nsae("--workspace", workspace, *TRAIN, "--device", "cpu", "--checkpoint-every", "50").code == 143
    [run] = (workspace / "saes").iterdir()
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert len(steps) == 2
    flip(run / "checkpoints" / steps[-1] / "state.safetensors")
    outcome, found = verify(workspace, run.name)
    assert outcome.code == 3
    assert damage_of(found[f"saes/{run.name}"]) == [
        f"checkpoints/{steps[-1]}: state.safetensors is not what was written"
    ]
    outcome, found = verify(workspace, run.name, "--repair")
    assert outcome.code == 0
    assert found[f"saes/{run.name}"]["repaired"][0] == f"removed checkpoints/{steps[-1]}"
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == steps[:1]
    flip(run / "checkpoints" / "begun.json", -10)
    _, found = verify(workspace, run.name, "--repair")
    assert "removed checkpoints: " in found[f"saes/{run.name}"]["repaired"][0]
    assert nsae("--workspace", workspace, *TRAIN, "--device", "cpu").code == 0
    assert verify(workspace)[0].code == 0

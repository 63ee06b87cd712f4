"""`nsae collect --worker` and `--dry-run` as a user meets them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from command import Outcome, contents, nsae
from nsae_cli.launch import Placement
from nsae_cli.reporter import SilentReporter
from nsae_cli.store import lock
from nsae_cli.store.progress import durable_shards, progress_files, read_progress
from nsae_cli.store.shards import shard_name

COLLECT = ("collect", "--model", "mini", "--tokens", "7k", "--device", "cpu", "--name", "s")
SHARDS = 7


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsae_cli.lm.plan.MAX_SHARD_ROWS", 1024)


def collect(workspace: Path, worker: str, *more: str) -> Outcome:
    return nsae("--workspace", workspace, *COLLECT, "--worker", worker, *more)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    assert collect(tmp_path / "whole", "off").code == 0
    return contents(tmp_path / "whole")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A store whose workers 0 and 1 of 3 have made their shards."""
    for worker in ("1/3", "0/3"):
        assert collect(tmp_path, worker).code == 0
    return tmp_path / "activations" / "s"


def test_the_last_worker_completes_the_store(tmp_path: Path, whole: dict[str, bytes]) -> None:
    first = collect(tmp_path / "shared", "1/3")
    assert (first.code, first.out) == (0, "")
    assert first.err.splitlines() == [
        "worker 1/3: 2 shards made; 5 of 7 shards left to other workers (not at work: 0, 2)"
    ]
    second = collect(tmp_path / "shared", "0/3")
    assert "going on after 2,048 rows in 2 shards" in second.err
    assert second.err.splitlines()[-1].endswith("2 of 7 shards left to other workers (not at work: 2)")
    last = nsae("--workspace", tmp_path / "shared", "--json", *COLLECT, "--worker", "2/3")
    assert last.json["result"]["rows"] == 6912
    assert "worker 2/3: 2 shards made; the store is complete" in last.err
    assert contents(tmp_path / "shared") == whole
    again = collect(tmp_path / "shared", "2/3")
    assert (again.code, again.out, again.err) == (0, "", "worker 2/3: s is already complete\n")
    assert "already complete" in collect(tmp_path / "shared", "0/3").err


def test_dropped_is_counted_in_any_share(tmp_path: Path) -> None:
    """The corpus ends in the middle of a context; the last worker to come has not read that part for a shard."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": "a few words " * n}) + "\n" for n in range(60)))
    command = ("collect", "--model", "mini", "--corpus", tmp_path / "text.jsonl", "--device", "cpu", "--tokens", "1M")
    alone = nsae("--workspace", tmp_path / "alone", "--json", *command).json["result"]
    assert alone["dropped"]["tokens"] > 0
    assert len(alone["shards"]) > 3
    for rank in (3, 2, 1):
        assert nsae("--workspace", tmp_path / "shared", *command, "--worker", f"{rank}/4").code == 0
    last = nsae("--workspace", tmp_path / "shared", "--json", *command, "--worker", "0/4")
    assert last.json["result"] == alone


def test_another_number_of_workers_goes_on(begun: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert len(progress_files(begun)) == 2
    assert collect(tmp_path, "1/2").code == 0
    assert collect(tmp_path, "0/2").code == 0
    assert contents(begun) == {name.rsplit("/", 1)[-1]: content for name, content in whole.items()}


def test_a_worker_that_has_died_is_told_of(tmp_path: Path) -> None:
    """Its lock is there and nobody holds it. (tests/faults kills real ones.)"""
    real = lock.Turn.others

    def died(turn: lock.Turn) -> object:
        holder = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "2026-01-02 03:04:05"}
        (tmp_path / "activations" / ".s.lock-1-of-3").write_text(json.dumps(holder))
        return real(turn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.Turn, "others", died)
        outcome = collect(tmp_path, "2/3")
    assert outcome.code == 3
    assert outcome.message == (
        "worker 2/3: s: shard 1, 4 missing, left by worker 1 that has died; run the same command again, "
        "with any number of workers"
    )
    again = collect(tmp_path, "off")
    assert again.code == 0
    assert "warning: s: process 4194305 on" in again.err


def test_options_of_another_worker_are_refused_by_name(begun: Path, tmp_path: Path) -> None:
    outcome = collect(tmp_path, "2/3", "--batch-size", "4")
    assert (outcome.code, outcome.message) == (
        2,
        "worker 2/3: s was begun with other options (--batch-size 8 -> 4); give the same, or another --name",
    )
    with lock.writing(begun, SilentReporter(), worker=Placement(1, 3), software={"torch": "1.0"}):
        outcome = collect(tmp_path, "2/3")
        assert outcome.code == 2
        assert "worker 2/3: worker 1/3 has other software" in outcome.message
        assert "torch 1.0, here 2." in outcome.message
        assert collect(tmp_path, "1/3").code == 6
        assert collect(tmp_path, "0/2").code == 6
        assert collect(tmp_path, "off").code == 6


def test_what_the_launcher_says_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "worker 1/2" in nsae("--workspace", tmp_path, *COLLECT).err
    assert nsae("--workspace", tmp_path, *COLLECT, "--worker", "off").code == 0
    monkeypatch.setenv("RANK", "2")
    assert nsae("--workspace", tmp_path, *COLLECT).code == 2


def test_a_shard_that_was_made_twice_counts_as_it_is_now(begun: Path, tmp_path: Path) -> None:
    """A shard of worker 1 is lost and made again with other bytes; both lines are there."""
    shard = begun / shard_name(1)
    kept = tmp_path / "progress-1.jsonl"
    shutil.copy(begun / kept.name, kept)
    changed = load_file(shard)
    changed["norms"] += 1
    lines = (begun / "progress-1.jsonl").read_text().splitlines()
    shard.unlink()
    assert collect(tmp_path, "1/2").code == 0  # makes shards 1, 3 and 5: 3 was there
    shutil.copy(begun / "progress-1.jsonl", begun / "progress-2.jsonl")
    (begun / "progress-1.jsonl").write_text("\n".join(lines) + "\n")
    entry = read_progress(begun / "progress-2.jsonl").entries[1]
    assert durable_shards(begun)[1] == entry
    save_file(changed, shard)
    stated = durable_shards(begun)[1]
    assert stated == entry, "where neither line fits, the difference is for verify to find"
    outcome = nsae("--workspace", tmp_path, "verify", "s")
    assert (outcome.code, "SHA-256 differs" in outcome.out) == (3, True)


def test_verify_and_repair_of_an_unfinished_store(begun: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    outcome = nsae("--workspace", tmp_path, "--json", "verify", "s")
    [found] = json.loads(outcome.out)["result"]
    assert (outcome.code, found["state"]) == (0, "unfinished")
    assert found["findings"] == [
        {"level": "unfinished", "file": "", "text": "not finished: 5 shards so far, by 2 workers"}
    ]
    flipped = bytearray((begun / shard_name(4)).read_bytes())
    flipped[-100] ^= 1
    (begun / shard_name(4)).write_bytes(flipped)
    assert nsae("--workspace", tmp_path, "verify", "s").code == 3
    with lock.writing(begun, SilentReporter(), worker=Placement(2, 3)):
        assert nsae("--workspace", tmp_path, "verify", "--repair", "s").code == 6
    assert nsae("--workspace", tmp_path, "verify", "--repair", "s").code == 0
    assert [path.name for path in progress_files(begun)] == ["progress.jsonl"]
    assert sorted(durable_shards(begun)) == [0, 1, 3, 6]
    assert collect(tmp_path, "off").code == 0
    assert contents(tmp_path / "activations") == {k.partition("/")[2]: v for k, v in whole.items()}


def test_a_record_without_its_first_line_costs_its_own_shards(begun: Path, tmp_path: Path) -> None:
    (begun / "progress-1.jsonl").write_text("{}\n")
    assert nsae("--workspace", tmp_path, "train", "s").code == 3
    assert collect(tmp_path, "2/3").code == 3
    assert nsae("--workspace", tmp_path, "verify", "--repair", "s").code == 0
    assert sorted(durable_shards(begun)) == [0, 3, 6]
    assert "made" in collect(tmp_path, "off").err or (begun / "manifest.json").exists()


def test_what_a_worker_left_beside_a_complete_store_is_tidied(tmp_path: Path, whole: dict[str, bytes]) -> None:
    store = tmp_path / "whole" / "activations" / "s"
    for name in ("progress.jsonl", "progress-2.jsonl", ".shard-00003.safetensors.12345678.tmp"):
        (store / name).write_text("{}\n")
    (store.parent / ".s.lock-all").write_text("")
    outcome = nsae("--workspace", tmp_path / "whole", "verify", "s")
    assert (outcome.code, "progress-2.jsonl" in outcome.out) == (0, True)
    assert collect(tmp_path / "whole", "1/3").code == 0
    assert contents(tmp_path / "whole") == whole


# The plan ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_foretells_and_writes_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    command = ("--workspace", tmp_path / "none", "--json", *COLLECT, "--dry-run")
    plan = nsae(*command).json["result"]
    assert not (tmp_path / "none").exists()
    manifest = json.loads(whole["activations/s/manifest.json"])
    assert (plan["rows"], plan["shards"], plan["contexts"]) == (manifest["rows"], SHARDS, manifest["rows"] // 128)
    assert plan["bytes"] == manifest["rows"] * (64 * 2 + 4 * 4 + 12)
    on_disk = sum(len(content) for name, content in whole.items() if name.endswith(".safetensors"))
    assert 0 <= on_disk - plan["bytes"] < SHARDS * 1024  # the headers
    assert (plan["state"], plan["fits"], plan["unknown_time"]) == ("new", True, None)
    assert plan["seconds"] == pytest.approx(plan["rows"] / plan["rows_per_second"])
    assert plan["path"] == str(tmp_path / "none" / "activations" / "s")
    shared = nsae(*command, "--worker", "2/4").json["result"]
    assert shared["seconds"] == pytest.approx(plan["rows"] / shared["rows_per_second"] / 4)


def test_a_dry_run_of_what_is_begun_and_of_what_is_done(begun: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    before = contents(tmp_path)
    plan = nsae("--workspace", tmp_path, "--json", *COLLECT, "--dry-run").json["result"]
    assert (plan["state"], plan["durable_shards"], plan["durable_rows"]) == ("unfinished", 5, 4864)
    assert plan["seconds"] == pytest.approx((plan["rows"] - 4864) / plan["rows_per_second"])
    done = nsae("--workspace", tmp_path / "whole", *COLLECT, "--dry-run")
    assert "complete, nothing is left to do" in done.out
    assert contents(tmp_path) == before
    assert nsae("--workspace", tmp_path, *COLLECT, "--dry-run", "--seed", "3").code == 2


def test_a_dry_run_says_what_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsae_cli.lm.dry_run._is_here", lambda _: False)
    monkeypatch.setattr("nsae_cli.lm.plan.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    outcome = nsae("--workspace", tmp_path, *COLLECT, "--dry-run")
    assert outcome.code == 0
    assert "not known: the model's weights are not on this machine" in outcome.out
    assert "warning: the store does not fit on the disk" in outcome.err


# Started by torchrun -------------------------------------------------------------------------------------------------

_MAIN = "from nsae_cli.lm import plan; plan.MAX_SHARD_ROWS = 1024; from nsae_cli.cli.app import main; main()"


def test_torchrun(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """The launcher itself: what it sets in the environment, and one JSON object for all."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2"]
    command = [sys.executable, "-c", _MAIN, "--workspace", str(tmp_path / "shared"), "--json", *COLLECT]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["rows"] == 6912
    assert contents(tmp_path / "shared") == whole
    assert {f"worker {rank}/2" for rank in range(2)} <= {line.partition(":")[0] for line in done.stderr.splitlines()}

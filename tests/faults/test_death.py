"""Commands that are killed and run again end in the same bytes: a share of what `make torture` tries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import checks
import crash_points
import power_cut
import pytest
from forked import Server
from stages import Prepared, Stages

from command import contents


@pytest.mark.parametrize(("stage", "every"), [("collect", 19), ("train", 41), ("norms", 30)])
def test_death_at_an_operation(server: Server, stages: Stages, folder: Path, stage: str, every: int) -> None:
    prepared = stages.get(stage)
    points = range(1, len(prepared.undisturbed.operations) + 1, every)
    tally = crash_points.die_at_every_operation(server, prepared, folder, points=points)
    tally.require()
    assert tally.tried >= len(points) - 1


def test_the_last_death_point_is_the_last_operation(server: Server, stages: Stages, folder: Path) -> None:
    """The count of operations is right: a fault at the last one is met, one behind it is not."""
    prepared = stages.get("norms")
    last = len(prepared.undisturbed.operations)
    assert crash_points.die_at_every_operation(server, prepared, folder, points=[last, last + 1]).tried == 1


def test_death_while_recovering(server: Server, trained: Prepared, folder: Path) -> None:
    last = len(trained.undisturbed.operations)
    tally = crash_points.die_twice(server, trained, folder, [(last * 3 // 4, 40)])
    tally.require()
    assert tally.counts["second death met"] == 1


@pytest.mark.parametrize(
    ("stage", "trials", "resuming"), [("collect", 3, False), ("train", 2, False), ("train", 2, True)]
)
def test_kill_at_a_random_time(
    server: Server, stages: Stages, folder: Path, stage: str, trials: int, resuming: bool
) -> None:
    prepared = stages.get(stage)
    crash_points.kill_at_random_times(server, prepared, folder, trials, seed=1, resuming=resuming).require()


def test_a_torn_log(server: Server, trained: Prepared, folder: Path) -> None:
    crash_points.tear_the_log(server, trained, folder, every=700).require()


@pytest.mark.parametrize("stage", ["collect", "train", "norms"])
def test_the_order_of_operations_survives_a_power_cut(stages: Stages, stage: str) -> None:
    power_cut.order_of_operations(stages.get(stage)).require()


@pytest.mark.parametrize(("stage", "every"), [("collect", 37), ("train", 90)])
def test_power_cut(server: Server, stages: Stages, folder: Path, stage: str, every: int) -> None:
    prepared = stages.get(stage)
    points = range(5, len(prepared.undisturbed.operations) + 1, every)
    power_cut.cut_power(server, prepared, folder, points, outcomes=2, seed=0).require()


def test_a_clock_that_runs_backwards(server: Server, trained: Prepared, folder: Path) -> None:
    power_cut.turn_clock_back(server, trained, folder, [len(trained.undisturbed.operations) * 2 // 3]).require()


def test_a_disk_in_the_model_loses_what_was_not_flushed(server: Server, trained: Prepared, folder: Path) -> None:
    """The simulator itself: with every pending change kept it is the real folder, and some cut loses something."""
    from random import Random

    workspace, snapshots = trained.begin(folder), folder / "snapshots"
    snapshots.mkdir()
    at = len(trained.undisturbed.operations) // 2
    died = server.run(trained.trial(workspace, fault={"at": at, "how": "kill"}, snapshots=str(snapshots)))

    class Keeps(Random):
        def random(self) -> float:
            return 0.0

        def randrange(self, *_: object) -> int:
            return 1

    kept = folder / "kept"
    kept.mkdir()
    power_cut.replay(trained, workspace, died, snapshots).cut(Keeps(), kept)
    assert contents(kept) == contents(workspace)
    differs = 0
    for seed in range(10):
        power_cut.replay(trained, workspace, died, snapshots).cut(Random(seed), folder / f"cut{seed}")
        differs += contents(folder / f"cut{seed}") != contents(workspace)
    assert differs >= 5


def test_the_checks_find_what_they_are_for(trained: Prepared, folder: Path) -> None:
    """A half file under a final name, other bytes, a lock and a temporary file are each reported."""
    workspace = folder / "whole"
    for path, content in trained.whole.items():
        (workspace / path).parent.mkdir(parents=True, exist_ok=True)
        (workspace / path).write_bytes(content)
    assert checks.differences(trained, workspace) == []
    assert checks.half_files(trained, workspace) == []
    weights = workspace / "saes/one/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (workspace / "saes/.one.lock").write_text("")
    (workspace / "saes/one/.run.json.12345678.tmp").mkdir()
    assert checks.half_files(trained, workspace) == [
        "saes/one/sae_weights.safetensors is half a file, or one that an undisturbed run does not write"
    ]
    assert checks.differences(trained, workspace) == [
        "saes/.one.lock is left over",
        "saes/one/sae_weights.safetensors has other bytes",
        "saes/one/.run.json.12345678.tmp is left over",
    ]
    log = workspace / "saes/one/metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-5])
    assert "saes/one/metrics.jsonl is not whole beside its run.json" in checks.half_files(trained, workspace)
    checkpoint = workspace / "saes/one/checkpoints/step-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "files.json").write_text(json.dumps({"state.json": "0" * 64}))
    assert "checkpoint step-3 is not what its files.json says" in checks.half_files(trained, workspace)
    shutil.rmtree(workspace)

"""`nsae train --log-to` on the command line, with TensorBoard: what arrives, what is resumed, what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from test_process import _INTERRUPTED_TRAINING, _MAIN, run

from command import TRAIN, contents, nsae
from nsae_cli.training import tracker_kinds
from nsae_cli.training.trackers import series


def _assert_tensorboard_has(log: Path, events: Path) -> None:
    """Every number of every line of a metrics.jsonl, as float32, and nothing else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        for name, value in series(record).items():
            expected.setdefault(name, []).append((record["step"], float(np.float32(value))))
    assert set(reader.Tags()["scalars"]) == set(expected)
    assert {"loss", "fvu_ns", "loss_share/sinks", "bias_ratio/b9", "grad_share/W_dec/b0"} < set(expected)
    for name, points in expected.items():
        assert [(event.step, event.value) for event in reader.Scalars(name)] == points, name


def test_a_grid_and_an_interruption(workspace: Path, finished: Path) -> None:
    """Stopped once and gone on with, it is the same files, and TensorBoard has every line once, as a run per SAE."""
    [group] = (finished / "saes").iterdir()
    (workspace / "saes").rename(workspace / "away")
    command = ("--workspace", workspace, *TRAIN, "--device", "cpu", "--log-to", "tensorboard")
    stopped = run(*command, "--checkpoint-every", "60", code=_INTERRUPTED_TRAINING + _MAIN)
    assert stopped.returncode == 130, stopped.stderr
    assert f"tensorboard: tensorboard --logdir {workspace}/tensorboard" in stopped.stderr
    done = nsae(*command, "--checkpoint-every", "60")
    assert done.code == 0, done.err
    assert "going on from the checkpoint at step 101" in done.err
    assert "warning" not in done.err
    assert contents(workspace / "saes") == contents(finished / "saes")
    for cell in sorted(path.name for path in (finished / "saes" / group.name).glob("L*")):
        folder = finished / "saes" / group.name / cell
        _assert_tensorboard_has(folder / "metrics.jsonl", workspace / "tensorboard" / group.name / cell)
    again = nsae(*command)
    assert (again.code, "already complete" in again.err, "tensorboard" in again.err) == (0, True, False)


def test_a_tracker_that_fails(workspace: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(followed: object) -> tracker_kinds.TensorBoardRun:
        raise PermissionError("no such luck")

    monkeypatch.setitem(tracker_kinds.KINDS, "tensorboard", fail)
    (workspace / "saes").rename(workspace / "away")
    done = nsae("--workspace", workspace, *TRAIN, "--device", "cpu", "--log-to", "tensorboard")
    assert done.code == 0
    [warning] = [line for line in done.err.splitlines() if "warning" in line]
    assert warning == ("warning: --log-to tensorboard: no such luck; going on without it, metrics.jsonl has every line")
    assert contents(workspace / "saes") == contents(finished / "saes")


def test_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(workspace)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    for given, said in {
        "wandb": "--log-to wandb: expected an installed package, and wandb is not: pip install 'nsae[wandb]'",
        "mlflow": "--log-to mlflow: expected wandb, tensorboard or trackio",
        "tensorboard,tensorboard": "--log-to tensorboard,tensorboard: expected each value once",
    }.items():
        outcome = nsae("--workspace", workspace, *TRAIN, "--log-to", given)
        assert (outcome.code, outcome.message) == (2, said)
    config = workspace / "c.yaml"
    config.write_text("stages:\n- train:\n    from_model: mini\n    log_to: [tensorboard, wandb]\n")
    outcome = nsae("--workspace", workspace, "run", config)
    assert outcome.code == 2
    assert "c.yaml:4" in outcome.message
    assert "pip install 'nsae[wandb]'" in outcome.message
    config.unlink()
    assert contents(workspace) == before

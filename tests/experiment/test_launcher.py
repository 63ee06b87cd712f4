"""`nsae run --launcher submitit`: jobs of a cluster make what one process makes, also those that were preempted."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from command import Outcome, contents, nsae
from nsae_cli import interrupt
from nsae_cli.errors import Interrupted, UsageError
from nsae_cli.experiment.config import load_config
from nsae_cli.experiment.job import Command
from nsae_cli.experiment.launcher import SubmititLauncher, Unit
from nsae_cli.experiment.launcher_options import SlurmOptions, parse_slurm_options
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.workspace import Workspace

CONFIG = """
stages:
  - collect: {model: mini-sink, tokens: 6k, device: cpu, name: s}
  - train: {activations: s, act: [relu, tanh-relu], d_sae: 64, batch_size: 64, tokens: 160k, checkpoint_every: 50,
            device: cpu, name: g}
  - analyze-top-norms: {saes: g, top: 5%, name: a}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml and the workspace `runs` that running it in this process made."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "config.yaml").write_text(CONFIG)
    assert nsae("--workspace", folder / "runs", "run", folder / "config.yaml").code == 0
    return folder


def launch(workspace: Path, config: Path, *arguments: str) -> Outcome:
    return nsae(
        "--workspace", workspace, "run", config, "--launcher", "submitit", "--slurm", "cluster=local", *arguments
    )


def descendants(process: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    children = map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    return [found for child in children for found in (child, *descendants(child))]


def preempt(controller: int) -> None:
    """As SLURM does it: SIGUSR2 for every process of the job. (submitit's local controller itself would die of it.)"""
    for process in descendants(controller):
        os.kill(process, signal.SIGUSR2)


def results(workspace: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(workspace).items() if not name.startswith("jobs/")}


def test_a_preempted_job_is_requeued_and_makes_the_same_bytes(here: Path, tmp_path: Path) -> None:
    """The cells of a grid as jobs; one is told to make room in the midst of training."""
    config, place = here / "config.yaml", tmp_path / "runs"
    assert nsae("--workspace", place, "run", config, "--stage", "1").code == 0
    workspace = Workspace(place)
    options = SlurmOptions(cluster="local", time=10)
    launcher = SubmititLauncher(config, workspace, options, True, SilentReporter())
    units = launcher._units(2, load_config(config, workspace)[1], ["s"])
    assert [unit.cell for unit in units] == ["L2-relu", "L2-tanh-relu"]
    (place / "jobs").mkdir()
    jobs = launcher._submit(units)
    deadline = time.monotonic() + 120
    checkpoints = place / "saes" / "g" / "L2-relu" / "checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    preempt(int(jobs[0][1].job_id))
    launcher._wait(jobs)
    assert all(map(launcher._is_done, units))
    log = jobs[0][1].paths.stderr.read_text()
    assert "nsae: stopped" in log
    assert log.count("[2/3] train g L2-relu") == 2
    assert "going on from the checkpoint" in log
    assert "Requeued job" in jobs[0][1].paths.stdout.read_text()
    outcome = launch(place, config)
    assert outcome.code == 0, outcome.err
    assert "stage 2" not in outcome.err, "what the jobs have made is not submitted again"
    assert "stage 3, analyze-top-norms a: 1 job submitted" in outcome.err
    assert results(place) == results(here / "runs")


def test_slurm_options() -> None:
    options = parse_slurm_options(["partition=gpu", "time=1-02:30:00", "gpus=1", "mem=64G", "mail-user=me", "cpus=4"])
    parameters = options.slurm_parameters("nsae-x")
    assert parameters["time"] == 26 * 60 + 30
    assert (parameters["partition"], parameters["gpus_per_node"], parameters["cpus_per_task"]) == ("gpu", 1, 4)
    assert parameters["mem"] == "64G"
    assert parameters["additional_parameters"] == {"requeue": True, "mail-user": "me"}
    for wrong in (["gpu"], ["gpus=-1"], ["mem=much"], ["time=soon"], ["time=1", "time=2"], ["a b=1"], ["x="]):
        with pytest.raises(UsageError, match=r"--slurm|gpus|mem|time"):
            parse_slurm_options(wrong)


def test_whole_stages_as_jobs_and_a_second_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --split stages a grid is one job; what is there is not submitted again; nothing of submitit is unpickled."""
    monkeypatch.setattr("submitit.core.utils.pickle_load", None)
    small = tmp_path / "small.yaml"
    small.write_text(CONFIG.replace("160k", "4k").split("  - analyze")[0])
    assert nsae("--workspace", tmp_path / "expected", "run", small).code == 0
    place = tmp_path / "runs"
    outcome = launch(place, small, "--split", "stages")
    assert outcome.code == 0, outcome.err
    for line in ("stage 1, collect s: 1 job", "stage 2, train g: 1 job"):
        assert line in outcome.err
    assert results(place) == results(tmp_path / "expected")
    again = launch(place, small)
    assert again.code == 0
    assert "submitted" not in again.err
    assert again.out == outcome.out


def test_the_debug_executor_and_a_workspace_at_a_url(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, one job after another; cells are uploaded as whole groups are."""
    monkeypatch.setenv("NSAE_CACHE", str(tmp_path / "cache"))
    small = tmp_path / "small.yaml"
    small.write_text(CONFIG.replace("160k", "4k").split("  - analyze")[0])
    assert nsae("--workspace", tmp_path / "expected", "run", small).code == 0
    url = f"file://{tmp_path}/bucket"
    run = ("--workspace", url, "run", small, "--launcher", "submitit", "--slurm", "cluster=debug")
    outcome = nsae(*run, "--slurm", f"folder={tmp_path / 'shared'}")
    assert outcome.code == 0, outcome.err
    assert "stage 2, train g: 2 jobs submitted" in outcome.err
    assert contents(tmp_path / "bucket") == contents(tmp_path / "expected")


def test_a_job_that_fails(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("stages:\n  - collect: {model: mini, tokens: 1k, dtype: fp16, device: cuda, name: s}\n")
    outcome = launch(tmp_path / "runs", config)
    assert outcome.code == 4
    assert "collect s, has failed: --device cuda" in outcome.message
    log = Path(outcome.message.split("read ")[1].split(",")[0])
    assert log.is_file()


def test_one_stage_or_one_cell_by_hand(here: Path, tmp_path: Path) -> None:
    place = ("--workspace", here / "runs", "run", here / "config.yaml")
    cell = nsae(*place, "--stage", "2", "--cell", "L2-relu")
    assert cell.code == 0
    assert "Trained SAE g/L2-relu" in cell.out
    for options, message in (
        (("--stage", "4"), "--stage 4: expected 1 to 3"),
        (("--stage", "2", "--cell", "L9"), "--cell L9: g has none; it has L2-relu, L2-tanh-relu"),
        (("--stage", "1", "--cell", "L2"), "only train has cells"),
        (("--cell", "L2"), "give --stage N with it"),
        (("--launcher", "ray"), "expected local or submitit"),
        (("--slurm", "gpus=1"), "--slurm is for jobs"),
        (("--launcher", "submitit", "--stage", "1"), "--stage carries out one stage here"),
        (("--launcher", "submitit", "--split", "rows"), "expected cells or stages"),
        (("--launcher", "submitit", "--slurm", "gpus=-1"), "gpus"),
    ):
        outcome = nsae(*place, *options)
        assert outcome.code == 2, options
        assert message in outcome.message


def test_a_stopped_wait_leaves_the_jobs(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = SubmititLauncher(
        here / "config.yaml", Workspace(tmp_path), SlurmOptions(cluster="local"), True, SilentReporter()
    )

    class Pending:
        job_id = "17_0"

        def done(self) -> bool:
            return False

    monkeypatch.setattr(interrupt, "stop_requested", lambda: 2)
    with pytest.raises(Interrupted, match=r"jobs 17_0 go on \(scancel ends them\)"):
        launcher._wait([(Unit("key", "label", 1), Pending())])


def test_the_command_of_a_job(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    say = [sys.executable, "-c", "print('{}')"]
    assert Command(say, str(result))() == 0
    assert result.read_text() == "{}\n"
    with pytest.raises(RuntimeError, match="exit code 3"):
        Command([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path / "none.json"))()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json"]


def test_what_slurm_is_given(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job array with the options that were asked for; a later call finds it running and waits for it."""
    tools = {
        "srun": "exit 1",
        "sbatch": 'cp "$1" "$(dirname "$0")/script" && echo "Submitted batch job 4711"',
        "sacct": 'printf "JobID|State|NodeList\\n4711_0|RUNNING|n1\\n4711_1|FAILED|n2\\n"',
    }
    (tmp_path / "bin").mkdir()
    for name, line in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    config, place = tmp_path / "config.yaml", tmp_path / "runs"
    config.write_text(CONFIG.replace("160k", "4k"))
    assert nsae("--workspace", place, "run", config, "--stage", "1").code == 0
    options = parse_slurm_options(["partition=gpu", "gpus=1", "mem=64G", "time=90", "mail-user=me", "parallel=8"])
    launcher = SubmititLauncher(config, Workspace(place), options, True, SilentReporter())
    units = launcher._units(2, load_config(config, Workspace(place))[1], ["s"])
    (place / "jobs").mkdir()
    assert [job.job_id for _, job in launcher._submit(units)] == ["4711_0", "4711_1"]
    script = (tmp_path / "bin" / "script").read_text()
    for flag in ("array=0-1%2", "partition=gpu", "gpus-per-node=1", "mem=64G", "time=90", "mail-user=me",
                 "signal=USR2@120", "requeue", "open-mode=append"):  # fmt: skip
        assert f"#SBATCH --{flag}\n" in script
    assert f"{place}/jobs" in script
    (tmp_path / "bin" / "script").unlink()
    again = launcher._submit(units)
    assert [(unit.cell, job.job_id) for unit, job in again] == [("L2-relu", "4711_0"), ("L2-tanh-relu", "4711")]
    assert "array" not in (tmp_path / "bin" / "script").read_text(), "only the one that has failed"

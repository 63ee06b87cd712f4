"""Runs a configuration's stages in order. Finished ones are found by their content and reused."""

from __future__ import annotations

from pathlib import Path

from nsae_cli import interrupt
from nsae_cli.errors import Interrupted, NsaeError
from nsae_cli.experiment.config import load_config
from nsae_cli.experiment.stages import COMMANDS, Stage, StageResult
from nsae_cli.reporter import Reporter
from nsae_cli.store.workspace import Workspace


def run_config(path: Path, workspace: Workspace, reporter: Reporter) -> list[StageResult]:
    """Carries out every stage of a configuration file.

    Raises:
        UsageError: the file has problems (none of its stages is started then).
        Interrupted: a signal asked to stop.
        NsaeError: whatever a stage raises, with its place in the file; what was finished before stays and is reused by
            the next run.
    """
    stages = load_config(path, workspace)
    results: list[StageResult] = []
    for number, stage in enumerate(stages, start=1):
        interrupt.stop_if_requested(f"stopped after {number - 1} of {len(stages)} stages; the same command goes on")
        reporter.note(f"[{number}/{len(stages)}] {stage.label}")
        result = _run_stage(stage, results, workspace, reporter)
        if result.reused:
            reporter.note(f"[{number}/{len(stages)}] {stage.label}: same inputs and options, reused")
        results.append(result)
    return results


def _run_stage(stage: Stage, earlier: list[StageResult], workspace: Workspace, reporter: Reporter) -> StageResult:
    inputs = stage.reads
    if isinstance(inputs, int):
        inputs = [artifact.name for artifact in earlier[inputs].artifacts]
    try:
        return COMMANDS[stage.command].run(stage, inputs, workspace, reporter)
    except Interrupted:
        raise
    except NsaeError as error:
        where = f"{stage.place}: {stage.label}"
        error.reword(lambda message: f"{where}: {message}")
        raise

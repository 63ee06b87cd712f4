"""Runs a configuration's stages in order. Finished ones are found by their content and reused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import Interrupted, NsaeError
from nsae_cli.experiment.config import load_config
from nsae_cli.experiment.launcher import SubmititLauncher, with_cell
from nsae_cli.experiment.stages import COMMANDS, Stage, StageResult
from nsae_cli.reporter import Reporter
from nsae_cli.store.workspace import Workspace

#: Results of stages by their number, from 0.
Results = list[StageResult] | dict[int, StageResult]


def run_config(
    path: Path, workspace: Workspace, reporter: Reporter, launcher: SubmititLauncher | None = None
) -> list[StageResult]:
    """Carries out every stage of a configuration file.

    Args:
        path: the file.
        workspace: where results go.
        reporter: is told which stage is being carried out.
        launcher: has the work done elsewhere; None for here.

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
        if launcher is not None:
            with _placed(stage):
                launcher.run(number, stage, _inputs(stage, results))
        result = _run_stage(stage, results, workspace, reporter)
        if result.reused:
            reporter.note(f"[{number}/{len(stages)}] {stage.label}: same inputs and options, reused")
        results.append(result)
    return results


def run_stage(path: Path, number: int, cell: str | None, workspace: Workspace, reporter: Reporter) -> StageResult:
    """Carries out one stage, or one cell of a training grid; the stages that it reads are found, or made before.

    Args:
        path: the configuration file.
        number: of the stage, from 1.
        cell: of a grid; None for the whole stage.

    Raises:
        UsageError: no such stage or cell, and as `run_config`.
        NsaeError: whatever the stage raises, with its place in the file.
    """
    stages = load_config(path, workspace)
    if not 1 <= number <= len(stages):
        raise catalogue.OPTION_VALUE(f"--stage {number}: expected 1 to {len(stages)}, the stages of {path}")
    stage = stages[number - 1]
    if cell is not None and stage.command != "train":
        raise catalogue.OPTION_VALUE(f"--cell {cell[:60]}: stage {number} is {stage.label}; only train has cells")
    results: dict[int, StageResult] = {}

    def result_of(index: int) -> StageResult:
        if index not in results:
            reads = stages[index].reads
            earlier = {reads: result_of(reads)} if isinstance(reads, int) else {}
            results[index] = _run_stage(stages[index], earlier, workspace, reporter)
        return results[index]

    earlier = {stage.reads: result_of(stage.reads)} if isinstance(stage.reads, int) else {}
    reporter.note(f"[{number}/{len(stages)}] {with_cell(stage, cell).label}")
    return _run_stage(with_cell(stage, cell), earlier, workspace, reporter)


def _inputs(stage: Stage, earlier: Results) -> list[str]:
    """The names of what a stage reads."""
    reads = stage.reads
    return [artifact.name for artifact in earlier[reads].artifacts] if isinstance(reads, int) else reads


def _run_stage(stage: Stage, earlier: Results, workspace: Workspace, reporter: Reporter) -> StageResult:
    with _placed(stage):
        return COMMANDS[stage.command].run(stage, _inputs(stage, earlier), workspace, reporter)


@contextlib.contextmanager
def _placed(stage: Stage) -> Iterator[None]:
    """Puts the stage's place in the file before the message of an error."""
    try:
        yield
    except Interrupted:
        raise
    except NsaeError as error:
        where = f"{stage.place}: {stage.label}"
        error.reword(lambda message: f"{where}: {message}")
        raise

"""Runs a configuration's stages in order. Finished ones are found by their content and reused."""

from __future__ import annotations

from pathlib import Path

from nsae_cli.experiment.config import load_config
from nsae_cli.experiment.stages import COMMANDS, StageResult
from nsae_cli.reporter import Reporter
from nsae_cli.store.workspace import Workspace


def run_config(path: Path, workspace: Workspace, reporter: Reporter) -> list[StageResult]:
    """Carries out every stage of a configuration file.

    Raises:
        UsageError: the file has problems (none of its stages is started then).
        NsaeError: whatever a stage raises; what was finished before stays and is reused by the next run.
    """
    stages = load_config(path)
    results = []
    for number, stage in enumerate(stages, start=1):
        label = f"{stage.command} {stage.name}"
        reporter.note(f"[{number}/{len(stages)}] {label}")
        result = COMMANDS[stage.command].run(stage, workspace, reporter)
        if result.reused:
            reporter.note(f"[{number}/{len(stages)}] {label}: same inputs and options, reused")
        results.append(result)
    return results

"""The commands that a configuration can chain: their options, their input, and how each is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nsae_cli.analysis.norms_artifact import NormsOptions, run_norms
from nsae_cli.analysis.top_norms_artifact import TopNormsOptions, run_top_norms
from nsae_cli.lm.collect import collect
from nsae_cli.lm.config import CollectConfig
from nsae_cli.reporter import Reporter
from nsae_cli.store.shards import open_activations
from nsae_cli.store.workspace import Artifact, Kind, Workspace
from nsae_cli.training.loop import train
from nsae_cli.training.options import TrainOptions


@dataclass
class StageResult:
    """What a stage made or found: artifacts with their JSON, figures, and whether all was there already."""

    command: str
    artifacts: list[Artifact]
    documents: list[dict[str, Any]]
    figures: list[Path]
    reused: bool


@dataclass(frozen=True)
class Stage:
    """A checked stage.

    Attributes:
        options: the command's validated options.
        inputs: names in the workspace or paths that it reads; empty where the command takes none.
        name: of its result, or None.
        activations: for analyze-top-norms, the store to measure on, or None.
    """

    command: str
    options: Any
    inputs: list[str]
    name: str | None
    activations: str | None


@dataclass(frozen=True)
class CommandSpec:
    """How a command appears in a configuration."""

    options: type[BaseModel]
    makes: Kind
    reads: Kind | None
    input_key: str | None
    run: Callable[[Stage, Workspace, Reporter], StageResult]
    extra_keys: tuple[str, ...] = ()


def _collect(stage: Stage, workspace: Workspace, reporter: Reporter) -> StageResult:
    result = collect(stage.options, workspace, reporter)
    return StageResult("collect", [result.artifact], [result.manifest.model_dump()], [], result.reused)


def _store(stage: Stage, workspace: Workspace) -> Any:
    [artifact] = workspace.find(Kind.ACTIVATIONS, stage.inputs[0])
    return open_activations(artifact.path)


def _norms(stage: Stage, workspace: Workspace, reporter: Reporter) -> StageResult:
    result = run_norms(_store(stage, workspace), stage.options, workspace, stage.name, reporter)
    return StageResult("norms", [result.artifact], [result.document], result.figures, result.already_complete)


def _train(stage: Stage, workspace: Workspace, reporter: Reporter) -> StageResult:
    result = train(stage.options, _store(stage, workspace), workspace, stage.name, reporter)
    return StageResult("train", result.artifacts, result.runs, [], result.already_complete)


def _analyze(stage: Stage, workspace: Workspace, reporter: Reporter) -> StageResult:
    results = run_top_norms(stage.inputs, stage.activations, stage.options, workspace, stage.name, reporter)
    return StageResult(
        "analyze-top-norms",
        [result.artifact for result in results],
        [result.document for result in results],
        [figure for result in results for figure in result.figures],
        all(result.already_complete for result in results),
    )


COMMANDS: dict[str, CommandSpec] = {
    "collect": CommandSpec(CollectConfig, Kind.ACTIVATIONS, None, None, _collect),
    "norms": CommandSpec(NormsOptions, Kind.NORMS, Kind.ACTIVATIONS, "activations", _norms),
    "train": CommandSpec(TrainOptions, Kind.SAE, Kind.ACTIVATIONS, "activations", _train),
    "analyze-top-norms": CommandSpec(
        TopNormsOptions, Kind.TOP_NORMS, Kind.SAE, "saes", _analyze, extra_keys=("activations",)
    ),
}

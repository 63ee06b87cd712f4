"""The commands that a configuration can chain: their options, their input, and how each is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nsae_cli.analysis.audit_artifact import run_audits
from nsae_cli.analysis.audit_options import AuditOptions
from nsae_cli.analysis.comparison import CompareOptions
from nsae_cli.analysis.comparison_artifact import run_compare
from nsae_cli.analysis.eval import run_eval
from nsae_cli.analysis.eval_text import EvalOptions
from nsae_cli.analysis.norms_artifact import NormsOptions, run_norms
from nsae_cli.analysis.top_norms_artifact import TopNormsOptions, run_top_norms
from nsae_cli.experiment.train import TrainCommandOptions, choose_source
from nsae_cli.lm.collect import collect
from nsae_cli.lm.config import CollectConfig
from nsae_cli.reporter import Reporter
from nsae_cli.store.alter import AlterOptions, alter_store
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Artifact, Kind, Workspace
from nsae_cli.training.loop import train


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
        command: as on the command line.
        place: ``file:line`` where it stands.
        options: the command's validated options.
        reads: what it reads: names in the workspace, paths, or the number of the stage whose result it reads; empty
            where the command takes no input.
        name: of its result, or None for the default.
        activations: for analyze-top-norms and eval, the store to measure on, or None.
    """

    command: str
    place: str
    options: Any
    reads: list[str] | int
    name: str | None
    activations: str | None

    @property
    def label(self) -> str:
        """Command and name, for progress and messages."""
        return self.command if self.name is None else f"{self.command} {self.name}"


@dataclass(frozen=True)
class CommandSpec:
    """How a command appears in a configuration.

    Attributes:
        options: its options.
        makes: the kind of its result.
        input_key: the key that names its input; None where it takes none.
        reads: the kind of that input.
        run: carries the stage out; takes the stage, the names that it reads, the workspace and a reporter.
        several_inputs: whether it can read more than one.
        store_key: a second key that names a store to measure on.
        instead_of_input: an option that takes the input's place.
        from_elsewhere: whether an input may also be a folder or a hub id of another library's.
    """

    options: type[BaseModel]
    makes: Kind
    input_key: str | None
    reads: Kind | None
    run: Callable[[Stage, list[str], Workspace, Reporter], StageResult]
    several_inputs: bool = False
    store_key: str | None = None
    instead_of_input: str | None = None
    from_elsewhere: bool = False


def _collect(stage: Stage, inputs: list[str], workspace: Workspace, reporter: Reporter) -> StageResult:
    result = collect(stage.options, workspace, reporter)
    return StageResult("collect", [result.artifact], [result.manifest.model_dump()], [], result.reused)


def _store(reference: str, workspace: Workspace) -> ActivationStore:
    [artifact] = workspace.find(Kind.ACTIVATIONS, reference)
    return open_activations(artifact.path)


def _norms(stage: Stage, inputs: list[str], workspace: Workspace, reporter: Reporter) -> StageResult:
    result = run_norms(_store(inputs[0], workspace), stage.options, workspace, stage.name, reporter)
    return StageResult("norms", [result.artifact], [result.document], result.figures, result.already_complete)


def _alter(stage: Stage, inputs: list[str], workspace: Workspace, reporter: Reporter) -> StageResult:
    result = alter_store(_store(inputs[0], workspace), stage.options, workspace, stage.name, reporter)
    return StageResult("alter", [result.artifact], [result.manifest.model_dump()], [], result.already_complete)


def _train(stage: Stage, inputs: list[str], workspace: Workspace, reporter: Reporter) -> StageResult:
    store = None if stage.options.from_model else workspace.find(Kind.ACTIVATIONS, inputs[0])[0]
    source = choose_source(stage.options, store, workspace)
    result = train(stage.options, source, workspace, stage.name, reporter)
    return StageResult("train", result.artifacts, result.runs, [], result.already_complete)


def _analyze(stage: Stage, inputs: list[str], workspace: Workspace, reporter: Reporter) -> StageResult:
    analysis = run_top_norms(inputs, stage.activations, stage.options, workspace, stage.name, reporter)
    artifacts = [result.artifact for result in analysis.results]
    documents = [result.document for result in analysis.results]
    return StageResult("analyze-top-norms", artifacts, documents, analysis.figures, analysis.already_complete)


def _audit(stage: Stage, inputs: list[str], workspace: Workspace, reporter: Reporter) -> StageResult:
    options = stage.options.model_copy(update={"activations": stage.activations})
    results = run_audits(inputs, options, workspace, stage.name, reporter)
    return StageResult(
        "audit",
        [result.artifact for result in results],
        [result.document for result in results],
        [],
        all(result.already_complete for result in results),
    )


def _eval(stage: Stage, inputs: list[str], workspace: Workspace, reporter: Reporter) -> StageResult:
    made = run_eval(inputs, stage.activations, stage.options, workspace, stage.name, reporter)
    artifacts = [result.artifact for result in made.results]
    documents = [result.document for result in made.results]
    return StageResult("eval", artifacts, documents, [], made.already_complete)


def _compare(stage: Stage, inputs: list[str], workspace: Workspace, reporter: Reporter) -> StageResult:
    result = run_compare(inputs, stage.options, workspace, stage.name, reporter)
    return StageResult("compare", [result.artifact], [result.document], result.figures, result.already_complete)


COMMANDS: dict[str, CommandSpec] = {
    "collect": CommandSpec(CollectConfig, Kind.ACTIVATIONS, None, None, _collect),
    "norms": CommandSpec(NormsOptions, Kind.NORMS, "activations", Kind.ACTIVATIONS, _norms),
    "alter": CommandSpec(AlterOptions, Kind.ACTIVATIONS, "activations", Kind.ACTIVATIONS, _alter),
    "train": CommandSpec(
        TrainCommandOptions, Kind.SAE, "activations", Kind.ACTIVATIONS, _train, instead_of_input="from_model"
    ),
    "analyze-top-norms": CommandSpec(
        TopNormsOptions,
        Kind.TOP_NORMS,
        "saes",
        Kind.SAE,
        _analyze,
        several_inputs=True,
        store_key="activations",
        from_elsewhere=True,
    ),
    "audit": CommandSpec(
        AuditOptions,
        Kind.AUDIT,
        "saes",
        Kind.SAE,
        _audit,
        several_inputs=True,
        store_key="activations",
        from_elsewhere=True,
    ),
    "eval": CommandSpec(
        EvalOptions,
        Kind.EVAL,
        "saes",
        Kind.SAE,
        _eval,
        several_inputs=True,
        store_key="activations",
        from_elsewhere=True,
    ),
    "compare": CommandSpec(CompareOptions, Kind.TABLE, "saes", Kind.SAE, _compare, several_inputs=True),
}

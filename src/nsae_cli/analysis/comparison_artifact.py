"""The work of `nsae compare`: from SAEs and their evaluations to the artifact `tables/NAME`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nsae_cli import catalogue, interrupt
from nsae_cli.analysis.comparison import CompareOptions, compare
from nsae_cli.analysis.comparison_cells import Sae
from nsae_cli.analysis.comparison_conclusion import conclude
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.predictions import check_predictions
from nsae_cli.analysis.saes import choose_saes
from nsae_cli.errors import NsaeError
from nsae_cli.report.comparison_markdown import comparison_markdown
from nsae_cli.report.figures import comparison_differences, comparison_fronts, save_png
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit, presence
from nsae_cli.store.data_files import read_arrays
from nsae_cli.store.manifest import read_manifest
from nsae_cli.store.seal import is_plain_name
from nsae_cli.store.shards import describe_changes
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name

FORMAT_VERSION = 1
_CONTEXTS = "contexts.safetensors"


@dataclass
class TableArtifact:
    """The artifact, its table.json, its figures and whether it was there already."""

    artifact: Artifact
    document: dict[str, Any]
    figures: list[Path]
    already_complete: bool


def run_compare(
    references: Sequence[str],
    options: CompareOptions,
    workspace: Workspace,
    name: str | None,
    reporter: Reporter,
) -> TableArtifact:
    """Compares SAEs: those named, or all of the newest group.

    Args:
        references: names or paths of SAEs or groups; empty for the newest group.
        options: baseline, margins, which evaluations.
        name: of the result; None for the first group's name.

    Raises:
        UsageError: nothing of that name, two SAEs that stand for the same, an unknown baseline, or NAME holds another
            comparison.
        ArtifactError: an SAE's or an evaluation's files are damaged.
        Interrupted: a signal asked to stop; nothing was written.
    """
    artifacts = choose_saes(references, workspace, reporter)
    name = check_name(name or artifacts[0].name.partition("/")[0])
    artifacts.sort(key=lambda artifact: artifact.name)  # the same SAEs are the same comparison in any order
    folder = workspace.folder(Kind.TABLE, name)
    table = Artifact(Kind.TABLE, name, folder)
    saes, inputs = _load(artifacts, options, workspace, reporter)
    wanted = {"options": options.model_dump(), "saes": [entry["name"] for entry in inputs]}
    outdated: list[Path] = []
    if (folder / Kind.TABLE.mark).is_file():
        document = read_document(table, required=("options", "inputs", "groups", "figures"))
        figures = [folder / figure for figure in document["figures"] if is_plain_name(figure)]
        _refuse_another(name, document, wanted)
        if document["inputs"] == inputs and all(figure.is_file() for figure in figures):
            workspace.tidy(folder, reporter)
            return TableArtifact(table, document, figures, already_complete=True)
        reporter.note(f"inputs of {name} have changed: made again")
        outdated = figures
    comparison = compare(saes, options, _poll)
    with reporter.task("compare", len(comparison.groups), "groups") as task:
        groups = comparison.document(lambda: task.advance(1))
    predictions = check_predictions(comparison)
    _poll()
    missed = comparison.missed()
    document = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "options": wanted["options"],
        "inputs": inputs,
        "groups": groups,
        "missed_l0": missed,
        "predictions": predictions,
        "conclusion": conclude(groups, predictions, missed),
        "notes": _notes(saes, comparison.rows_differ()),
    }
    with workspace.writing(folder, reporter):
        commit.make_folder(folder)
        commit.remove_leftovers(folder)
        figures = _draw(document, folder)
        document["figures"] = [figure.name for figure in figures]
        commit.write_text(folder / "table.md", comparison_markdown(document))
        document = commit.write_document(folder / Kind.TABLE.mark, document, ["table.md"])
        for figure in set(outdated) - set(figures):
            commit.remove_file(figure)
    return TableArtifact(table, document, figures, already_complete=False)


def _poll() -> None:
    interrupt.stop_if_requested("stopped while comparing; nothing was written, run the same command again")


def _refuse_another(name: str, document: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if document["options"] != wanted["options"]:
        changes = describe_changes(dict(document["options"]), dict(wanted["options"]))
        raise catalogue.NAME_TAKEN(f"--name {name} holds another comparison ({changes}); choose another --name")
    before, now = [entry["name"] for entry in document["inputs"]], wanted["saes"]
    if before != now:
        raise catalogue.NAME_TAKEN(
            f"--name {name} compares other SAEs ({_changed(before, now)}); choose another --name"
        )


def _changed(before: Sequence[str], now: Sequence[str]) -> str:
    new, gone = [n for n in now if n not in before], [n for n in before if n not in now]
    parts = [f"{len(new)} new, such as {new[0]}"] if new else []
    parts += [f"{len(gone)} no longer, such as {gone[0]}"] if gone else []
    return ", ".join(parts) or f"{len(now)} instead of {len(before)}"


# Loading


def _load(
    artifacts: Sequence[Artifact], options: CompareOptions, workspace: Workspace, reporter: Reporter
) -> tuple[list[Sae], list[dict[str, Any]]]:
    """The SAEs, and what identifies everything that was read."""
    evaluations = _Evaluations(workspace, options.evals, reporter)
    stores: dict[tuple[str, str], tuple[Path | None, list[dict[str, Any]]]] = {}
    saes, inputs = [], []
    for artifact in artifacts:
        _poll()
        run = _read_run(artifact)
        evaluation = evaluations.of(artifact, run)
        trained_on = run["inputs"].get("activations") or {}
        key = (str(trained_on.get("name")), str(trained_on.get("manifest_sha256")))
        if key not in stores:
            stores[key] = _store(trained_on, workspace)
        folder, altered = stores[key]
        document = contexts = None
        if evaluation is not None:
            document, contexts = evaluation.document, _read_contexts(evaluation)
        saes.append(Sae(artifact.name, artifact.path, run, document, contexts, altered, folder))
        inputs.append(
            {
                "name": artifact.name,
                "run_sha256": commit.file_sha256(artifact.path / Kind.SAE.mark),
                "log_sha256": _optional_hash(artifact.path / "metrics.jsonl"),
                "store": None if folder is None else trained_on.get("manifest_sha256"),
                "eval": None if evaluation is None else evaluation.describe(),
            }
        )
    if options.evals and all(sae.evaluation is None for sae in saes):
        raise catalogue.ANALYSIS_MISSING(
            f"--evals {options.evals}: none of these SAEs has an evaluation of that name; "
            f"run `nsae eval --name {options.evals}` first"
        )
    return saes, inputs


def _read_run(artifact: Artifact) -> dict[str, Any]:
    run = read_document(artifact, required=("config", "inputs", "metrics", "hook"))
    required = ("act", "l2_norm", "l1_norm", "decoder", "sparsity", "alpha", "alpha_scale", "sinks", "seed")
    missing = [key for key in required if key not in run["config"]]
    if missing:
        raise catalogue.NOT_TRAINED_HERE(
            f"{artifact.path / Kind.SAE.mark}: config lacks {', '.join(missing)}; compare reads SAEs of "
            f"`nsae train`, leave it out"
        )
    return run


def _optional_hash(path: Path) -> str | None:
    presence.bring(path)
    return commit.file_sha256(path) if path.is_file() else None


def _store(trained_on: Mapping[str, Any], workspace: Workspace) -> tuple[Path | None, list[dict[str, Any]]]:
    """Folder of the store, if it is in the workspace as it was, and what `nsae alter` did to it."""
    if not is_plain_name(trained_on.get("name")):
        return None, []
    folder = workspace.folder(Kind.ACTIVATIONS, str(trained_on["name"]))
    try:
        manifest, sha256 = read_manifest(folder)
    except NsaeError:
        return None, []
    if sha256 != trained_on.get("manifest_sha256"):
        return None, []
    return folder, [dict(change) for change in manifest.altered or []]


@dataclass(frozen=True)
class _Evaluation:
    artifact: Artifact
    document: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        contexts = self.artifact.path / _CONTEXTS
        return {
            "name": self.artifact.name,
            "sha256": commit.file_sha256(self.artifact.path / Kind.EVAL.mark),
            "contexts_sha256": _optional_hash(contexts),
        }


class _Evaluations:
    """The evaluations in a workspace by SAE. Of several of one SAE the one with the usual name, else the newest."""

    def __init__(self, workspace: Workspace, prefix: str | None, reporter: Reporter) -> None:
        self._by_sae: dict[str, list[_Evaluation]] = {}
        self._reporter = reporter
        for artifact in workspace.complete(Kind.EVAL):  # newest first
            if prefix is None or artifact.name == prefix or artifact.name.startswith(f"{prefix}-"):
                document = read_document(artifact, required=("sae", "behaviour"))
                self._by_sae.setdefault(str(document["sae"]["name"]), []).append(_Evaluation(artifact, document))

    def of(self, sae: Artifact, run: Mapping[str, Any]) -> _Evaluation | None:
        """The evaluation of an SAE, of these very weights; None where there is none."""
        found = self._by_sae.get(sae.name, [])
        fitting = [one for one in found if one.document["sae"].get("weights_sha256") == run.get("weights_sha256")]
        if found and not fitting:
            self._reporter.warn(
                f"{found[0].artifact.name} evaluates another version of {sae.name} (its weights differ); ignored"
            )
        usual = [one for one in fitting if one.artifact.name == sae.name.replace("/", "-")]
        return next(iter(usual or fitting), None)


def _read_contexts(evaluation: _Evaluation) -> dict[str, np.ndarray] | None:
    path = evaluation.artifact.path / _CONTEXTS
    presence.bring(path)
    if not path.is_file():
        return None
    tensors = read_arrays(path, evaluation.document)
    context = tensors.get("context")
    if context is None or any(len(tensor) != len(context) for tensor in tensors.values()):
        raise catalogue.RESULTS_DAMAGED(
            f"{path}: tensors of unequal length; delete the folder {path.parent} and run nsae eval again"
        )
    return tensors if len(context) else None


# Output


def _notes(saes: Sequence[Sae], differ: Sequence[str]) -> list[str]:
    """What a reader must know about the numbers."""
    without = sum(sae.contexts is None for sae in saes)
    notes = []
    if without == len(saes):
        notes.append(
            "No SAE was evaluated in its model (nsae eval): there is no ΔCE and no interval over held-out text, so "
            "that nothing can be marked better, worse or equivalent."
        )
    elif without:
        notes.append(f"{without} of {len(saes)} SAEs were not evaluated in their model; they have no ΔCE and no mark.")
    if differ:
        notes.append(
            f"Evaluated rows are others than the held-out rows of training for {len(differ)} SAEs, such as "
            f"{differ[0]}: their intervals over contexts are of another text than the values in the table."
        )
    notes += dict.fromkeys(str(sae.run["embedded_note"]) for sae in saes if sae.run.get("embedded_note"))
    return notes


def _draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    drawings: list[tuple[str, Callable[[], Any]]] = [("fronts.png", lambda: comparison_fronts(document))]
    groups = [group for group in document["groups"] if any(row["comparisons"] for row in group["rows"])]
    for number, group in enumerate(groups, start=1):
        file = "differences.png" if len(groups) == 1 else f"differences-{number}.png"
        drawings.append((file, partial(comparison_differences, group, document["options"])))
    paths = []
    for file, draw in drawings:
        _poll()
        save_png(draw(), folder / file)
        paths.append(folder / file)
    return paths

"""The work of `nsae analyze-top-norms`: from SAEs to the artifacts `top-norms/NAME` with their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from nsae_cli import catalogue
from nsae_cli.analysis.checks import say_what_is_missing
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.saes import choose_saes, result_names
from nsae_cli.analysis.top_norms import analyze_top_norms, check_fit, write_top_norms
from nsae_cli.errors import UsageError
from nsae_cli.lm.token_text import token_text
from nsae_cli.report.figures import compare_histograms, l0_histogram, l1_histogram, save_png
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.data_files import read_arrays
from nsae_cli.store.sae_folder import SavedSae, load_sae
from nsae_cli.store.shards import ActivationStore, describe_changes, open_activations
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name
from nsae_cli.values import Fraction, Size


class TopNormsOptions(BaseModel):
    """Options of analyze-top-norms that change its result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top: Fraction = Field(0.01, gt=0, le=0.5, description="share of the rows in the top and in the bottom group")
    rows: Size | None = Field(None, gt=0, description="use the first so many held-out rows")


@dataclass
class TopNormsArtifact:
    """One SAE's artifact, its top_norms.json, its figures and whether it was there already."""

    artifact: Artifact
    document: dict[str, Any]
    figures: list[Path]
    already_complete: bool


@dataclass
class TopNormsAnalysis:
    """What a run made: one artifact per SAE, and for several SAEs the figures that show them side by side."""

    results: list[TopNormsArtifact]
    comparison: list[Path]

    @property
    def figures(self) -> list[Path]:
        """All figures, the common ones last."""
        return [figure for result in self.results for figure in result.figures] + self.comparison

    @property
    def already_complete(self) -> bool:
        """Whether every artifact was there before."""
        return all(result.already_complete for result in self.results)


def run_top_norms(
    references: Sequence[str],
    activations: str | None,
    options: TopNormsOptions,
    workspace: Workspace,
    name: str | None,
    reporter: Reporter,
) -> TopNormsAnalysis:
    """Analyses SAEs: those named, or all of the newest group.

    Args:
        references: names or paths of SAEs or groups; empty for the newest.
        activations: a store to measure on; None for the one each SAE was trained on.
        name: name of the result, for several SAEs the beginning of their names; None for the SAEs' names.

    Raises:
        UsageError: nothing of that name, or NAME holds another analysis.
        ArtifactError: an SAE is damaged, or SAE and store do not fit.
        NumericalError: a norm of the store is not finite.
        Interrupted: a signal asked to stop; the analyses finished so far are kept.
    """
    saes = choose_saes(references, workspace, reporter)
    results = [
        _analyse(sae, activations, options, workspace, check_name(own_name), reporter)
        for sae, own_name in zip(saes, result_names(saes, name), strict=True)
    ]
    comparison = _draw_together(saes, results, workspace, name, reporter) if len(results) > 1 else []
    return TopNormsAnalysis(results, comparison)


def _analyse(
    sae: Artifact,
    activations: str | None,
    options: TopNormsOptions,
    workspace: Workspace,
    name: str,
    reporter: Reporter,
) -> TopNormsArtifact:
    saved = load_sae(sae.path)
    store = store_of(saved, activations, workspace)
    check_fit(saved, store)
    folder = workspace.folder(Kind.TOP_NORMS, name)
    artifact = Artifact(Kind.TOP_NORMS, name, folder)
    figures = [folder / "l0.png", folder / "l1.png"]
    wanted = {
        "sae": {"name": sae.name, "weights_sha256": saved.run.get("weights_sha256")},
        "activations": {"name": store.name, "manifest_sha256": store.manifest_sha256},
        "options": options.model_dump(),
    }
    if (folder / Kind.TOP_NORMS.mark).is_file():
        document = read_document(artifact, required=("sae", "activations", "options", "groups"))
        if all(document[key] == value for key, value in wanted.items()):
            workspace.tidy(folder, reporter)
            return TopNormsArtifact(artifact, document, figures, already_complete=True)
        raise catalogue.NAME_TAKEN(
            f"--name {name} holds another analysis ({_difference(document, wanted)}); choose another --name"
        )
    with workspace.writing(folder, reporter):
        say_what_is_missing(store, reporter)
        text = token_text(store.manifest, reporter)
        result = analyze_top_norms(saved, sae.name, store, options.top, options.rows, text, reporter)
        result.document["options"] = wanted["options"]
        arrays = {key: tensor.numpy() for key, tensor in result.tensors.items()}
        commit.make_folder(folder)
        commit.remove_leftovers(folder)
        save_png(l0_histogram(arrays, result.document), figures[0])
        save_png(l1_histogram(arrays, result.document), figures[1])
        document = write_top_norms(folder, result)
    return TopNormsArtifact(artifact, document, figures, already_complete=False)


def _difference(document: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What an earlier analysis did otherwise: ``--top 0.01 -> 0.02``, ``SAE a -> b``."""
    for key, label in (("sae", "SAE"), ("activations", "activations")):
        old, new = document[key], wanted[key]
        if old != new:
            change = "has changed since" if old["name"] == new["name"] else f"-> {new['name']}"
            return f"{label} {old['name']} {change}"
    return describe_changes(document["options"], wanted["options"])


def store_of(saved: SavedSae, activations: str | None, workspace: Workspace) -> ActivationStore:
    """The store to measure an SAE on: the one that is named, else the one that it was trained on.

    Raises:
        UsageError: it is not in the workspace, or the SAE was trained on no store.
        ArtifactError: it is damaged, or has changed since.
    """
    if activations is not None:
        [artifact] = workspace.find(Kind.ACTIVATIONS, activations)
        return open_activations(artifact.path)
    trained_on = saved.run["inputs"].get("activations")
    if trained_on is None:
        raise catalogue.STORE_OF_SAE_MISSING(
            f"{saved.path.name} was trained on {saved.run['model']} as it ran, not on a store; collect {saved.hook} "
            f"with `nsae collect` and name the store with --activations"
        )
    try:
        [artifact] = workspace.find_recorded(Kind.ACTIVATIONS, trained_on["name"])
    except UsageError as error:
        raise catalogue.STORE_OF_SAE_MISSING(
            f"the activations {trained_on['name']!r} that {saved.path.name} was trained on are not in "
            f"{workspace.root}; name a store with --activations"
        ) from error
    store = open_activations(artifact.path)
    if store.manifest_sha256 != trained_on["manifest_sha256"]:
        raise catalogue.STORE_CHANGED(
            f"{store.name} is not the store that {saved.path.name} was trained on (its manifest has changed); "
            f"name the right one with --activations, or this one on purpose: --activations {store.name}"
        )
    return store


def _draw_together(
    saes: Sequence[Artifact],
    results: Sequence[TopNormsArtifact],
    workspace: Workspace,
    name: str | None,
    reporter: Reporter,
) -> list[Path]:
    """Several SAEs in one figure per quantity, beside their artifacts: top-norms/NAME-l0.png; returns the paths."""
    groups = {sae.name.partition("/")[0] for sae in saes}
    stem = name or (groups.pop() if len(groups) == 1 else "comparison")
    folder = workspace.root / Kind.TOP_NORMS.folder
    paths = [folder / f"{stem}-l0.png", folder / f"{stem}-l1.png"]
    if all(result.already_complete for result in results) and all(path.is_file() for path in paths):
        workspace.tidy(folder / stem, reporter)
        return paths
    loaded: list[tuple[str, dict[str, np.ndarray], dict[str, Any]]] = [
        (sae.path.name, load_rows(result.artifact, result.document), result.document)
        for sae, result in zip(saes, results, strict=True)
    ]
    with workspace.writing(folder / stem, reporter):
        for path in paths:
            commit.remove_leftovers(folder, path.name)
        save_png(compare_histograms(loaded, "l0"), paths[0])
        save_png(compare_histograms(loaded, "l1"), paths[1])
    return paths


def load_rows(artifact: Artifact, document: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of top_norms.safetensors, whose hash `document`, the artifact's JSON, names.

    Raises:
        ArtifactError: not readable, or not what was written.
    """
    return read_arrays(artifact.path / "top_norms.safetensors", document)

"""Finds what a workspace knows of some SAEs: what `nsae report` and `nsae plot` show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nsae_cli import catalogue
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.top_norms_artifact import load_rows
from nsae_cli.errors import UsageError
from nsae_cli.report.page_content import NormsContent, SaeContent
from nsae_cli.store.commit import read_json
from nsae_cli.store.data_files import read_arrays, read_data_file
from nsae_cli.store.sae_folder import LOG
from nsae_cli.store.workspace import Artifact, Kind, Workspace

_RUN_KEYS = ("config", "hook", "metrics")


def all_saes(workspace: Workspace) -> list[Artifact]:
    """Every complete SAE: the newest group first, the cells of a group by name."""
    groups: dict[str, list[Artifact]] = {}
    for artifact in workspace.complete(Kind.SAE):
        groups.setdefault(artifact.name.partition("/")[0], []).append(artifact)
    return [artifact for group in groups.values() for artifact in sorted(group, key=lambda one: one.name)]


def read_run(artifact: Artifact) -> dict[str, Any]:
    """run.json of an SAE.

    Raises:
        ArtifactError: damaged.
    """
    run = read_document(artifact, required=_RUN_KEYS)
    for key, kind in (("config", dict), ("metrics", dict), ("hook", str)):
        if not isinstance(run[key], kind):
            raise catalogue.DOCUMENT_INVALID(
                f"{artifact.path / artifact.kind.mark}: {key} is damaged; train the SAE again"
            )
    return run


def read_curves(artifact: Artifact) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, whose hash run.json names.

    Raises:
        ArtifactError: missing or damaged.
    """
    log = artifact.path / LOG
    content = read_data_file(log, read_run(artifact))
    try:
        rows = [json.loads(line) for line in content.decode("utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise catalogue.DOCUMENT_INVALID(f"{log} cannot be read ({error}); train the SAE again") from error
    if not all(isinstance(row, dict) for row in rows):
        raise catalogue.DOCUMENT_INVALID(f"{log}: a line is no JSON object; train the SAE again")
    return rows


def read_norms(artifact: Artifact) -> NormsContent:
    """norms.json and the histograms of norms.safetensors.

    Raises:
        ArtifactError: damaged.
    """
    document = read_document(artifact, required=("activations", "hooks"))
    path = artifact.path / "norms.safetensors"
    remedy = f"delete the folder {artifact.path} and run nsae norms again"
    arrays = read_arrays(path, document)
    hooks, bins = len(document["hooks"]), len(arrays.get("edges", [])) - 1
    for name in ("counts", "position0_counts"):
        if name not in arrays or arrays[name].shape != (hooks, bins):
            raise catalogue.RESULTS_DAMAGED(
                f"{path}: {name} is missing or not of {hooks} hooks × {bins} bins; {remedy}"
            )
    return NormsContent(artifact.name, document, arrays)


def read_sae(artifact: Artifact, workspace: Workspace) -> SaeContent:
    """An SAE with what other commands measured of it, if they did.

    Raises:
        ArtifactError: a file is damaged.
    """
    run, evaluation = read_measured_run(artifact, workspace)
    top_norms = _measured(Kind.TOP_NORMS, artifact, run, workspace, ("sae", "groups"))
    return SaeContent(
        artifact.name,
        run,
        read_curves(artifact),
        None if top_norms is None else (top_norms[1], load_rows(*top_norms)),
        evaluation,
    )


def read_measured_run(artifact: Artifact, workspace: Workspace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """run.json and, where the SAE was evaluated, eval.json.

    Raises:
        ArtifactError: a file is damaged.
    """
    run = read_run(artifact)
    evaluation = _measured(Kind.EVAL, artifact, run, workspace, ("sae",))
    return run, None if evaluation is None else evaluation[1]


def _measured(
    kind: Kind, sae: Artifact, run: dict[str, Any], workspace: Workspace, required: Sequence[str]
) -> tuple[Artifact, dict[str, Any]] | None:
    """The artifact that a command made of this SAE under its default name, if it is of these very weights."""
    name = sae.name.replace("/", "-")
    artifact = Artifact(kind, name, workspace.folder(kind, name))
    if not (artifact.path / kind.mark).is_file():
        return None
    document = read_document(artifact, required=required)
    same = document["sae"].get("weights_sha256") in (None, run.get("weights_sha256"))
    return (artifact, document) if same else None


def read_tables(workspace: Workspace) -> list[tuple[str, Any]]:
    """(name, table.json) of every comparison table.

    Raises:
        ArtifactError: damaged.
    """
    marks = sorted((workspace.root / "tables").glob("*/table.json"))
    return [(mark.parent.name, read_json(mark)) for mark in marks]


def norms_of(saes: Sequence[SaeContent], workspace: Workspace) -> list[Artifact]:
    """The norms of the stores that SAEs were trained on."""
    stores = {
        (reference.get("name"), reference.get("manifest_sha256"))
        for sae in saes
        if (reference := (sae.run.get("inputs") or {}).get("activations"))
    }
    found = []
    for artifact in workspace.complete(Kind.NORMS):
        activations = read_document(artifact, required=("activations", "hooks"))["activations"]
        if (activations.get("name"), activations.get("manifest_sha256")) in stores:
            found.append(artifact)
    return found


def refuse_nothing(workspace: Workspace) -> UsageError:
    """The error for a workspace without anything to show."""
    return catalogue.WORKSPACE_EMPTY(
        f"nothing to report on in {workspace.place}: no norms and no SAEs; make some with `nsae collect --model mini`, "
        f"`nsae norms` and `nsae train`, or choose another --workspace"
    )

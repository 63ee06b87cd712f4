"""The work of `nsae norms`: from a store to the artifact `norms/NAME` with its figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from nsae_cli import catalogue
from nsae_cli.analysis.checks import say_what_is_missing
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.norms import measure_norms, write_norms
from nsae_cli.analysis.probe import probe_store
from nsae_cli.device import DeviceOption
from nsae_cli.lm.token_text import token_text
from nsae_cli.report.figures import norm_heatmap, norm_heatmap_position0, save_png
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.shards import ActivationStore
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name


class NormsOptions(BaseModel):
    """Options of `nsae norms`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probe: bool = Field(False, description="rerun the model with other first tokens and another first position")
    model: str | None = Field(None, description="where the model is, for the probe")
    device: DeviceOption = Field("auto", description="where to run the probe")


@dataclass
class NormsArtifact:
    """The artifact, its norms.json, its figures and whether it was there already."""

    artifact: Artifact
    document: dict[str, Any]
    figures: list[Path]
    already_complete: bool


def run_norms(
    store: ActivationStore, options: NormsOptions, workspace: Workspace, name: str | None, reporter: Reporter
) -> NormsArtifact:
    """Measures a store's norms, writes the artifact and draws its figures.

    Args:
        name: of the result; None for the store's name.

    Raises:
        UsageError: NAME holds the norms of other activations, or a probe of a store without tokens.
        ArtifactError: the store, or what NAME holds, is damaged.
        NumericalError: a norm is not finite.
        BusyError: another process is writing NAME.
        Interrupted: a signal asked to stop; nothing was written.
    """
    name = check_name(store.name if name is None else name)
    folder = workspace.folder(Kind.NORMS, name)
    artifact = Artifact(Kind.NORMS, name, folder)
    figures = [folder / "norms.png", *([folder / "norms-position0.png"] if store.has_positions else [])]
    identity = {"name": store.name, "manifest_sha256": store.manifest_sha256}
    if (folder / Kind.NORMS.mark).is_file():
        document = read_document(artifact, required=("activations", "hooks"))
        found = document["activations"]["name"]
        if document["activations"] != identity:
            other = f"an earlier {found}" if found == store.name else f"{found}, not of {store.name}"
            raise catalogue.NAME_TAKEN(f"--name {name} holds the norms of {other}; choose another --name")
        if not options.probe or all(hook["probe"] is not None for hook in document["hooks"]):
            workspace.tidy(folder, reporter)
            return NormsArtifact(artifact, document, figures, already_complete=True)
    with workspace.writing(folder, reporter):
        document = _measure(store, options, folder, figures, reporter)
    return NormsArtifact(artifact, document, figures, already_complete=False)


def _measure(
    store: ActivationStore, options: NormsOptions, folder: Path, figures: list[Path], reporter: Reporter
) -> dict[str, Any]:
    """Measures, draws and writes; returns norms.json."""
    say_what_is_missing(store, reporter)
    reporter.note(f"measuring norms at {len(store.manifest.norm_hooks or store.manifest.hooks)} hooks of {store.name}")
    probe = probe_store(store, options.model, options.device, reporter) if options.probe else None
    result = measure_norms(store, token_text(store.manifest, reporter), probe)
    arrays = {key: tensor.numpy() for key, tensor in result.tensors.items()}
    commit.make_folder(folder)
    commit.remove_leftovers(folder)
    save_png(norm_heatmap(result.document, arrays["counts"], arrays["edges"]), figures[0])
    if store.has_positions:
        apart = norm_heatmap_position0(result.document, arrays["counts"], arrays["edges"], arrays["position0_counts"])
        if apart is not None:
            save_png(apart, figures[1])
    return write_norms(folder, result)

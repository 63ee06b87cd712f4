"""Which SAEs a command is about, and what its results are called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nsae_cli import catalogue
from nsae_cli.interop.hub import URL, HubReference, download_all
from nsae_cli.interop.opening import is_foreign
from nsae_cli.reporter import Reporter
from nsae_cli.store.sae_folder import load_sae
from nsae_cli.store.workspace import Artifact, Kind, Workspace, as_name


def choose_saes(
    references: Sequence[str], workspace: Workspace, reporter: Reporter, *, from_hub: bool = False
) -> list[Artifact]:
    """The SAEs that names and paths stand for, each once; without any the newest, with its whole group.

    Args:
        references: names and paths.
        workspace: where names are looked up.
        reporter: is told which one was taken.
        from_hub: whether ids of the Hugging Face hub are taken too.

    Raises:
        UsageError: nothing of that name.
        ArtifactError: not complete, no SAE, or one that `nsae train` did not make.
        ResourceError: the hub does not have it, or does not answer.
    """
    for reference in references:
        if Path(reference).is_file():
            load_sae(reference)  # says why a file cannot be one
    if references:
        found = [artifact for reference in references for artifact in _find(reference, workspace, reporter, from_hub)]
        return list({artifact.path.resolve(): artifact for artifact in found}.values())
    newest = workspace.newest(Kind.SAE)
    group = newest.name.partition("/")[0]
    reporter.note(f"using the newest saes: {group}")
    return workspace.find(Kind.SAE, group)


def result_names(saes: Sequence[Artifact], name: str | None) -> list[str]:
    """A name per result: the SAE's own, or `name`, followed by the cell where there are several."""
    if name is None:
        return [_as_name(sae) for sae in saes]
    if len(saes) == 1:
        return [name]
    cells = [sae.path.name for sae in saes]
    if len(set(cells)) < len(cells):
        cells = [_as_name(sae) for sae in saes]
    return [f"{name}-{cell}" for cell in cells]


def on_hub(reference: str, workspace: Workspace) -> HubReference | None:
    """The place on the hub that a reference names; None where it means something here.

    ``grid/L6-typo`` could be a hub id too; where there is a group, or a folder, `grid` it is a typo.
    """
    if not reference.startswith(URL):
        for name in (reference, reference.partition("/")[0]):
            if os.path.exists(workspace.folder(Kind.SAE, name)) or os.path.exists(name):
                return None
    return HubReference.parse(reference)


def _find(reference: str, workspace: Workspace, reporter: Reporter, from_hub: bool) -> list[Artifact]:
    place = on_hub(reference, workspace)
    if place is not None:
        if not from_hub:
            raise catalogue.NOT_FOUND(
                f"no saes named {reference[:80]!r} in {workspace.root} and no such path; if it is on the Hugging Face "
                f"hub, run `nsae pull {reference[:80]}` first: this command compares what the workspace holds"
            )
        saes = download_all(place, reporter=reporter)
        for sae in saes:
            _require_own(sae.path, str(sae.reference))
        return [Artifact(Kind.SAE, str(sae.reference), sae.path) for sae in saes]
    for folder in (workspace.folder(Kind.SAE, reference), Path(reference)):
        _require_own(folder, reference)
    return workspace.find(Kind.SAE, reference)


def _require_own(folder: Path, name: str) -> None:
    if is_foreign(folder):
        raise catalogue.NOT_TRAINED_HERE(
            f"{name} is another package's SAE, without what `nsae train` records; `nsae audit {name}` measures it"
        )


def _as_name(sae: Artifact) -> str:
    """A name for a result; of an SAE on the hub, whose name has more than NAME/CELL, what can stand in one."""
    return as_name(sae.name).strip("-")

"""Which SAEs a command is about, and what its results are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nsae_cli.reporter import Reporter
from nsae_cli.store.sae_folder import load_sae
from nsae_cli.store.workspace import Artifact, Kind, Workspace


def choose_saes(references: Sequence[str], workspace: Workspace, reporter: Reporter) -> list[Artifact]:
    """The SAEs that names and paths stand for, each once; without any the newest, with its whole group.

    Raises:
        UsageError: nothing of that name.
        ArtifactError: not complete, or no SAE.
    """
    for reference in references:
        if Path(reference).is_file():
            load_sae(reference)  # says why a file cannot be one
    if references:
        found = [artifact for reference in references for artifact in workspace.find(Kind.SAE, reference)]
        return list({artifact.path.resolve(): artifact for artifact in found}.values())
    newest = workspace.newest(Kind.SAE)
    group = newest.name.partition("/")[0]
    reporter.note(f"using the newest saes: {group}")
    return workspace.find(Kind.SAE, group)


def result_names(saes: Sequence[Artifact], name: str | None) -> list[str]:
    """A name per result: the SAE's own, or `name`, followed by the cell where there are several."""
    if name is None:
        return [sae.name.replace("/", "-") for sae in saes]
    if len(saes) == 1:
        return [name]
    cells = [sae.path.name for sae in saes]
    if len(set(cells)) < len(cells):
        cells = [sae.name.replace("/", "-") for sae in saes]
    return [f"{name}-{cell}" for cell in cells]

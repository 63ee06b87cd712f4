"""`nsae export`: SAEs as other packages read them, each in a folder of its own."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path

from nsae_cli import catalogue, interrupt
from nsae_cli.interop.export_formats import WRITERS, Target, Written
from nsae_cli.interop.foreign import ForeignSae
from nsae_cli.interop.hub import HubReference, download
from nsae_cli.interop.opening import is_foreign, read_folder
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.workspace import Kind, Workspace, as_name

EXPORTS = "exports"


@dataclass(frozen=True)
class Exported:
    """An SAE's export.

    Attributes:
        sae: its name.
        path: the folder to open.
        exactness: how near the package's outputs are to nsae's.
        code: Python that opens it.
        way: the same for all that are opened alike.
        already_there: whether the very files were there before.
    """

    sae: str
    path: Path
    exactness: str
    code: str
    way: str
    already_there: bool

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.path.iterdir() if path.is_file())


def export(
    reference: str, target: Target, out: Path | None, workspace: Workspace, reporter: Reporter
) -> list[Exported]:
    """Exports an SAE, or each of a group.

    Args:
        reference: a name in the workspace, a folder, or a hub id; of any package that nsae reads.
        target: the package.
        out: the folder to make; of a group the one above. None for ``exports/NAME-TARGET`` in the workspace.

    Raises:
        UsageError: no such SAE, one that the package cannot compute (before anything is written), or `out` is taken.
        ArtifactError: damaged, or an SAE that nsae does not compute.
        ResourceError: hub, disk.
        Interrupted: a signal asked to stop; the SAEs before it are complete.
    """
    saes = _find(reference, workspace)
    short = as_name(reference.rstrip("/").removeprefix("hf://"))
    short = Path(reference).name if Path(reference).is_absolute() else short.strip("-.") or "sae"
    base = out or workspace.root / EXPORTS / f"{short}-{target}"
    places = {name: base if len(saes) == 1 else base / found.path.name for name, found in saes.items()}
    made = []
    with workspace.writing(base, reporter), reporter.task("exporting", len(saes), "SAEs") as task:
        temporary = {name: place.parent / f".{place.name}.{uuid.uuid4().hex[:8]}.tmp" for name, place in places.items()}
        try:
            written = {}
            for name, found in saes.items():
                interrupt.stop_if_requested("stopped; nothing was exported, run the same command again")
                commit.make_folder(temporary[name])
                written[name] = WRITERS[target](found, temporary[name])
            # Only when every one of them can be expressed does any appear.
            for name, place in places.items():
                made.append(_publish(name, written[name], temporary[name], place))
                task.advance(1)
        finally:
            for folder in temporary.values():
                if folder.exists():
                    commit.remove_folder(folder)
            if not made:
                with contextlib.suppress(OSError):
                    base.rmdir()  # of a group of which none could be expressed
    return made


def _find(reference: str, workspace: Workspace) -> dict[str, ForeignSae]:
    """The SAEs by name."""
    for folder in (workspace.folder(Kind.SAE, reference), Path(reference)):
        if is_foreign(folder):
            return {folder.name: read_folder(folder)}
        if folder.is_dir():
            found = workspace.find(Kind.SAE, reference)
            return {artifact.name: read_folder(artifact.path) for artifact in found}
    place = HubReference.parse(reference)
    if place is None or workspace.folder(Kind.SAE, reference.partition("/")[0]).is_dir():
        workspace.find(Kind.SAE, reference)  # says what there is
    assert place is not None
    return {str(place): read_folder(download(place))}


def _publish(name: str, written: Written, temporary: Path, place: Path) -> Exported:
    inside = written.folder.relative_to(temporary)
    there = place.exists()
    if there and not _same(temporary, place):
        raise catalogue.NAME_TAKEN(f"--out {place}: the folder is there and holds something else; choose another --out")
    if not there:
        commit.make_folder(place.parent)
        commit.rename_folder(temporary, place)
    path = place / inside
    return Exported(name, path, written.exactness, written.code.format(path=str(path), name=name), written.code, there)


def _same(new: Path, old: Path) -> bool:
    if not old.is_dir():
        return False
    ours, theirs = ({path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
                    for folder in (new, old))  # fmt: skip
    return set(ours) <= set(theirs) and all(path.read_bytes() == theirs[at].read_bytes() for at, path in ours.items())

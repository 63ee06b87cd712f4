"""`nsae pull`: an SAE from the Hugging Face hub into the workspace, as it is there.

An SAE that nsae pushed comes back byte by byte, with its hashes checked, so that every command takes it as if it had
been trained here. One of another package keeps its files and their names; `nsae audit` measures it.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nsae_cli import catalogue, interrupt
from nsae_cli.interop import sparsify
from nsae_cli.interop.foreign import ForeignSae
from nsae_cli.interop.hub import HubReference, HubSae, download_all, wanted_files
from nsae_cli.interop.opening import read_folder
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.findings import damage_of
from nsae_cli.store.sae_folder import RUN
from nsae_cli.store.seal import is_plain_name
from nsae_cli.store.workspace import Artifact, Kind, Workspace, log_timing, name_from


@dataclass(frozen=True)
class PulledSae:
    """An SAE in the workspace: its artifact, what it is, and its bytes."""

    artifact: Artifact
    found: ForeignSae
    size: int


@dataclass(frozen=True)
class Pulled:
    """The SAEs of a pull, the commit that they are of, and whether they were there before."""

    saes: tuple[PulledSae, ...]
    commit: str
    already_complete: bool


def pull(reference: str, revision: str | None, name: str | None, workspace: Workspace, reporter: Reporter) -> Pulled:
    """Gets an SAE, or all of a folder where nsae trained every one of them, into ``saes/NAME``.

    Args:
        reference: ``org/repo[:folder]`` or ``hf://org/repo[/folder]``.
        revision: branch, tag or commit.
        name: NAME; None for the folder's, else the repository's.

    Raises:
        UsageError: not a place on the hub, nothing there, several SAEs of which one must be named, or NAME is taken.
        ArtifactError: what was downloaded is not what was pushed, a pickle, or an SAE that nsae does not compute.
        ResourceError: hub, disk.
        Interrupted: a signal asked to stop.
    """
    where = HubReference.of_argument(reference)
    if revision is not None and where.revision is not None and revision != where.revision:
        raise catalogue.REFUSED_COMBINATION(
            f"--revision {revision} and {reference} name different revisions; leave one out"
        )
    where = where.at(revision)
    chosen = name or name_from(where.name)
    folder = workspace.folder(Kind.SAE, chosen)
    reporter.note(f"asking the hub for {where}")
    saes = download_all(where, option="REPO", reporter=reporter)
    contents = _contents(saes)
    size = sum(path.stat().st_size for path in contents.values())
    if folder.exists():
        if _same(folder, contents):
            workspace.tidy(folder, reporter)
            return Pulled(_described(folder, contents, workspace), saes[0].commit, already_complete=True)
        raise catalogue.NAME_TAKEN(f"--name {chosen}: {folder} holds something else; choose another --name")
    with workspace.writing(folder, reporter):
        commit.remove_leftovers(folder.parent, folder.name)
        temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with reporter.task("copying", size, "bytes") as task:
                for place, source in contents.items():
                    interrupt.stop_if_requested("stopped; what was downloaded is kept, run the same command to go on")
                    _copy(source, temporary / place)
                    task.advance(source.stat().st_size)
            _require_whole(temporary, contents, where)
            for sae in saes:
                read_folder(sae.path)  # says in what way nsae cannot open it
            for cell in {temporary / Path(place).parent for place in contents if Path(place).name == RUN}:
                log_timing(cell, "pulled", repository=where.repository, commit=saes[0].commit)
            commit.rename_folder(temporary, folder)
        finally:
            if temporary.exists():
                commit.remove_folder(temporary)
    return Pulled(_described(folder, contents, workspace), saes[0].commit, already_complete=False)


def _contents(saes: Sequence[HubSae]) -> dict[str, Path]:
    """The files that a folder NAME gets, by their place in it, with where they are in the cache."""
    contents = {}
    for sae in saes:
        base = _place(sae, several=len(saes) > 1)
        in_repository = sae.path.relative_to(sae.root).as_posix()
        for name in wanted_files(in_repository):
            source = sae.root / name
            if not source.is_file():
                continue
            inside = PurePosixPath(name).parent == PurePosixPath(in_repository)
            if inside or not sae.is_own:
                place = PurePosixPath(base) / source.name if inside else PurePosixPath(source.name)
                contents[str(place)] = source
    return contents


def _place(sae: HubSae, *, several: bool) -> str:
    """Where in NAME: a group's SAE in a folder of its own, and sparsify's too, whose name says the hookpoint."""
    if several or (sae.path != sae.root and (sae.path / sparsify.WEIGHTS).is_file()):
        name = sae.path.name
        if not is_plain_name(name):
            raise catalogue.NAME_INVALID(
                f"{sae.reference}: {name[:60]!r} can be no folder's name here; pull it alone, with --name"
            )
        return name
    return "."


def _copy(source: Path, target: Path) -> None:
    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)  # the cache holds links to its blobs; here stands the file itself

    if not target.parent.is_dir():
        commit.make_folder(target.parent)
    commit.write_file(target, write)


def _same(folder: Path, contents: Mapping[str, Path]) -> bool:
    """Whether a folder holds these very files."""
    return all(
        (folder / place).is_file() and commit.file_sha256(folder / place) == commit.file_sha256(source)
        for place, source in contents.items()
    )


def _folders(folder: Path, contents: Mapping[str, Path]) -> list[Path]:
    """The SAEs' own folders among those with files."""
    places = sorted({str(PurePosixPath(place).parent) for place in contents})
    # config.json of a sparsify run lies above its SAE.
    return [folder / place for place in places if place != "." or len(places) == 1]


def _require_whole(folder: Path, contents: Mapping[str, Path], where: HubReference) -> None:
    """Refuses files that are not what their run.json says.

    Raises:
        ArtifactError: see above.
    """
    for cell in _folders(folder, contents):
        if (cell / RUN).is_file() and (finding := damage_of(cell, RUN)) is not None:
            raise catalogue.CONTENT_CHANGED(
                f"{where}: {finding}; remove it from the local cache (`hf cache rm model/{where.repository}`) and "
                f"pull again, or ask those who pushed it"
            )


def _described(folder: Path, contents: Mapping[str, Path], workspace: Workspace) -> tuple[PulledSae, ...]:
    return tuple(
        PulledSae(
            Artifact(Kind.SAE, workspace.name_of(Kind.SAE, cell), cell),
            read_folder(cell),
            sum(path.stat().st_size for path in cell.iterdir() if path.is_file()),
        )
        for cell in _folders(folder, contents)
    )

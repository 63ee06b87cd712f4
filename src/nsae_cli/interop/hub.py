"""SAEs on the Hugging Face hub: what an id names there, and their folders in the hub's local cache.

An id is ``org/repo`` or ``org/repo:folder``, with ``@revision`` after the repository where one is meant, or the same as
a URL, ``hf://org/repo[@revision][/folder]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import NsaeError, ResourceError
from nsae_cli.interop import dictionary_learning, openai, saelens_reader, sparsify
from nsae_cli.interop.conversion import PICKLES, how_to_convert
from nsae_cli.lm.hub import HubRepository, ask_hub, looks_like_hub_id
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.reporter import Reporter, SilentReporter
from nsae_cli.store.sae_folder import DATA_FILES, RUN

#: Weight files that make a folder an SAE's.
WEIGHT_FILES = (saelens_reader.WEIGHTS, sparsify.WEIGHTS, dictionary_learning.WEIGHTS, openai.WEIGHTS)
_BESIDE = (saelens_reader.CONFIG, saelens_reader.SCALER, dictionary_learning.CONFIG, openai.CONFIG)
_OWN = (*DATA_FILES, RUN)
#: What a hub id as a URL begins with.
URL = "hf://"
_REMEDY = "give the path of a folder"
_LISTED = 8


@dataclass(frozen=True)
class HubReference:
    """A place in a model repository.

    Attributes:
        repository: ``org/repo``.
        folder: empty for the repository's own.
        revision: branch, tag or commit; None for the default branch.
    """

    repository: str
    folder: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, reference: str) -> HubReference | None:
        """What an id names; None where it cannot be one."""
        if reference.startswith(URL):
            parts = reference.removeprefix(URL).removeprefix("models/").split("/", 2)
            repository, colon, folder = "/".join(parts[:2]).partition(":")
            folder = f"{folder}/{parts[2]}" if colon and len(parts) > 2 else folder or "".join(parts[2:])
        else:
            repository, _, folder = reference.partition(":")
        repository, at, revision = repository.partition("@")
        revision = unquote(revision)
        if "/" not in repository or not looks_like_hub_id(repository) or (at and not revision.strip()):
            return None
        if ".." in PurePosixPath(folder).parts or folder.startswith("/") or "\\" in folder:
            return None
        if reference.startswith(URL) and repository.partition("/")[0] in ("datasets", "spaces", "buckets"):
            return None
        return cls(repository, folder.strip("/"), revision if at else None)

    @classmethod
    def of_argument(cls, reference: str) -> HubReference:
        """What the argument REPO names.

        Raises:
            UsageError: no model repository.
        """
        if (where := cls.parse(reference)) is None:
            raise catalogue.OPTION_VALUE(
                f"REPO {reference[:80]!r}: expected org/repo, org/repo:folder or hf://org/repo/folder of a model "
                f"repository"
            )
        return where

    def at(self, revision: str | None) -> HubReference:
        """The same place at another revision; None leaves it."""
        return self if revision is None else HubReference(self.repository, self.folder, revision)

    def inside(self, folder: str) -> HubReference:
        """Another folder of the repository."""
        return HubReference(self.repository, "" if folder == "." else folder, self.revision)

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{quote(self.revision, safe='/')}"
        return f"{self.repository}{at}:{self.folder}" if self.folder else f"{self.repository}{at}"

    @property
    def prefix(self) -> str:
        """What the names of its files begin with."""
        return f"{self.folder}/" if self.folder else ""

    @property
    def name(self) -> str:
        """A short name: the folder's own, else the repository's."""
        return PurePosixPath(self.folder or self.repository).name


@dataclass(frozen=True)
class HubSae:
    """An SAE of the hub in the local cache.

    Attributes:
        reference: where it is on the hub, at the revision that was asked for.
        path: its folder in the cache.
        root: the repository's folder in the cache.
        commit: the commit that the files are of.
    """

    reference: HubReference
    path: Path
    root: Path
    commit: str

    @property
    def is_own(self) -> bool:
        """Whether `nsae train` made it."""
        return (self.path / RUN).is_file()


def download(reference: HubReference) -> Path:
    """The SAE's folder in the local cache, downloaded where it is not there yet; errors as of `download_all`."""
    return download_all(reference, groups=False)[0].path


def download_all(
    reference: HubReference, *, groups: bool = True, option: str = "SAE", reporter: Reporter | None = None
) -> list[HubSae]:
    """The SAE of a folder, or with `groups` all SAEs below it where `nsae train` made every one of them.

    Args:
        reference: the folder.
        groups: whether a folder may stand for several.
        option: what messages call it.
        reporter: for progress.

    Raises:
        UsageError: the folder holds several SAEs, or none.
        ArtifactError: its weights are only there as a pickle.
        ResourceError: no such repository; the hub does not answer and the cache does not have it.
        Interrupted: a signal asked to stop; what was downloaded is kept.
    """
    with quiet_libraries():
        remedy = _REMEDY if option == "SAE" else "check the name, and `hf auth whoami`"
        found = ask_hub("model", reference.repository, reference.revision, remedy, option=option)
        offline = _not_reachable(reference, option)
        folders = None if found.files is None else _folders(reference, found.files, groups)
        # Without an answer nobody knows what there is: the cache may have the folder that was named.
        wanted = folders or [reference.folder]
        with (reporter or SilentReporter()).task("downloading", len(wanted), "SAEs") as task:
            for folder in wanted:
                interrupt.stop_if_requested("stopped; what was downloaded is kept, run the same command to go on")
                root = _snapshot(reference, found, wanted_files(folder), offline)
                task.advance(1)
    if folders is None:
        cached = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        if not any(PurePosixPath(name).name in WEIGHT_FILES for name in cached if name.startswith(reference.prefix)):
            raise offline
        folders = _folders(reference, tuple(cached), groups)
    saes = [HubSae(reference.inside(folder), root / folder, root, root.name) for folder in folders]
    for sae in saes:
        if not any((sae.path / name).is_file() for name in WEIGHT_FILES):
            raise offline
    return saes


def wanted_files(folder: str) -> list[str]:
    """The files of a repository that an SAE in `folder` may need, by path in it."""
    place = PurePosixPath(folder)
    names = [str(place / name) for name in dict.fromkeys((*WEIGHT_FILES, *_BESIDE, *_OWN))]
    # sparsify's run says above the hookpoint's folder what the SAE was trained on.
    above = [place.parent, place.parent.parent] if folder not in ("", ".") else []
    return names + [str(parent / sparsify.RUN_CONFIG) for parent in above]


def _snapshot(reference: HubReference, found: HubRepository, patterns: Sequence[str], offline: ResourceError) -> Path:
    try:
        return Path(
            snapshot_download(
                reference.repository,
                revision=reference.revision,  # by its name, so that the cache knows it without a network
                allow_patterns=list(patterns),
                local_files_only=not found.reachable,
            )
        )
    except LocalEntryNotFoundError as error:
        raise offline from error
    except NsaeError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:
        raise catalogue.DOWNLOAD_FAILED(
            f"SAE {reference.repository}: the download failed; try again, or {_REMEDY}"
        ) from error


def _not_reachable(reference: HubReference, option: str) -> ResourceError:
    if option != "SAE":
        return catalogue.HUB_UNREACHABLE(
            f"{option} {reference}: the Hugging Face hub is not reachable, and the SAE is not in the local cache; run "
            f"the same command with a network"
        )
    return catalogue.HUB_UNREACHABLE(
        f"SAE {reference}: there is no such folder here, the Hugging Face hub is not reachable, and the SAE is not in "
        f"the local cache; {_REMEDY}"
    )


def _folders(reference: HubReference, files: tuple[str, ...], groups: bool) -> list[str]:
    """The folder of the SAE that is meant, or of all of a group; ``.`` is the repository itself."""
    inside = [name.removeprefix(reference.prefix) for name in files if name.startswith(reference.prefix)]
    if any(name in WEIGHT_FILES for name in inside):
        return [reference.folder or "."]
    what = f"SAE {reference}"
    several = sorted({str(PurePosixPath(name).parent) for name in inside if PurePosixPath(name).name in WEIGHT_FILES})
    pickles = sorted((name for name in inside if name.endswith(PICKLES)), key=lambda name: name.count("/"))
    if pickles and not several:
        raise catalogue.PICKLE(
            f"{what}: {pickles[0]} is a pickle, which can run code when read, and nsae reads safetensors only; get it "
            f"with `hf download {reference.repository} --include '{reference.prefix}*' --local-dir DIR`, then "
            f"{how_to_convert(Path(pickles[0]))}"
        )
    if several and groups and all(f"{folder}/{RUN}" in inside for folder in several):
        return [reference.prefix + folder for folder in several]
    if several:
        shown = ", ".join(several[:_LISTED]) + (f" and {len(several) - _LISTED} more" if len(several) > _LISTED else "")
        named = reference.inside(reference.prefix + several[0])
        raise catalogue.SEVERAL_SAES(f"{what} holds {len(several)} SAEs: {shown}; name one, as {named}")
    raise catalogue.SAE_NOT_FOUND(f"{what}: no SAE is there (none of {', '.join(WEIGHT_FILES)}); check the name")

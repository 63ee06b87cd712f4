"""An SAE on the Hugging Face hub: `org/repo` or `org/repo:folder` → a folder in the hub's local cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from nsae_cli import catalogue
from nsae_cli.errors import ResourceError
from nsae_cli.interop import dictionary_learning, openai, saelens_reader, sparsify
from nsae_cli.interop.conversion import PICKLES, how_to_convert
from nsae_cli.lm.hub import ask_hub, looks_like_hub_id
from nsae_cli.lm.quiet import quiet_libraries

#: Weight files that make a folder an SAE's.
WEIGHT_FILES = (saelens_reader.WEIGHTS, sparsify.WEIGHTS, dictionary_learning.WEIGHTS, openai.WEIGHTS)
_BESIDE = (saelens_reader.CONFIG, saelens_reader.SCALER, dictionary_learning.CONFIG, openai.CONFIG, "run.json")
_REMEDY = "give the path of a folder"
_LISTED = 8


@dataclass(frozen=True)
class HubReference:
    """``org/repo:folder``; the folder is empty for the repository's own."""

    repository: str
    folder: str

    @classmethod
    def parse(cls, reference: str) -> HubReference | None:
        """None where it cannot be one."""
        repository, _, folder = reference.partition(":")
        parts = PurePosixPath(folder).parts
        if "/" not in repository or not looks_like_hub_id(repository) or ".." in parts or folder.startswith("/"):
            return None
        return cls(repository, folder.strip("/"))

    def __str__(self) -> str:
        return f"{self.repository}:{self.folder}" if self.folder else self.repository

    @property
    def prefix(self) -> str:
        """What the names of its files begin with."""
        return f"{self.folder}/" if self.folder else ""


def download(reference: HubReference) -> Path:
    """The SAE's folder in the local cache, downloaded where it is not there yet.

    Raises:
        UsageError: the repository holds several SAEs, or none under that folder.
        ArtifactError: its weights are only there as a pickle.
        ResourceError: no such repository; the hub does not answer and the cache does not have it.
    """
    with quiet_libraries():
        found = ask_hub("model", reference.repository, None, _REMEDY, option="SAE")
        if found.files is not None:
            _require_weights(reference, found.files)
        prefix, parent = reference.prefix, PurePosixPath(reference.folder).parent
        wanted = [prefix + name for name in (*WEIGHT_FILES, *_BESIDE)]
        wanted += [str(folder / sparsify.RUN_CONFIG) for folder in (parent, parent.parent) if reference.folder]
        try:
            root = Path(
                snapshot_download(
                    reference.repository,
                    revision=found.commit,
                    allow_patterns=wanted,
                    local_files_only=not found.reachable,
                )
            )
        except LocalEntryNotFoundError as error:
            raise _not_reachable(reference) from error
        except (HfHubHTTPError, OSError) as error:
            raise catalogue.DOWNLOAD_FAILED(
                f"SAE {reference.repository}: the download failed; try again, or {_REMEDY}"
            ) from error
    folder = root / reference.folder
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise _not_reachable(reference)
    return folder


def _not_reachable(reference: HubReference) -> ResourceError:
    return catalogue.HUB_UNREACHABLE(
        f"SAE {reference}: there is no such folder here, the Hugging Face hub is not reachable, and the SAE is not in "
        f"the local cache; {_REMEDY}"
    )


def _require_weights(reference: HubReference, files: tuple[str, ...]) -> None:
    inside = [name.removeprefix(reference.prefix) for name in files if name.startswith(reference.prefix)]
    if any(name in WEIGHT_FILES for name in inside):
        return
    what = f"SAE {reference}"
    several = sorted({str(PurePosixPath(name).parent) for name in inside if PurePosixPath(name).name in WEIGHT_FILES})
    pickles = sorted((name for name in inside if name.endswith(PICKLES)), key=lambda name: name.count("/"))
    if pickles and not several:
        raise catalogue.PICKLE(
            f"{what}: {pickles[0]} is a pickle, which can run code when read, and nsae reads safetensors only; get it "
            f"with `hf download {reference.repository} --include '{reference.prefix}*' --local-dir DIR`, then "
            f"{how_to_convert(Path(pickles[0]))}"
        )
    if several:
        shown = ", ".join(several[:_LISTED]) + (f" and {len(several) - _LISTED} more" if len(several) > _LISTED else "")
        base = f"{reference.repository}:{reference.prefix}"
        raise catalogue.SEVERAL_SAES(f"{what} holds {len(several)} SAEs: {shown}; name one, as {base}{several[0]}")
    raise catalogue.SAE_NOT_FOUND(f"{what}: no SAE is there (none of {', '.join(WEIGHT_FILES)}); check the name")

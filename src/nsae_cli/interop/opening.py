"""Finding out what a folder, a file or a hub id holds, and reading it."""

from __future__ import annotations

from pathlib import Path

from nsae_cli import catalogue
from nsae_cli.errors import ArtifactError
from nsae_cli.interop import dictionary_learning, openai, saelens_reader, sparsify
from nsae_cli.interop.conversion import PICKLES, how_to_convert
from nsae_cli.interop.foreign import ForeignSae, hub_model, text, truth, whole_number
from nsae_cli.interop.hub import WEIGHT_FILES, HubReference, download
from nsae_cli.interop.tensors import refuse_non_finite
from nsae_cli.store.commit import read_json
from nsae_cli.store.sae_folder import LOG, RUN, load_sae

_LISTED = 8
#: What is in an SAE's folder, or above it, where `nsae train` made it, is making it, or had made it.
_OF_TRAINING = (RUN, LOG, "checkpoints", "../checkpoints")


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds an SAE that `nsae train` did not make, nor is making."""
    if not folder.is_dir() or any((folder / name).exists() for name in _OF_TRAINING):
        return False
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def open_sae(reference: str) -> ForeignSae:
    """Opens an SAE of nsae, SAELens, sparsify, dictionary_learning or OpenAI.

    Args:
        reference: a folder, or a hub id: ``org/repo``, ``org/repo:folder`` or ``hf://org/repo/folder``.

    Raises:
        UsageError: there is nothing of that name, or several SAEs.
        ArtifactError: damaged, a pickle, or something that nsae does not compute.
        NumericalError: a weight is not finite.
        ResourceError: the hub does not answer or has no such repository.
    """
    folder = Path(reference)
    if folder.is_file():
        raise _refuse_file(folder)
    if folder.is_dir():
        return read_folder(folder)
    on_hub = HubReference.parse(reference)
    if on_hub is None:
        raise catalogue.SAE_NOT_FOUND(
            f"SAE {reference!r}: no such SAE in the workspace, no such folder, and not a hub id such as org/repo or "
            f"org/repo:folder; check the name"
        )
    return read_folder(download(on_hub))


def read_folder(folder: Path) -> ForeignSae:
    """Reads the SAE in a folder, by the files that are there."""
    has = {path.name for path in folder.iterdir()}
    if RUN in has and saelens_reader.WEIGHTS in has:
        return _read_own(folder)
    if openai.WEIGHTS in has:
        return openai.read_openai(folder)
    if saelens_reader.WEIGHTS in has:
        return saelens_reader.read_saelens(folder)
    if sparsify.WEIGHTS in has:
        return sparsify.read_sparsify(folder)
    if dictionary_learning.WEIGHTS in has:
        return dictionary_learning.read_dictionary_learning(folder)
    pickles = sorted(name for name in has if name.endswith(PICKLES))
    if pickles:
        raise _refuse_file(folder / pickles[0])
    inside = sorted(path.parent.relative_to(folder) for name in WEIGHT_FILES for path in folder.glob(f"**/{name}"))
    if inside:
        shown = ", ".join(map(str, inside[:_LISTED]))
        more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
        raise catalogue.SEVERAL_SAES(
            f"{folder} holds {len(inside)} SAEs: {shown}{more}; name one, as {folder / inside[0]}"
        )
    raise catalogue.NOT_AN_ARTIFACT(
        f"{folder} holds no SAE: none of {', '.join(WEIGHT_FILES)} is there; name an SAE's own folder"
    )


def _refuse_file(path: Path) -> ArtifactError:
    if path.suffix in PICKLES:
        return catalogue.PICKLE(
            f"{path} is a pickle, which can run code when read, and nsae reads safetensors only; {how_to_convert(path)}"
        )
    return catalogue.NOT_AN_ARTIFACT(
        f"{path} is a file; name the folder that holds the SAE's configuration and weights"
    )


def _read_own(folder: Path) -> ForeignSae:
    saved = load_sae(folder)
    weights = folder / saelens_reader.WEIGHTS
    for name, tensor in saved.sae.named().items():
        refuse_non_finite(weights, name, tensor)
    run, metadata = saved.run, read_json(folder / saelens_reader.CONFIG).get("metadata") or {}
    return ForeignSae(
        sae=saved.sae,
        format="nsae",
        architecture=saved.sae.act,
        path=folder,
        weights_file=weights,
        hook=saved.hook,
        model=hub_model(run.get("model")),
        context_size=whole_number(run.get("context_size")),
        prepend_bos=truth(run.get("bos")),
        dataset=text(metadata.get("dataset_path")),
        centred_weights=False,
        run=run,
    )

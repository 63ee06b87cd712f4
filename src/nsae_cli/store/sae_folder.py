"""A saved SAE: `cfg.json` and `sae_weights.safetensors` in SAELens' layout, and `run.json`, the completion mark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nsae_cli import catalogue
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store import commit, presence
from nsae_cli.store.data_files import read_data_file
from nsae_cli.store.seal import repair

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
RUN = "run.json"
LOG = "metrics.jsonl"
#: What run.json seals.
DATA_FILES = (CONFIG, WEIGHTS, "features.safetensors", LOG)
FORMAT_VERSION = 1

#: cfg.json's architecture per activation. SAELens reads `standard` as relu; a tanh-relu SAE must never be opened so,
#: hence a name of its own, which SAELens refuses unless it has been registered.
ARCHITECTURES = {"relu": "standard", "tanh-relu": "nsae_tanh_relu", "topk": "topk", "jumprelu": "jumprelu"}
_ACTS = {architecture: act for act, architecture in ARCHITECTURES.items()}

#: The oldest SAELens format that this layout follows.
_SAE_LENS_FORMAT = "6.0.0"


@dataclass(frozen=True)
class SavedSae:
    """An SAE read from disk: the autoencoder in raw units, its run.json and where it was."""

    sae: SparseAutoencoder
    run: dict[str, Any]
    path: Path

    @property
    def hook(self) -> str:
        """The hook that it was trained on."""
        return str(self.run["hook"])


def write_sae(folder: Path, sae: SparseAutoencoder, metadata: dict[str, Any]) -> None:
    """Writes weights (float32, input scale folded in) and cfg.json. `run.json` follows by `write_run`."""
    commit.write_tensors(folder / WEIGHTS, {name: tensor.float() for name, tensor in sae.named().items()})
    commit.write_json(
        folder / CONFIG,
        {
            "architecture": ARCHITECTURES[sae.act],
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **({} if sae.k is None else {"k": sae.k, "rescale_acts_by_decoder_norm": False}),
            "metadata": {"sae_lens_version": _SAE_LENS_FORMAT, **metadata},
        },
    )


def write_run(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Writes run.json, which marks the SAE as complete and holds the hashes of its files; returns it as written."""
    files = [name for name in DATA_FILES if (folder / name).is_file()]
    if LOG in files:
        commit.sync(folder / LOG)  # its lines were appended without waiting for the disk
    return commit.write_document(folder / RUN, run, files)


def load_sae(path: Path | str) -> SavedSae:
    """Opens an SAE that `nsae train` has finished.

    Raises:
        ArtifactError: unfinished, damaged, of another version, a pickle, or an architecture that nsae cannot compute.
    """
    folder = Path(path)
    if folder.is_file():
        raise catalogue.NOT_AN_ARTIFACT(
            f"{folder} is a file; nsae reads safetensors only, from a folder with {CONFIG} and {RUN}"
        )
    if not (folder / RUN).is_file():
        raise catalogue.UNFINISHED(
            f"{folder} holds no {RUN}: training is not finished; run the same `nsae train` again"
        )
    run = commit.read_json(folder / RUN)
    if not isinstance(run, dict) or run.get("format_version") != FORMAT_VERSION:
        raise catalogue.FORMAT_VERSION(
            f"{folder / RUN} is not of format {FORMAT_VERSION}; it was written by another nsae, read it with that one"
        )
    config = _read_config(folder, run)
    act = _ACTS.get(str(config.get("architecture"))) if isinstance(config, dict) else None
    if act is None:
        raise catalogue.SAE_INVALID(f"{folder / CONFIG}: unknown architecture; nsae knows {', '.join(_ACTS)}")
    tensors = _read_tensors(folder, config, run, thresholds=act == "jumprelu")
    threshold = tensors.pop("threshold", None)
    k = _read_k(folder, config) if act == "topk" else None
    return SavedSae(SparseAutoencoder(act, Weights(**tensors), k, threshold), run, folder)


def _read_config(folder: Path, run: dict[str, Any]) -> Any:
    """cfg.json, as it was written and as run.json has it."""
    path = folder / CONFIG
    content = read_data_file(path, run, at_most=commit.MAX_JSON_BYTES)
    config = commit.parse_json(content.decode("utf-8", errors="replace"), path)
    if not isinstance(config, dict):
        return config
    known: dict[str, Any] = {key: run[key] for key in ("d_in", "d_sae") if key in run}
    options = run.get("config")
    if isinstance(options, dict) and isinstance(act := options.get("act"), str):
        known["architecture"] = ARCHITECTURES.get("jumprelu" if act == "batchtopk" else act)
        if act == "topk":
            known["k"] = options.get("k")
    for key, value in known.items():
        if config.get(key) != value:
            raise catalogue.SAE_INVALID(
                f"{path}: {key} is {config.get(key)!r}, run.json says {value!r}; {repair(path)}"
            )
    return config


def _read_k(folder: Path, config: dict[str, Any]) -> int:
    k = config.get("k")
    if not isinstance(k, int) or not 1 <= k <= config["d_sae"]:
        raise catalogue.SAE_INVALID(
            f"{folder / CONFIG}: k is {k!r}, expected 1 to {config['d_sae']}; train the SAE again"
        )
    if config.get("rescale_acts_by_decoder_norm") is not False:
        raise catalogue.SAE_INVALID(
            f"{folder / CONFIG}: rescale_acts_by_decoder_norm is not false; train the SAE again"
        )
    return k


def _read_tensors(
    folder: Path, config: dict[str, Any], run: dict[str, Any], *, thresholds: bool
) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    presence.bring(path)
    try:
        tensors = load_file(path, backend="pread")
    except (SafetensorError, OSError) as error:
        commit.refuse_unread(error, path)
        reason = str(error).splitlines()[0]
        raise catalogue.SAE_DAMAGED(f"{path} cannot be read ({reason}); the SAE is damaged, train it again") from error
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if thresholds:
        shapes["threshold"] = (d_sae,)
    hashes = run.get("weights_sha256") or {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            found = "missing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
            raise catalogue.SAE_DAMAGED(
                f"{path}: {name} is {found}, cfg.json says {list(shape)} float32; train the SAE again"
            )
        if name in hashes and commit.tensor_sha256(tensor) != hashes[name]:
            raise catalogue.CONTENT_CHANGED(
                f"{path}: the content of {name} is not what was written (SHA-256 differs); {repair(path)}"
            )
    return {name: tensors[name] for name in shapes}

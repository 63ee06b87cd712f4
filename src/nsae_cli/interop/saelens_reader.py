"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, of SAELens 6 and of 0.6 to 5 (one flat cfg.json).

nsae writes the same layout, with an architecture of its own for tanh-relu, so this reads nsae's SAEs too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open

from nsae_cli import catalogue
from nsae_cli.interop.foreign import ForeignSae, hub_model, text, truth, whole_number
from nsae_cli.interop.normalized import RowNormalizedAutoencoder
from nsae_cli.interop.tensors import as_jumprelu, finite_scale, plain_sae, read_tensors, size_of, topk_of
from nsae_cli.sae.autoencoder import Autoencoder
from nsae_cli.store.commit import read_json

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

_COMMON = {"W_enc": "dn", "W_dec": "nd", "b_dec": "d"}
#: Tensors beside the common ones, per architecture.
_SHAPES = {
    "standard": {"b_enc": "n"},
    "topk": {"b_enc": "n"},
    "jumprelu": {"b_enc": "n", "threshold": "n"},
    "gated": {"b_gate": "n", "r_mag": "n", "b_mag": "n"},
    "nsae_tanh_relu": {"b_enc": "n"},
}
_Normalisation = Literal["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]
_NORMALISATIONS: tuple[_Normalisation, ...] = get_args(_Normalisation)


def read_saelens(folder: Path) -> ForeignSae:
    """Reads an SAE in SAELens' layout.

    Raises:
        ArtifactError: damaged, or an architecture, activation or normalisation that nsae does not compute.
        NumericalError: a weight is not finite.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise catalogue.FOREIGN_CONFIG(
            f"{path} is no JSON object; it is not SAELens' configuration, get the files again"
        )
    metadata = config.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    legacy = _is_legacy(config, metadata, path)
    notes: list[str] = []
    architecture, k = _flat_architecture(config, path) if legacy else _architecture(config, path)
    sae = _read(folder, config, architecture, k, notes)
    said = config if legacy else metadata
    hook = text(said.get("hook_name")) or text(said.get("hook_point"))
    head = said.get("hook_head_index", said.get("hook_point_head_index"))
    if hook is not None and head is not None:
        hook = f"{hook} of head {head}"
    return ForeignSae(
        sae=sae,
        format="SAELens < 6" if legacy else "SAELens",
        architecture=architecture,
        path=folder,
        weights_file=folder / WEIGHTS,
        hook=hook,
        model=hub_model(said.get("model_name")),
        context_size=whole_number(said.get("context_size")),
        prepend_bos=truth(said.get("prepend_bos", True if legacy else None)),
        dataset=text(said.get("dataset_path")),
        centred_weights=_centred_weights(said),
        notes=tuple(notes),
    )


def _is_legacy(config: dict[str, Any], metadata: dict[str, Any], path: Path) -> bool:
    """SAELens' own rule: without a version of 6 or later, cfg.json is the flat one."""
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version is None:
        return True
    major = str(version).partition(".")[0]
    if not major.isdigit():
        raise catalogue.FOREIGN_CONFIG(f"{path}: sae_lens_version is {version!r}, expected a version such as 6.0.0")
    return int(major) < 6


def _architecture(config: dict[str, Any], path: Path) -> tuple[str, int | None]:
    """Architecture, and k of topk, of SAELens 6."""
    architecture = config.get("architecture")
    if architecture not in tuple(_SHAPES):
        raise catalogue.FOREIGN_ARCHITECTURE(
            f"{path}: architecture {architecture!r} is not one that nsae computes; known are {', '.join(_SHAPES)}"
        )
    # SAELens 6 ignores this key and computes relu: whoever wrote it meant something else.
    for key in ("activation_fn", "activation_fn_str"):
        if config.get(key) not in (None, "relu"):
            raise catalogue.FOREIGN_ARCHITECTURE(
                f"{path}: {key} is {config[key]!r}, but in SAELens 6 {architecture!r} is always relu; an SAE with "
                f"another activation needs an architecture of its own"
            )
    return str(architecture), None if architecture != "topk" else topk_of(config.get("k"), _n(config, path), path)


def _flat_architecture(config: dict[str, Any], path: Path) -> tuple[str, int | None]:
    """Architecture, and k of topk, of SAELens 0.6 to 5, where the activation is a key of its own."""
    architecture = config.get("architecture", "standard")
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    options = config.get("activation_fn_kwargs")
    k = options.get("k") if isinstance(options, dict) else None
    if architecture in ("standard", "topk") and activation == "topk":
        return "topk", topk_of(k if k is not None else config.get("k"), _n(config, path), path)
    if architecture == "topk":
        return "topk", topk_of(config.get("k", k), _n(config, path), path)
    if architecture == "standard" and activation == "tanh-relu":
        return "nsae_tanh_relu", None
    if architecture in ("standard", "jumprelu", "gated") and activation == "relu":
        return str(architecture), None
    raise catalogue.FOREIGN_ARCHITECTURE(
        f"{path}: architecture {architecture!r} with activation {activation!r} is not one that nsae computes; known "
        f"are standard with relu, tanh-relu or topk, and jumprelu and gated with relu"
    )


def _n(config: dict[str, Any], path: Path) -> int:
    return size_of(config, "d_sae", path)


def _read(folder: Path, config: dict[str, Any], architecture: str, k: int | None, notes: list[str]) -> Autoencoder:
    path = folder / CONFIG
    sizes = {"d": size_of(config, "d_in", path), "n": _n(config, path)}
    shapes = {**_COMMON, **_SHAPES[architecture]}
    finetuned = ("scaling_factor", "finetuning_scaling_factor")
    present = [name for name in finetuned if name in _names(folder / WEIGHTS)]
    tensors = read_tensors(folder / WEIGHTS, {**shapes, **dict.fromkeys(present, "n")}, sizes)
    for name in present:
        _fold_finetuning(tensors, tensors.pop(name), config, path, notes)
    normalisation = _normalisation(config, path)
    scale = 1.0
    if normalisation == "expected_average_only_in":
        scale = _average_scale(folder, config)
        notes.append(f"the scale {scale:.6g} of its activations (expected_average_only_in) is folded into the weights")
    if config.get("rescale_acts_by_decoder_norm", False):
        if architecture != "topk":
            raise catalogue.FOREIGN_CONFIG(
                f"{path}: rescale_acts_by_decoder_norm is true with {architecture}, expected only with topk"
            )
        norms = tensors["W_dec"].double().norm(dim=1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"].double() * norms, tensors["b_enc"].double() * norms
        tensors["W_dec"] = tensors["W_dec"].double() / norms.unsqueeze(1)
        notes.append("its decoder norms (rescale_acts_by_decoder_norm) are folded into the encoder")
    threshold = tensors.pop("threshold", None)
    act = {"standard": "relu", "nsae_tanh_relu": "tanh-relu", "topk": "topk"}.get(architecture, "jumprelu")
    if architecture == "gated":
        gate = (tensors.pop(name) for name in ("b_gate", "r_mag", "b_mag"))
        tensors, threshold = as_jumprelu(tensors, *gate)
        notes.append("its gate is expressed as thresholds of jumprelu, which compute the same")
    subtract = config.get("apply_b_dec_to_input", True)
    if not isinstance(subtract, bool):
        raise catalogue.FOREIGN_CONFIG(f"{path}: apply_b_dec_to_input is {subtract!r}, expected true or false")
    sae = plain_sae(
        act,
        tensors,
        subtract_b_dec=subtract,
        input_scale=scale,
        k=k,
        threshold=None if threshold is None else threshold.float(),
    )
    if normalisation == "none" or normalisation == "expected_average_only_in":
        return sae
    notes.append(f"it normalises each row by itself ({normalisation}); L1 is in its units, not in those of x")
    return RowNormalizedAutoencoder(sae, normalisation)


def _names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return set(file.keys())
    except (SafetensorError, OSError):
        return set()  # reading it says why


def _fold_finetuning(
    tensors: dict[str, torch.Tensor], factor: torch.Tensor, config: dict[str, Any], path: Path, notes: list[str]
) -> None:
    """x̂ = (acts·factor)·W_dec + b_dec: into the rows of W_dec. Ones were written for a time and mean nothing."""
    if torch.allclose(factor, torch.ones_like(factor)):
        return
    if not config.get("finetuning_scaling_factor", False):
        raise catalogue.FOREIGN_SCALE(
            f"{path}: there are finetuned scaling factors other than 1, but finetuning_scaling_factor is not true; "
            f"make it true if they are to be applied, else remove them"
        )
    tensors["W_dec"] = tensors["W_dec"].double() * factor.double().unsqueeze(1)
    notes.append("its finetuned scaling factors are folded into the decoder")


def _normalisation(config: dict[str, Any], path: Path) -> _Normalisation:
    value = config.get("normalize_activations")
    if isinstance(value, bool):  # before SAELens 3
        value = "expected_average_only_in" if value else "none"
    value = "none" if value is None else value
    for known in _NORMALISATIONS:
        if value == known:
            return known
    raise catalogue.FOREIGN_ARCHITECTURE(
        f"{path}: normalize_activations {value!r} is not one that nsae computes; known are {', '.join(_NORMALISATIONS)}"
    )


def _average_scale(folder: Path, config: dict[str, Any]) -> float:
    """The factor by which activations were multiplied: SAELens keeps it beside a checkpoint, or not at all."""
    if "norm_scaling_factor" in config:
        return finite_scale(config["norm_scaling_factor"], folder / CONFIG, "norm_scaling_factor")
    scaler = folder / SCALER
    if scaler.is_file():
        values = read_json(scaler)
        value = values.get("scaling_factor") if isinstance(values, dict) else None
        return finite_scale(value, scaler, "scaling_factor")
    raise catalogue.FOREIGN_SCALE(
        f"{folder / CONFIG}: its activations were scaled to mean norm √d_in (expected_average_only_in), and the folder "
        f'does not say by how much; add "norm_scaling_factor": √d_in ÷ mean norm to cfg.json'
    )


def _centred_weights(said: dict[str, Any]) -> bool | None:
    options = said.get("model_from_pretrained_kwargs")
    return truth(options.get("center_writing_weights")) if isinstance(options, dict) else None

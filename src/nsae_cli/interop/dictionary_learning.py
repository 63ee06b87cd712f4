"""dictionary_learning folders: `config.json`, and `ae.safetensors` made from its `ae.pt`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nsae_cli import catalogue
from nsae_cli.interop.foreign import ForeignSae, hub_model, text, whole_number
from nsae_cli.interop.tensors import as_jumprelu, plain_sae, read_tensors, size_of, topk_of
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store.commit import read_json

CONFIG, WEIGHTS, PICKLE = "config.json", "ae.safetensors", "ae.pt"

_LINEAR = {"encoder.weight": "nd", "encoder.bias": "n", "decoder.weight": "dn"}
#: Tensors per dict_class.
_SHAPES = {
    "AutoEncoder": {**_LINEAR, "bias": "d"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "d"},
    "GatedAutoEncoder": {
        "encoder.weight": "nd", "decoder.weight": "dn", "decoder_bias": "d", "r_mag": "n", "gate_bias": "n",
        "mag_bias": "n",
    },
    "JumpReluAutoEncoder": {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d", "threshold": "n"},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "d", "k": "", "threshold": ""},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "d", "k": "", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d", "k": "", "threshold": ""},
}  # fmt: skip


def read_dictionary_learning(folder: Path) -> ForeignSae:
    """Reads an SAE in dictionary_learning's layout.

    Raises:
        ArtifactError: damaged, or a dict_class that nsae does not compute.
        NumericalError: a weight is not finite.
    """
    path = folder / CONFIG
    config = read_json(path)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        raise catalogue.FOREIGN_CONFIG(
            f"{path} has no trainer; it is not dictionary_learning's configuration, get the files again"
        )
    name = trainer.get("dict_class")
    if name not in tuple(_SHAPES):
        raise catalogue.FOREIGN_ARCHITECTURE(
            f"{path}: dict_class {name!r} is not one that nsae computes; known are {', '.join(_SHAPES)}"
        )
    notes: list[str] = []
    buffer = config.get("buffer")
    buffer = buffer if isinstance(buffer, dict) else {}
    return ForeignSae(
        sae=_read(folder, str(name), trainer, notes),
        format="dictionary_learning",
        architecture=str(name),
        path=folder,
        weights_file=folder / WEIGHTS,
        hook=_hook(trainer, buffer),
        model=hub_model(trainer.get("lm_name")),
        context_size=whole_number(buffer.get("ctx_len")),
        centred_weights=False,
        notes=tuple(notes),
    )


def _read(folder: Path, name: str, trainer: dict[str, Any], notes: list[str]) -> SparseAutoencoder:
    path = folder / CONFIG
    sizes = {"d": size_of(trainer, "activation_dim", path), "n": size_of(trainer, "dict_size", path)}
    # Older versions had no threshold of topk, and k only in the configuration.
    optional = ("k", "threshold") if name == "AutoEncoderTopK" else ("k",)
    found = read_tensors(folder / WEIGHTS, _SHAPES[name], sizes, optional=optional, ignored=("group_sizes",))
    weights = {
        "W_enc": found["W_enc"] if "W_enc" in found else found["encoder.weight"].T,
        "W_dec": found["W_dec"] if "W_dec" in found else found["decoder.weight"].T,
        "b_dec": next(found[key] for key in ("b_dec", "bias", "decoder_bias", "decoder.bias") if key in found),
    }
    if name == "GatedAutoEncoder":
        notes.append("its gate is expressed as thresholds of jumprelu, which compute the same")
        weights, threshold = as_jumprelu(weights, found["gate_bias"], found["r_mag"], found["mag_bias"])
        return plain_sae("jumprelu", weights, subtract_b_dec=True, threshold=threshold.float())
    weights["b_enc"] = found["b_enc"] if "b_enc" in found else found["encoder.bias"]
    if name == "AutoEncoderTopK":
        k = topk_of(found["k"].item() if "k" in found else trainer.get("k"), sizes["n"], path)
        return plain_sae("topk", weights, subtract_b_dec=True, k=k)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = found["threshold"].reshape(1).expand(sizes["n"]).clone()
        if float(threshold[0]) < 0:
            notes.append("its threshold was never set (training was too short for it), so all positive acts count")
        return plain_sae("jumprelu", weights, subtract_b_dec=True, threshold=threshold)
    if name == "JumpReluAutoEncoder":
        return plain_sae("jumprelu", weights, subtract_b_dec=False, threshold=found["threshold"])
    return plain_sae("relu", weights, subtract_b_dec=name == "AutoEncoder")


def _hook(trainer: dict[str, Any], buffer: dict[str, Any]) -> str | None:
    """``resid_post_layer_6`` (and ``resid_pre_layer_6``); another submodule's name stays as it is."""
    name, io = text(trainer.get("submodule_name")), buffer.get("io", "out")
    if name is None:
        return None
    residual = re.fullmatch(r"resid_(post|pre)_layer_(\d+)", name)
    if residual and io == "out":
        return f"blocks.{residual[2]}.hook_resid_{residual[1]}"
    return name if io == "out" else f"{name} ({io})"

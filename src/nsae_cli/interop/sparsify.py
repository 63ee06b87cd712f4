"""sparsify (EleutherAI) folders: `cfg.json` and `sae.safetensors` in a folder named after the hookpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nsae_cli import catalogue
from nsae_cli.interop.foreign import ForeignSae, hub_model, text, whole_number
from nsae_cli.interop.tensors import plain_sae, read_tensors, size_of, topk_of
from nsae_cli.store.commit import read_json

CONFIG, WEIGHTS, RUN_CONFIG = "cfg.json", "sae.safetensors", "config.json"

#: A block of the base model: what it returns is the residual stream after it.
_BLOCK = re.compile(r"(?:.*\.)?(?:h|layers|blocks)\.(\d+)")


def read_sparsify(folder: Path) -> ForeignSae:
    """Reads an SAE in sparsify's layout.

    Raises:
        ArtifactError: damaged, a transcoder, or an activation that nsae does not compute.
        NumericalError: a weight is not finite.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise catalogue.FOREIGN_CONFIG(
            f"{path} is no JSON object; it is not sparsify's configuration, get the files again"
        )
    activation = config.get("activation", "topk")
    if activation != "topk":
        why = "it takes the largest of each group of latents" if activation == "groupmax" else "unknown"
        raise catalogue.FOREIGN_ARCHITECTURE(
            f"{path}: activation {activation!r} is not one that nsae computes ({why}); known is topk"
        )
    for key, what in (
        ("transcode", "a transcoder predicts a module's output from its input and reconstructs nothing"),
        ("skip_connection", "a skip connection adds a linear map of the input"),
        ("signed", "signed acts can be negative"),
    ):
        if config.get(key, False):
            raise catalogue.FOREIGN_ARCHITECTURE(f"{path}: {key} is set: {what}; nsae reads autoencoders only")
    d_in = size_of(config, "d_in", path)
    d_sae = whole_number(config.get("num_latents")) or d_in * size_of(config, "expansion_factor", path)
    tensors = read_tensors(
        folder / WEIGHTS,
        {"encoder.weight": "nd", "encoder.bias": "n", "W_dec": "nd", "b_dec": "d"},
        {"d": d_in, "n": d_sae},
    )
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    run = _run_config(folder)
    return ForeignSae(
        sae=plain_sae("topk", weights, subtract_b_dec=True, k=topk_of(config.get("k"), d_sae, path)),
        format="sparsify",
        architecture="topk",
        path=folder,
        weights_file=folder / WEIGHTS,
        hook=_hook(folder),
        model=hub_model(run.get("model")),
        context_size=whole_number(run.get("ctx_len")),
        # It joins documents with the end-of-text token and cuts anywhere.
        prepend_bos=False,
        dataset=text(run.get("dataset")),
        centred_weights=False,
    )


def _folders(folder: Path) -> list[Path]:
    """The hookpoint's folder, above ``seed0`` where there are several seeds, and the run's above that."""
    folder = folder.absolute()
    hookpoint = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    return [hookpoint, hookpoint.parent]


def _hook(folder: Path) -> str | None:
    """``h.6`` and ``layers.6`` are the outputs of block 6; another module's name stays as it is."""
    name = _folders(folder)[0].name
    block = _BLOCK.fullmatch(name)
    if block:
        return f"blocks.{block[1]}.hook_resid_post"
    return name if re.search(r"\.\d+\.", f"{name}.") else None


def _run_config(folder: Path) -> dict[str, Any]:
    """config.json of the run, one level above the hookpoint; empty where there is none."""
    path = _folders(folder)[1] / RUN_CONFIG
    value = read_json(path) if path.is_file() else {}
    # A folder of another kind may hold a config.json too.
    return value if isinstance(value, dict) and "sae" in value else {}

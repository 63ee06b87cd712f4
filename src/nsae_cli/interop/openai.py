"""OpenAI's GPT-2 SAEs: `openai.safetensors` and `openai.json`, made from one of their `.pt` files (docs/formats.md)."""

from __future__ import annotations

from pathlib import Path

from nsae_cli import catalogue
from nsae_cli.interop.foreign import ForeignSae
from nsae_cli.interop.normalized import RowNormalizedAutoencoder
from nsae_cli.interop.tensors import plain_sae, read_tensors, topk_of
from nsae_cli.sae.autoencoder import Autoencoder
from nsae_cli.store.commit import read_json

CONFIG, WEIGHTS = "openai.json", "openai.safetensors"

#: Where in a block they read, as TransformerLens names it.
LOCATIONS = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "mlp_post_act": "mlp.hook_post",
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def read_openai(folder: Path) -> ForeignSae:
    """Reads a converted SAE of OpenAI's.

    Raises:
        ArtifactError: damaged, or an activation that nsae does not compute. (Their own code takes an activation that it
            does not know for ReLU.)
        NumericalError: a weight is not finite.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise catalogue.FOREIGN_CONFIG(f"{path} is no JSON object; convert the .pt file again as docs/formats.md shows")
    location, layer = config.get("location"), config.get("layer")
    if location not in tuple(LOCATIONS) or not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise catalogue.FOREIGN_CONFIG(
            f"{path}: location {location!r}, layer {layer!r}; expected one of {', '.join(LOCATIONS)}, and a layer"
        )
    activation = config.get("activation")
    if activation not in ("ReLU", "TopK"):
        raise catalogue.FOREIGN_ARCHITECTURE(
            f"{path}: activation {activation!r} is not one that nsae computes; known are ReLU, TopK"
        )
    sizes = {key: config.get(key) for key in ("n_inputs", "n_latents")}
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise catalogue.FOREIGN_CONFIG(f"{path}: {key} is {value!r}, expected a positive whole number")
    found = read_tensors(
        folder / WEIGHTS,
        {"pre_bias": "d", "encoder.weight": "nd", "latent_bias": "n", "decoder.weight": "dn"},
        {"d": config["n_inputs"], "n": config["n_latents"]},
        ignored=_STATISTICS,
    )
    weights = {
        "W_enc": found["encoder.weight"].T,
        "b_enc": found["latent_bias"],
        "W_dec": found["decoder.weight"].T,
        "b_dec": found["pre_bias"],
    }
    sae: Autoencoder
    notes: tuple[str, ...] = ()
    if activation == "ReLU":
        sae = plain_sae("relu", weights, subtract_b_dec=True)
    else:
        options = config.get("activation_state_dict")
        options = options if isinstance(options, dict) else {}
        if options.get("postact_fn") != "ReLU":
            raise catalogue.FOREIGN_ARCHITECTURE(
                f"{path}: TopK is followed by {options.get('postact_fn')!r}, expected ReLU"
            )
        k = topk_of(options.get("k"), config["n_latents"], path)
        # With TopK, and only then, their code normalises each row.
        sae = RowNormalizedAutoencoder(plain_sae("topk", weights, subtract_b_dec=True, k=k), "layer_norm")
        notes = ("it normalises each row by itself (layer norm); L1 is in its units, not in those of x",)
    return ForeignSae(
        sae=sae,
        format="OpenAI",
        architecture=str(activation),
        path=folder,
        weights_file=folder / WEIGHTS,
        hook=f"blocks.{layer}.{LOCATIONS[location]}",
        model="gpt2",
        context_size=64,
        centred_weights=False,
        notes=notes,
    )

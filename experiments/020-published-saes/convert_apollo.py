"""Turns one of Apollo Research's own files into a folder that nsae reads.

    hf download apollo-research/e2e-saes-gpt2 local_similar_l0_layer_6.pt --local-dir .
    python convert_apollo.py local_similar_l0_layer_6.pt
    nsae audit local_similar_l0_layer_6

Their .pt is a pickle of four tensors, which torch loads with `weights_only`, so that nothing else in it can run; nsae
itself opens no pickle. The tensors are those of dictionary_learning's `AutoEncoderNew`, and so is what they compute.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file


def convert(source: Path, folder: Path, layer: int) -> None:
    """Writes `ae.safetensors` and `config.json` of an SAE before block `layer`, in dictionary_learning's layout."""
    state = torch.load(source, map_location="cpu", weights_only=True)
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "ae.safetensors")
    d_sae, d_in = state["encoder.weight"].shape
    trainer = {"dict_class": "AutoEncoderNew", "activation_dim": d_in, "dict_size": d_sae, "layer": layer,
               "lm_name": "gpt2", "submodule_name": f"resid_pre_layer_{layer}"}  # fmt: skip
    config = {"trainer": trainer, "buffer": {"io": "out"}}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def main() -> None:
    """Converts the files that are named, each into a folder of its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="…_layer_N.pt")
    for file in parser.parse_args().files:
        layer = re.search(r"layer_(\d+)", file.stem)
        if layer is None:
            parser.error(f"{file} does not say its layer, as in local_similar_l0_layer_6.pt")
        convert(file, file.with_suffix(""), int(layer[1]))
        print(file.with_suffix(""))


if __name__ == "__main__":
    main()

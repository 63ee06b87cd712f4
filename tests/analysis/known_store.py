"""A store whose every norm is known, and an SAE small enough to follow by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nsae_cli.kernels.types import Weights
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store import commit, sae_folder

HOOK = "blocks.1.hook_resid_post"
CONTEXT, SPECIAL, D_IN = 5, 9, 4


@dataclass
class KnownStore:
    """What the store holds, row by row: norms n, positions and tokens [300] as numpy arrays."""

    path: Path
    norm: np.ndarray
    position: np.ndarray
    token: np.ndarray

    @property
    def is_sink(self) -> np.ndarray:
        """Position 0, whose norm is 40, and the two ordinary rows of norm 30."""
        return self.norm >= 30

    @property
    def held_out(self) -> np.ndarray:
        """Contexts 19, 39 and 59."""
        return np.arange(len(self.norm)) // CONTEXT % 20 == 19


def write_known(folder: Path, *, foreign: bool = False, contexts: int = 60) -> KnownStore:
    """300 rows x = n·e_j in two shards: 60 contexts of 5 tokens, cut across the shards' border.

    n is 40 at position 0 and 1, 1.5, 2, 2.5 elsewhere by turns, but for two rows of norm 30. Tokens are 1 to 4 by
    turns; the special token 9 stands at position 0 of every third context and once elsewhere.

    Args:
        folder: where to.
        foreign: leave out everything that the format does not require.
        contexts: how many, if not 60.
    """
    rows = np.arange(CONTEXT * contexts)
    position = rows % CONTEXT
    norm = np.where(position == 0, 40.0, 1 + 0.5 * ((position + rows // CONTEXT) % 4))
    norm[[17, 98]] = 30.0
    token = 1 + rows % 4
    token[::15] = SPECIAL
    token[23] = SPECIAL
    x = torch.zeros(len(rows), D_IN)
    x[torch.arange(len(rows)), torch.from_numpy(rows % D_IN)] = torch.from_numpy(norm).float()
    folder.mkdir(parents=True)
    shards = []
    for index, part in enumerate((slice(0, 163), slice(163, len(rows)))):
        tensors = {HOOK: x[part].half()}
        if not foreign:
            tensors |= {
                "norms": torch.from_numpy(norm[part]).float()[:, None].contiguous(),
                "positions": torch.from_numpy(position[part]).int(),
                "tokens": torch.from_numpy(token[part]).int(),
            }
        save_file(tensors, folder / f"s{index}.safetensors")
        shards.append({"file": f"s{index}.safetensors", "rows": part.stop - part.start})
    manifest: dict[str, Any] = {
        "format_version": 1, "hooks": [HOOK], "d_in": D_IN, "dtype": "float16", "rows": len(rows), "shards": shards,
    }  # fmt: skip
    if not foreign:
        manifest |= {"norm_hooks": [HOOK], "special_token_ids": [SPECIAL], "context_size": CONTEXT, "bos": True}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return KnownStore(folder, norm, position, token)


def write_sae(
    folder: Path, known: KnownStore, tensors: dict[str, torch.Tensor], *, act: str = "relu", l2_norm: str = "none",
    input_scale: float = 1.0,
) -> Path:  # fmt: skip
    """A finished SAE with these weights, as `nsae train` would have left it."""
    sae = SparseAutoencoder(act, Weights(**tensors))
    commit.make_folder(folder)
    sae_folder.write_sae(folder, sae, {})
    manifest_sha256 = commit.file_sha256(known.path / "manifest.json")
    sae_folder.write_run(
        folder,
        {
            "format_version": 1,
            "config": {"act": act, "l2_norm": l2_norm, "l1_norm": "none", "sparsity": "l1", "decoder": "unit"},
            "inputs": {"activations": {"name": known.path.name, "manifest_sha256": manifest_sha256}},
            "hook": HOOK,
            "beta": 1.0,
            "input_scale": input_scale,
            "norm_scale": 1.7,
            "weights_sha256": {key: commit.tensor_sha256(value) for key, value in tensors.items()},
        },
    )
    return folder

"""`--layers`, `--site` and the names of hooks.

Hooks are named as TransformerLens names them; activations are the plain Hugging Face ones.
"""

from __future__ import annotations

import re
from typing import Literal, cast, get_args

from nsae_cli import values

Site = Literal["resid_post", "resid_pre", "resid_mid", "attn_out", "mlp_out"]
#: All sites; which of them a model has, its family tells (`families.Family.sites`).
SITES: tuple[Site, ...] = get_args(Site)


def hook_name(layer: int, site: Site) -> str:
    """``blocks.{layer}.hook_{site}``.

    ``resid_pre`` is the block's input, ``resid_post`` its output (before any final norm), ``resid_mid`` the residual
    stream between attention and MLP; ``attn_out`` and ``mlp_out`` are what the two add to it:
    resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post.
    """
    return f"blocks.{layer}.hook_{site}"


_HOOK = re.compile(rf"blocks\.([0-9]{{1,6}})\.hook_({'|'.join(SITES)})")


def parse_hook(name: str) -> tuple[int, Site] | None:
    """The inverse of `hook_name`: layer and site; None for any other name."""
    match = _HOOK.fullmatch(name)
    return None if match is None else (int(match[1]), cast(Site, match[2]))


def parse_layers(spec: str | None, n_layers: int, model: str) -> list[int]:
    """``all``, ``6``, ``0,3``, ``0-3`` and mixtures → layer numbers, ascending; None → the middle layer.

    Args:
        spec: the option's value.
        n_layers: how many blocks the model has.
        model: the model's name, for messages.

    Raises:
        UsageError: not such a list, a layer that the model lacks, a layer named twice; every problem at once.
    """
    if spec is None:
        return [n_layers // 2]
    return values.parse_layers(spec, range(n_layers), model)

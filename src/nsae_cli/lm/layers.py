"""`--layers` and the names of hooks.

Hooks are named as TransformerLens names them; activations are the plain Hugging Face ones.
"""

from __future__ import annotations

import re
from typing import Literal, cast

from nsae_cli import values

Site = Literal["resid_post", "resid_pre"]


def hook_name(layer: int, site: Site) -> str:
    """``blocks.{layer}.hook_resid_pre`` (the block's input) or ``…_post`` (its output, before any final LayerNorm)."""
    return f"blocks.{layer}.hook_{site}"


_HOOK = re.compile(r"blocks\.([0-9]{1,6})\.hook_(resid_pre|resid_post)")


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

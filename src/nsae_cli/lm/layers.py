"""`--layers` and the names of hooks.

Hooks are named as TransformerLens names them; activations are the plain Hugging Face ones.
"""

from __future__ import annotations

import re
from typing import Literal

from nsae_cli.errors import UsageError

Site = Literal["resid_post", "resid_pre"]

_PART = re.compile(r"(\d+)(?:-(\d+))?")


def hook_name(layer: int, site: Site) -> str:
    """``blocks.{layer}.hook_resid_pre`` (the block's input) or ``…_post`` (its output, before any final LayerNorm)."""
    return f"blocks.{layer}.hook_{site}"


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
    if spec.strip() == "all":
        return list(range(n_layers))
    layers: list[int] = []
    problems: list[str] = []
    for part in (part.strip() for part in spec.split(",")):
        match = _PART.fullmatch(part)
        if match is None:
            problems.append(f"--layers {spec}: {part!r} is not a layer; write all, 6, 0,3 or 0-3 (layers count from 0)")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            problems.append(f"--layers {spec}: {part} runs backwards")
        elif last >= n_layers:
            problems.append(f"layer {last}: {model} has 0-{n_layers - 1}")
        else:
            layers.extend(range(first, last + 1))
    for layer in sorted({layer for layer in layers if layers.count(layer) > 1}):
        problems.append(f"--layers {spec}: layer {layer} is named twice")
    if problems:
        raise UsageError.from_problems(problems)
    return sorted(layers)

"""Where each supported model family keeps its parts. To support another family, add a line to `FAMILIES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nsae_cli import catalogue


@dataclass(frozen=True)
class Family:
    """Attribute paths below the base model (the one without a head), and keys of its configuration.

    A block takes the residual stream as its first positional argument and returns it.
    """

    blocks: str
    token_embedding: str
    position_embedding: str
    final_norm: str
    n_layers: str
    d_model: str
    max_context: str


#: By ``model_type`` of config.json.
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        blocks="h",
        token_embedding="wte",
        position_embedding="wpe",
        final_norm="ln_f",
        n_layers="n_layer",
        d_model="n_embd",
        max_context="n_positions",
    ),
}


def family_of(model_type: Any, model: str) -> Family:
    """The line of `FAMILIES` for a ``model_type``.

    Args:
        model_type: of the model's config.json; anything, since the file may hold anything.
        model: the model's name, for the message.

    Raises:
        UsageError: the family is not in the table.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise catalogue.MODEL_FAMILY(
            f"--model {model}: family {model_type!r} is not supported; "
            f"known families: {', '.join(FAMILIES)} (the table FAMILIES in nsae_cli/lm/families.py)"
        )
    return family


def blocks_of(base: nn.Module, family: Family) -> nn.ModuleList:
    """The transformer blocks, first to last."""
    blocks = base.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def position_embedding_of(base: nn.Module, family: Family) -> nn.Embedding:
    """The learned position embedding, weight [max_context, d_model]."""
    embedding = base.get_submodule(family.position_embedding)
    assert isinstance(embedding, nn.Embedding)
    return embedding

"""Where each supported model family keeps its parts. To support another family, add a line to `FAMILIES`.

docs/models.md says what a new line needs, and tests/lm/test_families.py what it must pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from nsae_cli import catalogue
from nsae_cli.lm.layers import SITES, Site


@dataclass(frozen=True)
class Family:
    """Attribute paths, and keys of the configuration.

    A block takes the residual stream [batch, position, d_model] as its first argument, or as the one called
    ``hidden_states``, and returns it, alone or first in a tuple; so do its attention and its MLP.

    Attributes:
        blocks, position_embedding, final_norm, project_out: below the base model (the one without a head). Of the last
            three, None where the family has none: rotary positions are no embedding.
        attn_out, mlp_out: below a block, the modules whose output is what the block adds to the residual stream.
        before_mlp: below a block, the module that reads the residual stream between attention and MLP.
        n_layers, d_model, max_context: keys of the configuration.
        first_position: row of the position embedding's weight that belongs to position 0.
        attention: the implementation that computes what the family was trained with.
        parallel: key of the configuration that is true where attention and MLP read the same residual stream, so that
            there is nothing between them.
        norm_first: key of the configuration that is false where blocks normalise the residual stream itself, so that
            it is no sum of what attention and MLP write.
        centres: whether the final norm subtracts the mean (LayerNorm) or not (RMSNorm).
        gain_offset: what the final norm adds to its weight.
    """

    blocks: str
    attn_out: str
    mlp_out: str
    before_mlp: str
    final_norm: str
    position_embedding: str | None = None
    project_out: str | None = None
    n_layers: str = "num_hidden_layers"
    d_model: str = "hidden_size"
    max_context: str = "max_position_embeddings"
    first_position: int = 0
    attention: Literal["sdpa", "eager"] = "sdpa"
    parallel: str | None = None
    norm_first: str | None = None
    centres: bool = False
    gain_offset: float = 0.0

    def sites(self, config: Any) -> tuple[Site, ...]:
        """The sites that a model of this family has.

        Args:
            config: the model's configuration.
        """
        if self.norm_first is not None and not getattr(config, self.norm_first):
            return ("resid_post", "resid_pre")
        if self.parallel is not None and getattr(config, self.parallel):
            return tuple(site for site in SITES if site != "resid_mid")
        return SITES


_LLAMA = Family(
    blocks="layers",
    attn_out="self_attn",
    mlp_out="mlp",
    before_mlp="post_attention_layernorm",
    final_norm="norm",
)
_GEMMA = Family(
    blocks="layers",
    attn_out="self_attn",
    mlp_out="mlp",
    before_mlp="post_attention_layernorm",
    final_norm="norm",
    gain_offset=1.0,
)

#: By ``model_type`` of config.json.
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        blocks="h",
        attn_out="attn",
        mlp_out="mlp",
        before_mlp="ln_2",
        final_norm="ln_f",
        position_embedding="wpe",
        n_layers="n_layer",
        d_model="n_embd",
        max_context="n_positions",
        centres=True,
    ),
    "gpt_neox": Family(  # Pythia
        blocks="layers",
        attn_out="attention",
        mlp_out="mlp",
        before_mlp="post_attention_layernorm",
        final_norm="final_layer_norm",
        parallel="use_parallel_residual",
        centres=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    # What attention and MLP write passes one more norm before it is added.
    "gemma2": Family(
        blocks="layers",
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        before_mlp="pre_feedforward_layernorm",
        final_norm="norm",
        attention="eager",  # others leave the soft cap on the attention scores out
        gain_offset=1.0,
    ),
    "gemma3_text": Family(
        blocks="layers",
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        before_mlp="pre_feedforward_layernorm",
        final_norm="norm",
        gain_offset=1.0,
    ),
    "opt": Family(
        blocks="decoder.layers",
        attn_out="self_attn",
        mlp_out="fc2",
        before_mlp="final_layer_norm",
        final_norm="decoder.final_layer_norm",
        position_embedding="decoder.embed_positions",
        project_out="decoder.project_out",
        first_position=2,
        norm_first="do_layer_norm_before",
        centres=True,
    ),
}


def family_of(model_type: Any, model: str, config: Mapping[str, Any] | None = None) -> Family:
    """The line of `FAMILIES` for a ``model_type``.

    Args:
        model_type: of the model's config.json; anything, since the file may hold anything.
        model: the model's name, for the message.
        config: the rest of config.json, to tell what else could be the matter.

    Raises:
        UsageError: the family is not in the table, or the model is not causal.
    """
    config = config or {}
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None and isinstance(config.get("text_config"), dict):
        raise catalogue.MODEL_FAMILY(
            f"--model {model}: {model_type!r} reads more than text, and nsae takes text models only; "
            f"save its language model on its own (docs/models.md) and give that folder"
        )
    if family is None:
        raise catalogue.MODEL_FAMILY(
            f"--model {model}: family {model_type!r} is not supported; "
            f"known families: {', '.join(FAMILIES)} (the table FAMILIES in nsae_cli/lm/families.py)"
        )
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise catalogue.MODEL_FAMILY(
            f"--model {model}: its attention looks ahead, so it is no causal language model; give one that is"
        )
    return family


def blocks_of(base: nn.Module, family: Family) -> nn.ModuleList:
    """The transformer blocks, first to last."""
    blocks = base.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def require_position_embedding(family: Family, model: str) -> None:
    """Only a learned position embedding can be put at another position.

    Raises:
        UsageError: the family has none.
    """
    if family.position_embedding is None:
        raise catalogue.OPTION_DOES_NOT_FIT(
            f"--probe puts another position's embedding at position 0, and {model} has none (rotary positions): "
            f"expected a model with learned positions; leave --probe out"
        )


def position_embedding_of(base: nn.Module, family: Family) -> nn.Embedding:
    """The learned position embedding, weight [first_position + max_context, d_model]; the family must have one."""
    assert family.position_embedding is not None, "require_position_embedding comes first"
    embedding = base.get_submodule(family.position_embedding)
    assert isinstance(embedding, nn.Embedding)
    return embedding

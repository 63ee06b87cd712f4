"""Tiny random models of every supported family, each of its own transformers class."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_gpt2 import build_tokenizer
from torch import nn

N_LAYERS, D_MODEL, MAX_CONTEXT, VOCABULARY, WINDOW = 3, 16, 32, 257, 5


@dataclass(frozen=True)
class Tiny:
    """How to build a tiny model.

    Attributes:
        model_type: line of `FAMILIES`.
        config, model: names of its classes in transformers.
        options: of the configuration.
    """

    model_type: str
    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """Every parameter at random, norms, biases and positions too, so that no part is the identity."""
        config = getattr(transformers, self.config)(**self.options)
        config._attn_implementation = "eager"
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_gain = parameter.ndim == 1 and name.endswith("weight")
                parameter.normal_(1.0 if is_gain and "gemma" not in self.model_type else 0.0, 0.3)
        return model

    def save(self, folder: Path) -> Path:
        """Model and tokenizer in a folder."""
        self.build().save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return folder


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_NEOX = {**_COMMON, "num_attention_heads": 2}  # a quarter of a head's width is rotated
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 6}
_SLIDING = {"sliding_window": WINDOW, "query_pre_attn_scalar": 7}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "word_embed_proj_dim": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "ffn_dim": 24,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

TINY: dict[str, Tiny] = {
    "gpt2": Tiny(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": D_MODEL,
            "n_layer": N_LAYERS,
            "n_head": 4,
            "n_positions": MAX_CONTEXT,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "pythia": Tiny("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX),
    "gpt_neox-sequential": Tiny(
        "gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}
    ),
    "llama": Tiny("llama", "LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": Tiny("mistral", "MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": WINDOW}),
    "qwen2": Tiny(
        "qwen2",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            **_COMMON,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": Tiny("qwen3", "Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "gemma": Tiny("gemma", "GemmaConfig", "GemmaForCausalLM", _GROUPED),
    "gemma2": Tiny(
        "gemma2", "Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, **_SLIDING, "attn_logit_softcapping": 2.0}
    ),
    "gemma3": Tiny(
        "gemma3_text",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GROUPED, **_SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "opt": Tiny("opt", "OPTConfig", "OPTForCausalLM", _OPT),
    "opt-350m": Tiny(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8},
    ),
}

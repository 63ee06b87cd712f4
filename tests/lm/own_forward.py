"""Every supported family's forward pass written again, from the weights by their names in the checkpoint, in float64.

Nothing of transformers' modelling code is used. Returned is what passes at every site of every block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Sites = dict[tuple[int, str], Tensor]


@dataclass
class OwnForward:
    """A model's weights and numbers.

    Attributes:
        weights: by name without the base model's prefix, float64.
        sites: what passed, by layer and site, [position, d_model].
        logits: [position, vocabulary].
    """

    model_type: str
    config: Any
    weights: Weights
    sites: Sites = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def run(self, ids: list[int]) -> OwnForward:
        """One context."""
        self.sites = {}
        kind = self.model_type
        runs: dict[str, Callable[[Tensor], Tensor]] = {"gpt2": self._gpt2, "gpt_neox": self._gpt_neox, "opt": self._opt}
        self.logits = runs.get(kind, self._llama_like)(torch.tensor(ids))
        return self

    # Parts -----------------------------------------------------------------------------------------------------------

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _conv(self, name: str, x: Tensor) -> Tensor:
        """GPT-2 keeps its matrices the other way round."""
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _rms_norm(self, name: str, x: Tensor) -> Tensor:
        gain = self.weights[f"{name}.weight"] + (1.0 if self.model_type.startswith("gemma") else 0.0)
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * gain

    @staticmethod
    def _rotate(x: Tensor, theta: float, dims: int) -> Tensor:
        """Rotary positions on the first `dims` of the last axis; x [position, head, width]."""
        turned, rest = x[..., :dims], x[..., dims:]
        frequency = theta ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        first, second = turned[..., : dims // 2], turned[..., dims // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    @staticmethod
    def _attend(
        q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, cap: float | None = None
    ) -> Tensor:
        """Causal attention; q [position, head, width], fewer heads of k and v are shared by neighbours of q."""
        n, heads, _ = q.shape
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        scores = torch.einsum("qhw,khw->hqk", q, k) * scale
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        distance = torch.arange(n)[:, None] - torch.arange(n)
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        weight = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khw->qhw", weight, v).reshape(n, -1)

    def _keep(self, layer: int, **values: Tensor) -> None:
        for site, value in values.items():
            self.sites[layer, site] = value

    # Families --------------------------------------------------------------------------------------------------------

    def _gpt2(self, ids: Tensor) -> Tensor:
        c, w = self.config, self.weights
        x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
        for i in range(c.n_layer):
            p = f"h.{i}"
            pre = x
            q, k, v = self._conv(f"{p}.attn.c_attn", self._layer_norm(f"{p}.ln_1", x, c.layer_norm_epsilon)).chunk(3, 1)
            q, k, v = (part.view(len(ids), c.n_head, -1) for part in (q, k, v))
            attn = self._conv(f"{p}.attn.c_proj", self._attend(q, k, v, q.shape[-1] ** -0.5))
            mid = pre + attn
            hidden = self._conv(f"{p}.mlp.c_fc", self._layer_norm(f"{p}.ln_2", mid, c.layer_norm_epsilon))
            mlp = self._conv(f"{p}.mlp.c_proj", F.gelu(hidden, approximate="tanh"))
            x = mid + mlp
            self._keep(i, resid_pre=pre, attn_out=attn, resid_mid=mid, mlp_out=mlp, resid_post=x)
        return self._layer_norm("ln_f", x, c.layer_norm_epsilon) @ w["lm_head.weight"].T

    def _gpt_neox(self, ids: Tensor) -> Tensor:
        c, w = self.config, self.weights
        x = w["embed_in.weight"][ids]
        heads, width = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        dims = int(width * c.rope_parameters["partial_rotary_factor"])
        for i in range(c.num_hidden_layers):
            p = f"layers.{i}"
            pre = x
            packed = self._linear(
                f"{p}.attention.query_key_value", self._layer_norm(f"{p}.input_layernorm", x, c.layer_norm_eps)
            ).view(len(ids), heads, 3, width)
            q, k = (self._rotate(packed[:, :, j], c.rope_parameters["rope_theta"], dims) for j in (0, 1))
            attn = self._linear(f"{p}.attention.dense", self._attend(q, k, packed[:, :, 2], width**-0.5))
            source = pre if c.use_parallel_residual else pre + attn
            normed = self._layer_norm(f"{p}.post_attention_layernorm", source, c.layer_norm_eps)
            mlp = self._linear(f"{p}.mlp.dense_4h_to_h", F.gelu(self._linear(f"{p}.mlp.dense_h_to_4h", normed)))
            x = pre + attn + mlp
            self._keep(i, resid_pre=pre, attn_out=attn, mlp_out=mlp, resid_post=x)
            if not c.use_parallel_residual:
                self._keep(i, resid_mid=source)
        head = w.get("embed_out.weight", w.get("lm_head.weight"))  # named by the version of transformers
        assert head is not None
        return self._layer_norm("final_layer_norm", x, c.layer_norm_eps) @ head.T

    def _opt(self, ids: Tensor) -> Tensor:
        c, w = self.config, self.weights
        embedded = w["decoder.embed_tokens.weight"][ids]
        if "decoder.project_in.weight" in w:
            embedded = self._linear("decoder.project_in", embedded)
        x = embedded + w["decoder.embed_positions.weight"][2 : 2 + len(ids)]
        for i in range(c.num_hidden_layers):
            p = f"decoder.layers.{i}"
            pre = x
            first = c.do_layer_norm_before
            source = self._layer_norm(f"{p}.self_attn_layer_norm", pre, 1e-5) if first else pre
            q, k, v = (
                self._linear(f"{p}.self_attn.{name}_proj", source).view(len(ids), c.num_attention_heads, -1)
                for name in "qkv"
            )
            attn = self._linear(f"{p}.self_attn.out_proj", self._attend(q, k, v, q.shape[-1] ** -0.5))
            mid = pre + attn if first else self._layer_norm(f"{p}.self_attn_layer_norm", pre + attn, 1e-5)
            source = self._layer_norm(f"{p}.final_layer_norm", mid, 1e-5) if first else mid
            mlp = self._linear(f"{p}.fc2", F.relu(self._linear(f"{p}.fc1", source)))
            x = mid + mlp if first else self._layer_norm(f"{p}.final_layer_norm", mid + mlp, 1e-5)
            self._keep(i, resid_pre=pre, resid_post=x)
            if first:
                self._keep(i, attn_out=attn, resid_mid=mid, mlp_out=mlp)
        if "decoder.final_layer_norm.weight" in w:
            x = self._layer_norm("decoder.final_layer_norm", x, 1e-5)
        if "decoder.project_out.weight" in w:
            x = self._linear("decoder.project_out", x)
        return x @ w["lm_head.weight"].T

    def _llama_like(self, ids: Tensor) -> Tensor:
        c, w = self.config, self.weights
        gemma = self.model_type.startswith("gemma")
        post_norms = self.model_type in ("gemma2", "gemma3_text")
        gate = (lambda t: F.gelu(t, approximate="tanh")) if gemma else F.silu
        x = w["embed_tokens.weight"][ids] * (c.hidden_size**0.5 if gemma else 1.0)
        for i in range(c.num_hidden_layers):
            p = f"layers.{i}"
            pre = x
            attn = self._self_attention(i, self._rms_norm(f"{p}.input_layernorm", x))
            if post_norms:
                attn = self._rms_norm(f"{p}.post_attention_layernorm", attn)
            mid = pre + attn
            before = "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
            normed = self._rms_norm(f"{p}.{before}", mid)
            hidden = gate(self._linear(f"{p}.mlp.gate_proj", normed)) * self._linear(f"{p}.mlp.up_proj", normed)
            mlp = self._linear(f"{p}.mlp.down_proj", hidden)
            if post_norms:
                mlp = self._rms_norm(f"{p}.post_feedforward_layernorm", mlp)
            x = mid + mlp
            self._keep(i, resid_pre=pre, attn_out=attn, resid_mid=mid, mlp_out=mlp, resid_post=x)
        logits = self._rms_norm("norm", x) @ w["lm_head.weight"].T
        cap = getattr(c, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    def _self_attention(self, layer: int, x: Tensor) -> Tensor:
        c, p = self.config, f"layers.{layer}.self_attn"
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        q, k, v = (self._linear(f"{p}.{name}_proj", x).view(len(x), -1, width) for name in "qkv")
        if f"{p}.q_norm.weight" in self.weights:
            q, k = self._rms_norm(f"{p}.q_norm", q), self._rms_norm(f"{p}.k_norm", k)
        kinds = getattr(c, "layer_types", None)
        kind = kinds[layer] if kinds else "sliding_attention" if c.to_dict().get("sliding_window") else "full_attention"
        rope = c.rope_parameters.get(kind, c.rope_parameters)
        q, k = (self._rotate(part, rope["rope_theta"], width) for part in (q, k))
        scale = getattr(c, "query_pre_attn_scalar", width) ** -0.5
        window = c.sliding_window if kind == "sliding_attention" else None
        cap = getattr(c, "attn_logit_softcapping", None)
        return self._linear(f"{p}.o_proj", self._attend(q, k, v, scale, window, cap))


def own_forward(model: Any, model_type: str) -> OwnForward:
    """From a transformers model with its head: only its state dict and its configuration are taken."""
    prefixes = ("transformer.", "gpt_neox.", "model.")
    weights = {}
    for name, tensor in model.state_dict().items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        weights[name] = tensor.double()
    return OwnForward(model_type, model.config, weights)

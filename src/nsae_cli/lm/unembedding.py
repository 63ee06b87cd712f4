"""What a residual stream's direction does to the logits: the unembedding and the final LayerNorm's gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli.errors import NsaeError
from nsae_cli.lm.loading import inspect_model, load_model
from nsae_cli.reporter import Reporter
from nsae_cli.store.manifest import Manifest


@dataclass(frozen=True)
class Unembedding:
    """The last step of a model, logits = LN(x) @ W_U.

    Attributes:
        W_U: [d_model, vocabulary], float32.
        gain: the final LayerNorm's gain [d_model].
    """

    W_U: torch.Tensor
    gain: torch.Tensor

    def effect(self, directions: torch.Tensor) -> torch.Tensor:
        """(d − mean d)∘gain @ W_U of directions [N, d_model]: what adding d changes in the logits [N, vocabulary].

        The LayerNorm also divides by σ, the standard deviation of the row that d is added to: not done here.
        """
        return ((directions - directions.mean(dim=1, keepdim=True)) * self.gain) @ self.W_U


def load_unembedding(manifest: Manifest, reporter: Reporter) -> Unembedding | None:
    """The unembedding of the model that a store was collected from; None, with a remark, where it cannot be had.

    A store from elsewhere, a local model that has moved or changed, or a missing network cost the logit effects and
    nothing else, so they are remarks and no errors.
    """
    if manifest.model is None:
        reporter.note("the store names no model: no effects on the logits")
        return None
    try:
        info = inspect_model(manifest.model, manifest.revision)
        if manifest.model_sha256 not in (None, info.model_sha256):
            reporter.warn(f"the model {manifest.model} has changed since collect: no effects on the logits")
            return None
        if info.d_model != manifest.d_in:
            reporter.warn(f"{manifest.model} has width {info.d_model}, the store {manifest.d_in}: no logit effects")
            return None
        model: Any = load_model(info, torch.device("cpu"), torch.float32, with_head=True)
    except NsaeError:
        reporter.note(f"the model {manifest.model} is not at hand: no effects on the logits")
        return None
    gain = model.base_model.get_submodule(info.family.final_norm).weight
    W_U = model.get_output_embeddings().weight.T
    return Unembedding(W_U.detach().clone(), gain.detach().clone())

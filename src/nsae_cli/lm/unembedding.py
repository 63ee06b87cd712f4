"""What a residual stream's direction does to the logits: the unembedding and the final norm's gain."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from nsae_cli.errors import NsaeError
from nsae_cli.lm.families import Family
from nsae_cli.lm.loading import inspect_model, load_model
from nsae_cli.reporter import Reporter
from nsae_cli.store.manifest import Manifest


@dataclass(frozen=True)
class Unembedding:
    """The last step of a model, logits = norm(x) @ W_U.

    Attributes:
        W_U: [d_model, vocabulary], float32.
        gain: the final norm's gain [d_model].
        centres: the final norm subtracts the mean (LayerNorm); RMSNorm does not.
    """

    W_U: torch.Tensor
    gain: torch.Tensor
    centres: bool = True

    def effect(self, directions: torch.Tensor) -> torch.Tensor:
        """(d − mean d)∘gain @ W_U of directions [N, d_model]: what adding d changes in the logits [N, vocabulary].

        The norm also divides by the row's own size, and a model may cap its logits: neither is done here. Where the
        norm does not centre, the mean stays in.
        """
        if self.centres:
            directions = directions - directions.mean(dim=1, keepdim=True)
        return (directions * self.gain) @ self.W_U


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
    return unembedding_of(model, info.family)


def unembedding_of(model: Any, family: Family) -> Unembedding:
    """The unembedding of a causal language model with its head, from its weights."""
    base = model.base_model
    W_U = model.get_output_embeddings().weight.detach().T.float()
    if family.project_out is not None and (projection := attrgetter(family.project_out)(base)) is not None:
        W_U = projection.weight.detach().T.float() @ W_U  # between norm and head
    norm = attrgetter(family.final_norm)(base)
    if norm is None:
        # Blocks that normalise the stream themselves leave nothing to do at the end.
        return Unembedding(W_U.clone(), torch.ones(len(W_U)), centres=False)
    gain = torch.ones(len(W_U)) if norm.weight is None else norm.weight.detach().float() + family.gain_offset
    return Unembedding(W_U.clone(), gain.clone(), family.centres)

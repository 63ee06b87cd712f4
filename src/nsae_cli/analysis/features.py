"""What each feature of an SAE stands for: how often and how strongly it fires, on what, and what it says.

One pass over the store's first held-out contexts. Memory does not grow with the rows: sums per feature, and for each
feature its strongest contexts (one entry per context, at the context's highest activation) with the tokens around.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from nsae_cli import catalogue, interrupt
from nsae_cli.device import one_thread_if_small
from nsae_cli.lm.token_text import TokenText
from nsae_cli.lm.unembedding import Unembedding
from nsae_cli.metrics.features import FeatureAccumulator
from nsae_cli.metrics.groups import SINKS
from nsae_cli.reporter import Reporter, Task
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import HookProfile, profile_hook
from nsae_cli.store.sae_folder import SavedSae
from nsae_cli.store.shards import ActivationStore
from nsae_cli.training.measure import evaluation_batch
from nsae_cli.values import Size

FORMAT_VERSION = 1
#: Tokens shown before and after the strongest one.
BEFORE, AFTER = 16, 8
#: Tokens listed that a feature raises, and that it lowers.
LOGITS = 8
#: Longer contexts are looked at in pieces, which bounds memory.
_LONGEST_PIECE = 1024
_LOGIT_ENTRIES = 2**24


class FeatureOptions(BaseModel):
    """How the features are looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Size = Field(500_000, gt=0, description="held-out rows at most, in whole contexts from the store's beginning")
    contexts: int = Field(10, ge=1, le=50, description="strongest contexts kept per feature")


@dataclass
class FeaturesResult:
    """features.json and the tensors of features.safetensors (docs/report.md)."""

    document: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@torch.no_grad()
def measure_features(
    saved: SavedSae,
    name: str,
    store: ActivationStore,
    options: FeatureOptions,
    text: TokenText,
    unembedding: Unembedding | None,
    reporter: Reporter,
) -> FeaturesResult:
    """Runs the SAE over held-out contexts and describes every feature.

    Args:
        saved: the SAE.
        name: its name, for the document.
        store: activations that fit it (`top_norms.check_fit`).
        options: how many rows and contexts.
        text: says what a token id stands for.
        unembedding: of the model; None where it is not at hand.

    Raises:
        UsageError: no held-out rows.
        NumericalError: a norm is not finite.
        Interrupted: a signal asked to stop.
    """
    contexts = Contexts(store)
    profile = profile_hook(store, saved.hook, contexts)
    rows = _Rows(store, saved.hook, profile, contexts, options.rows)
    if not rows.total:
        raise catalogue.NOTHING_HELD_OUT(
            f"{store.name} has fewer than 20 contexts, so no rows are held out; collect more tokens"
        )
    sums = FeatureAccumulator(saved.sae.d_sae)
    strongest = _Strongest(saved.sae.d_sae, options.contexts)
    last_norms: list[torch.Tensor] = []
    sink_rows = 0
    batch = evaluation_batch(saved.sae.d_sae)
    with (
        one_thread_if_small(batch * saved.sae.d_in * saved.sae.d_sae, torch.device("cpu")),
        reporter.task(f"features of {name}", rows.total, "rows") as task,
    ):
        for part in rows.batches(batch):
            interrupt.stop_if_requested("stopped; nothing of this SAE was written, run the same command again")
            acts = saved.sae.encode(part.x)
            kept = ~part.zero
            acts[part.zero] = 0
            sums.update(acts[kept], part.norm[kept], part.group[kept])
            sink_rows += int((part.group[kept] == SINKS).sum())
            strongest.update(acts, part)
            if part.last_norm is not None:
                last_norms.append(part.last_norm[part.group != SINKS])
            task.advance(len(part.norm))
    tensors = {
        "density": sums.density().float(),
        "mass": sums.mass(),
        "mean_act": sums.mean_act().float(),
        "sink_share": sums.sink_share().nan_to_num(0.0).float(),
        "norm_correlation": sums.norm_correlation().float(),
        "decoder_norm": saved.sae.weights.W_dec.norm(dim=1).float(),
        **strongest.tensors(),
    }
    logits = None
    if unembedding is not None:
        with reporter.task(f"effects on the logits of {name}", saved.sae.d_sae, "features") as task:
            tensors |= _logit_effects(saved.sae.weights.W_dec, unembedding, task)
        logits = {"listed": LOGITS, "final_scale": _final_scale(last_norms, store.manifest.d_in)}
    listed = torch.cat([tensors[key].flatten() for key in ("window_tokens", "raised", "lowered") if key in tensors])
    document = {
        "format_version": FORMAT_VERSION,
        "sae": {"name": name, "weights_sha256": saved.run.get("weights_sha256")},
        "activations": {"name": store.name, "manifest_sha256": store.manifest_sha256},
        "options": options.model_dump(),
        "model": store.manifest.model,
        "hook": saved.hook,
        "context_size": store.manifest.context_size,
        "packing": store.manifest.packing,
        "bos": store.manifest.bos,
        "d_sae": saved.sae.d_sae,
        "rows": rows.total,
        "sink_rows": sink_rows,
        "dead": int((tensors["density"] == 0).sum()),
        "has_tokens": store.has_tokens,
        "window": {"before": BEFORE, "after": AFTER},
        "logits": logits,
        "tokens": {str(token): text(token) for token in listed.unique().tolist() if token >= 0},
    }
    return FeaturesResult(document, tensors)


@dataclass
class _Batch:
    """Whole contexts, or pieces of long ones. All tensors have one entry per row; `lengths` one per piece."""

    x: torch.Tensor
    norm: torch.Tensor
    group: torch.Tensor
    zero: torch.Tensor
    token: torch.Tensor
    row: torch.Tensor
    last_norm: torch.Tensor | None
    lengths: torch.Tensor


class _Rows:
    """The first held-out contexts of a store, up to a number of rows."""

    def __init__(self, store: ActivationStore, hook: str, profile: HookProfile, contexts: Contexts, limit: int) -> None:
        self._store, self._hook, self._profile = store, hook, profile
        self._pieces: list[torch.Tensor] = []
        self.total = 0
        for shard in range(len(store.manifest.shards)):
            pieces = _held_out_pieces(contexts, shard)
            ends = pieces[:, 1].cumsum(0)
            # The piece that reaches the limit is the last.
            pieces = pieces[: int((ends < limit - self.total).sum()) + 1] if self.total < limit else pieces[:0]
            self._pieces.append(pieces)
            self.total += int(pieces[:, 1].sum())
        last = f"blocks.{(store.manifest.n_layers or 0) - 1}.hook_resid_post"
        self._last_hook = last if store.has_stored_norms(last) else None

    def batches(self, batch: int) -> Iterator[_Batch]:
        """Batches of about `batch` rows; never less than one piece."""
        first_row = 0
        for shard, pieces in enumerate(self._pieces):
            if len(pieces):
                yield from self._of_shard(shard, pieces, first_row, batch)
            first_row += self._store.manifest.shards[shard].rows

    def _of_shard(self, shard: int, pieces: torch.Tensor, first_row: int, batch: int) -> Iterator[_Batch]:
        x = self._store.read(shard, [self._hook])[self._hook]
        norm = self._store.norms(shard, self._hook)
        sinks = self._profile.flags(shard, norm).any
        token = self._store.tokens(shard)
        last = None if self._last_hook is None else self._store.norms(shard, self._last_hook)
        number = (pieces[:, 1].cumsum(0) - 1) // batch
        for one in number.unique():
            part = pieces[number == one]
            index = torch.cat([torch.arange(start, start + length) for start, length in part.tolist()])
            yield _Batch(
                x=x[index].float(),
                norm=norm[index],
                group=self._profile.groups(norm[index], sinks[index]),
                zero=self._profile.is_zero(norm[index]),
                token=torch.full_like(index, -1) if token is None else token[index],
                row=index + first_row,
                last_norm=None if last is None else last[index],
                lengths=part[:, 1],
            )


def _held_out_pieces(contexts: Contexts, shard: int) -> torch.Tensor:
    """(first row, rows) of each held-out context of a shard, long ones in pieces: int64 [pieces, 2]."""
    ids = contexts.ids(shard)
    held = contexts.held_out(shard)
    _, counts = ids.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    found = []
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        if held[start]:
            found += [
                (at, min(_LONGEST_PIECE, start + count - at)) for at in range(start, start + count, _LONGEST_PIECE)
            ]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


class _Strongest:
    """Each feature's strongest contexts seen so far, the strongest first; equal ones in the order of the store."""

    def __init__(self, d_sae: int, kept: int) -> None:
        width = BEFORE + 1 + AFTER
        self._act = torch.zeros(d_sae, kept)
        self._row = torch.full((d_sae, kept), -1, dtype=torch.int64)
        self._tokens = torch.full((d_sae, kept, width), -1, dtype=torch.int32)
        self._acts = torch.zeros(d_sae, kept, width)
        # Whether a place of the window lies in the context, since a token may be unknown (−1).
        self._inside = torch.zeros(d_sae, kept, width, dtype=torch.bool)

    def update(self, acts: torch.Tensor, part: _Batch) -> None:
        """Adds a batch: acts [B, d_sae]."""
        lengths = part.lengths
        first = lengths.cumsum(0) - lengths
        # One piece at a time: padding all to the longest could need far more memory than the rows do.
        peaks = [part_acts.max(dim=0) for part_acts in acts.split(lengths.tolist())]
        peak = torch.stack([values for values, _ in peaks])  # [pieces, d_sae]
        place = torch.stack([places for _, places in peaks])
        kept = self._act.shape[1]
        candidates = torch.cat([self._act, peak.T], dim=1)
        best, order = candidates.sort(dim=1, descending=True, stable=True)
        best, order = best[:, :kept], order[:, :kept]
        is_new = (order >= kept) & (best > 0)
        changed = is_new.any(dim=1).nonzero().squeeze(1)
        if not len(changed):
            return
        order, is_new = order[changed], is_new[changed]
        old = order.clamp(max=kept - 1)
        for values in (self._tokens, self._acts, self._inside):
            values[changed] = values[changed].gather(1, old[:, :, None].expand(-1, -1, values.shape[2]))
        self._row[changed] = self._row[changed].gather(1, old)
        self._act[changed] = best[changed]
        where, slot = is_new.nonzero(as_tuple=True)
        feature = changed[where]
        piece = order[where, slot] - kept
        around = place[piece, feature][:, None] + torch.arange(-BEFORE, AFTER + 1)
        inside = (around >= 0) & (around < lengths[piece][:, None])
        rows = (first[piece][:, None] + around).clamp(0, len(acts) - 1)
        self._tokens[feature, slot] = torch.where(inside, part.token[rows], -1).int()
        self._acts[feature, slot] = torch.where(inside, acts[rows, feature[:, None]], 0.0)
        self._inside[feature, slot] = inside
        self._row[feature, slot] = part.row[first[piece] + place[piece, feature]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """`top_act`, `top_row` [d_sae, kept] (row −1: no more), `window_*` [d_sae, kept, before + 1 + after]."""
        return {
            "top_act": self._act,
            "top_row": self._row,
            "window_tokens": self._tokens,
            "window_acts": self._acts,
            "window_inside": self._inside,
        }


def _logit_effects(W_dec: torch.Tensor, unembedding: Unembedding, task: Task) -> dict[str, torch.Tensor]:
    """The tokens that each decoder row raises and lowers most, ids int32 and effects float32 [d_sae, listed]."""
    vocabulary = unembedding.W_U.shape[1]
    listed = min(LOGITS, vocabulary)
    parts: dict[str, list[torch.Tensor]] = {"raised": [], "raised_by": [], "lowered": [], "lowered_by": []}
    for rows in W_dec.float().split(max(1, _LOGIT_ENTRIES // vocabulary)):
        interrupt.stop_if_requested("stopped; nothing of this SAE was written, run the same command again")
        effect = unembedding.effect(rows)
        for ids, values, largest in (("raised", "raised_by", True), ("lowered", "lowered_by", False)):
            found = effect.topk(listed, dim=1, largest=largest)
            parts[ids].append(found.indices.int())
            parts[values].append(found.values)
        task.advance(len(rows))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _final_scale(norms: list[torch.Tensor], d_model: int) -> float | None:
    """A typical σ of the final LayerNorm: median ‖x‖/√d of the last block's non-sink outputs; None if not stored."""
    if not norms or not sum(len(part) for part in norms):
        return None
    return float(torch.cat(norms).median()) / math.sqrt(d_model)

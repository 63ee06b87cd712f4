"""The rows that an audit measures, from a model that is run on a text or from a store, under the same sink rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli.lm.evaluated_rows import EvaluatedRows, RowRules
from nsae_cli.metrics.groups import SINKS
from nsae_cli.metrics.sinks import SinkCounts
from nsae_cli.store.batches import HookRows, read_rows, split_rows
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import profile_hook
from nsae_cli.store.shards import ActivationStore
from nsae_cli.training.measure import RowSource


@dataclass(frozen=True)
class AuditedRows:
    """Rows that are not zero, in the order in which `source` yields them; what is known of each without its vector.

    Attributes:
        source: yields them with their context numbers.
        norm: n, float32 [rows].
        token, position: int64 [rows]; −1 where unknown.
        sink: bool [rows].
        contexts: how many contexts they come from.
        sink_counts: what each rule caught of the rows that the rules were judged on.
        rules: thresholds, bins and ñ.
    """

    source: RowSource
    norm: torch.Tensor
    token: torch.Tensor
    position: torch.Tensor
    sink: torch.Tensor
    contexts: int
    sink_counts: SinkCounts
    rules: RowRules

    @property
    def sinks(self) -> dict[str, Any]:
        """What the rules caught, whether it is position 0 only, and the share of Σ‖x‖² that it holds."""
        squared = self.norm.double().square()
        total = float(squared.sum())
        at_position0 = self.position[self.sink] == 0
        return {
            **self.sink_counts.to_json(),
            "evaluated": int(self.sink.sum()),
            "only_position0": bool(at_position0.all()) if len(at_position0) else None,
            "share_sq": float(squared[self.sink].sum()) / total if total else None,
            "median": self.rules.thresholds.median,
            "median_position0": self.rules.thresholds.median_position0,
            "median_elsewhere": self.rules.thresholds.median_elsewhere,
        }


def rows_of_text(rows: EvaluatedRows, counts: SinkCounts) -> AuditedRows:
    """Rows that a model made of a text, judged already (`EvaluatedRows.judge`)."""
    blocks = range(len(rows))
    live = torch.cat([~rows.zero(block) for block in blocks])
    token = torch.cat([batch.token_ids[batch.mask] for batch in rows.batches])
    return AuditedRows(
        source=rows.rows,
        norm=torch.cat([rows.norms(block) for block in blocks])[live],
        token=token[live],
        position=torch.cat([rows.positions(block) for block in blocks])[live],
        sink=torch.cat([rows.groups(block) == SINKS for block in blocks])[live],
        contexts=len(rows.text.contexts),
        sink_counts=counts,
        rules=rows.rules,
    )


def rows_of_store(store: ActivationStore, hook: str, run: Mapping[str, Any] | None, limit: int | None) -> AuditedRows:
    """Rows of a store.

    Args:
        store: the activations.
        hook: which of its hooks.
        run: run.json of an SAE of nsae: only rows that are held out from training count. None: all rows.
        limit: the first so many of them; None for all.

    Raises:
        ArtifactError: the store has no rows, or all of them are zero.
        NumericalError: norms are not finite.
    """
    contexts = Contexts(store)
    profile = profile_hook(store, hook, contexts)
    keeps: list[torch.Tensor] = []
    columns: list[tuple[torch.Tensor, ...]] = []
    left = limit
    for shard, entry in enumerate(store.manifest.shards):
        norms = store.norms(shard, hook)
        keep = ~profile.is_zero(norms)
        if run is not None:
            keep &= contexts.held_out(shard)
        if left is not None:
            keep &= keep.cumsum(0) <= left
            left -= int(keep.sum())
        unknown = torch.full((entry.rows,), -1, dtype=torch.int64)
        tokens, positions = store.tokens(shard), store.positions(shard)
        every = (
            norms,
            unknown if tokens is None else tokens,
            unknown if positions is None else positions,
            profile.flags(shard, norms).any,
            contexts.ids(shard),
        )
        keeps.append(keep)
        columns.append(tuple(column[keep] for column in every))

    def source(batch_size: int) -> Iterator[tuple[HookRows, torch.Tensor]]:
        for shard, keep in enumerate(keeps):
            if bool(keep.any()):
                rows = read_rows(store, profile, shard, keep)
                yield from split_rows(rows, contexts.ids(shard)[keep], batch_size)

    norm, token, position, sink, numbers = (torch.cat(column) for column in zip(*columns, strict=True))
    return AuditedRows(
        source=source,
        norm=norm,
        token=token.long(),
        position=position.long(),
        sink=sink,
        contexts=len(numbers.unique()),
        sink_counts=profile.sink_counts,
        rules=RowRules.of_profile(profile, "store"),
    )

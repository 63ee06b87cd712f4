"""The residuals that autoencoders are evaluated on, batch by batch, and which of the rows are sinks or in which bin.

Residuals are kept while they fit the room given to them; those that do not are computed again whenever they are asked
for, so that memory does not grow with the text. Norms, positions and sinks of the rows (17 bytes a row) are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsae_cli import catalogue
from nsae_cli.lm.splice import Splicer
from nsae_cli.lm.texts import ContextBatch, Text
from nsae_cli.metrics.groups import N_BINS, SINKS, norm_groups, zero_rows
from nsae_cli.metrics.sinks import SinkCounts, SinkThresholds, fit_thresholds, flag_sinks
from nsae_cli.store.batches import HookRows, split_rows
from nsae_cli.store.profile import HookProfile, find_massive, profile_rows

#: Residuals of so many bytes are kept.
KEPT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class RowRules:
    """What decides which rows are sinks, zero, or in which bin.

    Attributes:
        thresholds: of the sink rules.
        edges: of the norm bins, nine; None where there are none (then every non-sink row is in bin 0).
        norm_scale: ñ.
        source: where they are from: ``run.json``, ``store`` or ``rows``.
    """

    thresholds: SinkThresholds
    edges: tuple[float, ...] | None
    norm_scale: float
    source: str

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> RowRules:
        """Those that an SAE was trained with, from its run.json."""
        sinks = run["sinks"]
        thresholds = fit_thresholds(sinks["median"], sinks["median_position0"], sinks["median_elsewhere"])
        edges = run["edges"]
        return cls(thresholds, None if edges is None else tuple(edges), float(run["norm_scale"]), "run.json")

    @classmethod
    def of_profile(cls, profile: HookProfile, source: str) -> RowRules:
        """Those of a profile."""
        edges = None if profile.edges is None else tuple(profile.edges.tolist())
        return cls(profile.thresholds, edges, profile.norm_scale, source)


class EvaluatedRows:
    """Rows of a text at one hook.

    Args:
        splicer: the model and the hook.
        text: the contexts.
        batch_contexts: contexts per forward pass.
        kept_bytes: room for residuals.
        advance: called with the number of contexts of each batch of the first pass.

    Raises:
        NumericalError: a residual is not finite.
    """

    def __init__(
        self,
        splicer: Splicer,
        text: Text,
        batch_contexts: int,
        kept_bytes: int = KEPT_BYTES,
        advance: Callable[[int], None] = lambda contexts: None,
    ) -> None:
        self.text, self.batches = text, text.batches(batch_contexts)
        self._splicer = splicer
        self._kept: dict[int, Tensor] = {}
        self._norms: list[Tensor] = []
        self._massive: list[Tensor] = []
        self._groups: list[Tensor] = []
        for index, batch in enumerate(self.batches):
            residual = self._compute(batch)
            rows = residual[batch.mask.to(residual.device)].float()
            norms = torch.linalg.vector_norm(rows, dim=1).cpu()
            self._require_finite(batch, norms)
            self._norms.append(norms)
            self._massive.append(find_massive(norms, lambda rows=rows: rows))  # type: ignore[misc]
            if residual.nbytes <= kept_bytes:
                kept_bytes -= residual.nbytes
                self._kept[index] = residual
            else:
                kept_bytes = 0
            self.d_in = residual.shape[-1]
            advance(len(batch.lengths))

    # What a profile is made from (`store.profile.ProfiledRows`) ------------------------------------------------------

    name, hook = "the text", "the hook"

    def __len__(self) -> int:
        return len(self.batches)

    def norms(self, block: int) -> Tensor:
        """n of the rows of a batch, float32 [rows]."""
        return self._norms[block]

    def positions(self, block: int) -> Tensor:
        """Index of each row in its context, int64 [rows]."""
        return torch.cat([torch.arange(length) for length in self.batches[block].lengths])

    def massive(self, block: int) -> Tensor:
        """Rows that sink rule 3 catches, bool [rows]."""
        return self._massive[block]

    def held_out(self, block: int) -> Tensor:
        """None: the edges are those of all rows."""
        return torch.zeros(len(self._norms[block]), dtype=torch.bool)

    def fitted_rules(self) -> RowRules:
        """Rules fitted on these rows.

        Raises:
            ArtifactError: all rows are zero.
        """
        return RowRules.of_profile(profile_rows(self), "rows")

    # Under given rules -----------------------------------------------------------------------------------------------

    def judge(self, rules: RowRules) -> SinkCounts:
        """Decides by these rules which rows are sinks, zero, or in which bin; returns what each sink rule caught."""
        self.rules = rules
        edges = rules.edges if rules.edges is not None else [math.inf] * (N_BINS - 1)
        counts = SinkCounts()
        self._groups = []
        for block in range(len(self)):
            norms = self._norms[block]
            flags = flag_sinks(rules.thresholds, norms, self.positions(block), self._massive[block])
            counts.update(flags)
            self._groups.append(norm_groups(norms, edges, flags.any))
        return counts

    def groups(self, block: int) -> Tensor:
        """Norm bin or sink group of the rows of a batch, int64 [rows]."""
        return self._groups[block]

    def zero(self, block: int) -> Tensor:
        """Zero rows of a batch, bool [rows]."""
        return zero_rows(self._norms[block], self.rules.norm_scale)

    def residual(self, block: int) -> Tensor:
        """Residuals of a batch [contexts, position, d_model], on the model's device, in its dtype."""
        kept = self._kept.get(block)
        return self._compute(self.batches[block]) if kept is None else kept

    def mean_ns(self) -> Tensor:
        """Mean of x over the non-sink rows that are not zero, float64 [d_in]; zeros where there are none."""
        total, count = torch.zeros(self.d_in, dtype=torch.float64), 0
        for block, batch in enumerate(self.batches):
            taken = (self.groups(block) != SINKS) & ~self.zero(block)
            residual = self.residual(block)
            total += residual[batch.mask.to(residual.device)][taken.to(residual.device)].double().sum(dim=0).cpu()
            count += int(taken.sum())
        return total / max(1, count)

    def rows(self, batch_size: int) -> Iterator[tuple[HookRows, Tensor]]:
        """All rows that are not zero, with the index of their context [B], on the CPU; a `RowSource`."""
        parts: list[HookRows] = []
        contexts: list[Tensor] = []
        for block, batch in enumerate(self.batches):
            live = ~self.zero(block)
            residual = self.residual(block)
            x = residual[batch.mask.to(residual.device)].float().cpu()
            parts.append(HookRows(x, self._norms[block], self._groups[block], ~live).select(live))
            contexts.append(self.contexts(block)[live])
            if sum(map(len, contexts)) >= batch_size or block == len(self) - 1:
                yield from split_rows(HookRows.cat(parts), torch.cat(contexts), batch_size)
                parts, contexts = [], []

    def contexts(self, block: int) -> Tensor:
        """Which of the text's contexts the rows of a batch belong to, as an index, int64 [rows]."""
        batch = self.batches[block]
        places = torch.arange(batch.place.start, batch.place.stop)
        return places.repeat_interleave(torch.tensor(batch.lengths))

    def _compute(self, batch: ContextBatch) -> Tensor:
        return self._splicer.residual(batch.token_ids)

    def _require_finite(self, batch: ContextBatch, norms: Tensor) -> None:
        if bool(norms.isfinite().all()):
            return
        row = int((~norms.isfinite()).nonzero()[0])
        context, position = batch.mask.nonzero()[row].tolist()
        raise catalogue.MODEL_NOT_FINITE(
            f"the model's residual at {self._splicer.hook} is not finite at position {position} of context "
            f"{self.text.numbers[batch.first + context]}; try --model-dtype fp32, or check the model's weights"
        )

"""`nsae norms`: the distribution of ‖x‖ at every hook of a store, its sinks, and what they would do to a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsae_cli import interrupt
from nsae_cli.assets import embedded_note
from nsae_cli.lm.token_text import TokenText
from nsae_cli.metrics.groups import NON_SINKS
from nsae_cli.metrics.norm_bias import NormMoments, alpha_eff
from nsae_cli.metrics.quantiles import stream_quantiles
from nsae_cli.sae.objective import L2_POWER
from nsae_cli.store import commit
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import HookProfile, profile_hook
from nsae_cli.store.shards import ActivationStore
from nsae_cli.training.options import layer_of

FORMAT_VERSION = 1
N_HISTOGRAM_BINS = 200
QUANTILE_LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
TOP_SHARE = 0.01
TOP_TOKENS = 10


@dataclass
class NormsResult:
    """norms.json and the tensors of norms.safetensors."""

    document: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def measure_norms(store: ActivationStore, text: TokenText, probe: dict[str, Any] | None) -> NormsResult:
    """Measures every hook of the store that has norms.

    Args:
        store: the activations.
        text: says what a token id stands for.
        probe: result of `lm.probe` by hook name, or None.

    Raises:
        ArtifactError: the store is damaged, or holds nothing but zeros or sinks.
        NumericalError: a norm is not finite.
        Interrupted: a signal asked to stop.
    """
    manifest = store.manifest
    hooks = list(manifest.norm_hooks or manifest.hooks)
    contexts = Contexts(store)
    profiles = {hook: profile_hook(store, hook, contexts) for hook in hooks}
    edges = _histogram_edges(store, hooks)
    measured = [_Hook(store, profiles[hook], edges) for hook in hooks]
    document = {
        "format_version": FORMAT_VERSION,
        "activations": {"name": store.name, "manifest_sha256": store.manifest_sha256},
        "model": manifest.model,
        "embedded_note": embedded_note(manifest.model),
        "site": manifest.site,
        "context_size": manifest.context_size,
        "packing": manifest.packing,
        "bos": manifest.bos,
        "hooks": [hook.describe(text, (probe or {}).get(hook.name)) for hook in measured],
    }
    tensors = {
        "counts": torch.stack([hook.histogram(lambda shard: None) for hook in measured]),
        "position0_counts": torch.stack([hook.histogram(hook.at_position0) for hook in measured]),
        "edges": edges,
        "quantile_levels": torch.tensor(QUANTILE_LEVELS, dtype=torch.float64),
        "quantiles": torch.tensor([hook.quantiles for hook in measured], dtype=torch.float64),
    }
    return NormsResult(document, tensors)


def write_norms(folder: Path, result: NormsResult) -> dict[str, Any]:
    """Writes norms.safetensors and, last, norms.json, which is returned as it was written."""
    commit.write_tensors(folder / "norms.safetensors", result.tensors)
    return commit.write_document(folder / "norms.json", result.document, ["norms.safetensors"])


def _histogram_edges(store: ActivationStore, hooks: list[str]) -> torch.Tensor:
    """201 edges of log10 n, equally spaced over all hooks' positive norms; float64."""
    low, high = math.inf, -math.inf
    for hook in hooks:
        for shard in range(len(store.manifest.shards)):
            norms = store.norms(shard, hook)
            positive = norms[norms > 0].double()
            if len(positive):
                low, high = min(low, float(positive.min())), max(high, float(positive.max()))
    # A hair wider than the data, so that rounding of log10 leaves no row outside.
    low, high = math.log10(low) - 1e-9, math.log10(high) + 1e-9
    return torch.linspace(low, high, N_HISTOGRAM_BINS + 1, dtype=torch.float64)


class _Hook:
    """Passes over one hook's norms."""

    def __init__(self, store: ActivationStore, profile: HookProfile, edges: torch.Tensor) -> None:
        self._store, self._profile, self._edges = store, profile, edges
        self.name = profile.hook
        self._shards = range(len(store.manifest.shards))
        _, quantiles = stream_quantiles(lambda: self._norms(None), QUANTILE_LEVELS)
        assert quantiles is not None, "profile_hook refuses a store without rows"
        self.quantiles = quantiles

    def _norms(self, select: Callable[[int], torch.Tensor | None] | None) -> Iterator[torch.Tensor]:
        """Norms of every shard, or of the rows that `select(shard)` marks."""
        for shard in self._shards:
            interrupt.stop_if_requested("stopped; nothing was written, run the same command again")
            norms = self._store.norms(shard, self.name)
            mask = None if select is None else select(shard)
            yield norms if mask is None else norms[mask]

    def _non_sinks(self, shard: int) -> torch.Tensor:
        norms = self._store.norms(shard, self.name)
        return ~self._profile.flags(shard, norms).any

    def at_position0(self, shard: int) -> torch.Tensor | None:
        """Rows of a shard at position 0; none of them where the store has no positions."""
        positions = self._store.positions(shard)
        rows = self._store.manifest.shards[shard].rows
        return torch.zeros(rows, dtype=torch.bool) if positions is None else positions == 0

    def histogram(self, select: Callable[[int], torch.Tensor | None]) -> torch.Tensor:
        """Rows per bin of log10 n, int64 [200]; rows with n = 0 are in no bin."""
        counts = torch.zeros(N_HISTOGRAM_BINS, dtype=torch.int64)
        for norms in self._norms(select):
            positive = norms[norms > 0].double().log10()
            index = torch.bucketize(positive, self._edges, right=True).sub_(1).clamp_(0, N_HISTOGRAM_BINS - 1)
            counts += torch.bincount(index, minlength=N_HISTOGRAM_BINS)
        return counts

    def describe(self, text: TokenText, probe: dict[str, Any] | None) -> dict[str, Any]:
        """The hook's entry of norms.json."""
        rows, mean, spread = self._mean_and_spread(None)
        _, mean_ns, spread_ns = self._mean_and_spread(self._non_sinks)
        level = dict(zip(QUANTILE_LEVELS, self.quantiles, strict=True))
        preflight = self._preflight()
        return {
            "hook": self.name,
            "layer": layer_of(self.name),
            "rows": rows,
            "mean": mean,
            "median": level[0.5],
            **{f"p{round(100 * q)}": level[q] for q in (0.01, 0.05, 0.1, 0.25, 0.75, 0.9, 0.95, 0.99)},
            "max": level[1.0],
            "cv": spread / mean if mean else None,
            "cv_ns": spread_ns / mean_ns if mean_ns else None,
            "sinks": self._profile.sink_counts.to_json(),
            "sink_share_sq": self._sink_share_sq(),
            "table": self._position_by_special(),
            "top_tokens": self._top_tokens(text),
            "alpha_eff": preflight["alpha_eff"],
            "esf": preflight["esf"],
            "probe": probe,
        }

    def _mean_and_spread(self, select: Callable[[int], torch.Tensor | None] | None) -> tuple[int, float, float]:
        """Rows, mean and population standard deviation, in two passes for accuracy."""
        count, total = 0, 0.0
        for norms in self._norms(select):
            count += len(norms)
            total += float(norms.double().sum())
        if not count:
            return 0, 0.0, 0.0
        mean = total / count
        squares = sum(float((norms.double() - mean).square().sum()) for norms in self._norms(select))
        return count, mean, math.sqrt(squares / count)

    def _sink_share_sq(self) -> float | None:
        """Σ_S n² / Σ n²."""
        total = sinks = 0.0
        for shard, norms in zip(self._shards, self._norms(None), strict=True):
            squares = norms.double().square()
            total += float(squares.sum())
            sinks += float(squares[~self._non_sinks(shard)].sum())
        return sinks / total if total else None

    def _position_by_special(self) -> dict[str, Any] | None:
        """Rows, median and largest n in the 2×2 of {position 0, other} × {special token, other}."""
        if not (self._store.has_positions and self._store.has_tokens):
            return None
        special = torch.tensor(self._store.manifest.special_token_ids or [], dtype=torch.int64)

        def cell(position0: bool, is_special: bool) -> dict[str, Any]:
            def select(shard: int) -> torch.Tensor:
                positions, tokens = self._store.positions(shard), self._store.tokens(shard)
                assert positions is not None
                assert tokens is not None
                return ((positions == 0) == position0) & (torch.isin(tokens, special) == is_special)

            rows, values = stream_quantiles(lambda: self._norms(select), [0.5, 1.0])
            median, largest = values or (None, None)
            return {"rows": rows, "median": median, "max": largest}

        return {
            "position0_special": cell(True, True),
            "position0_other": cell(True, False),
            "other_special": cell(False, True),
            "other": cell(False, False),
        }

    def _top_tokens(self, text: TokenText) -> list[dict[str, Any]]:
        """The commonest tokens among the top 1 % of rows by (n, row number)."""
        if not self._store.has_tokens:
            return []
        wanted = max(1, round(TOP_SHARE * self._store.manifest.rows))
        norms, tokens = torch.empty(0), torch.empty(0, dtype=torch.int64)
        for shard, shard_norms in zip(self._shards, self._norms(None), strict=True):
            shard_tokens = self._store.tokens(shard)
            assert shard_tokens is not None
            norms, tokens = torch.cat([norms, shard_norms]), torch.cat([tokens, shard_tokens])
            order = norms.argsort(descending=True, stable=True)[:wanted]
            norms, tokens = norms[order], tokens[order]
        return count_tokens(tokens, text, TOP_TOKENS)

    def _preflight(self) -> dict[str, Any]:
        """What the norms alone say about each --l2-norm: relative sparsity weight by bin, effective batch fraction."""
        moments = NormMoments()
        for shard, norms in zip(self._shards, self._norms(None), strict=True):
            groups = self._profile.groups(norms, ~self._non_sinks(shard))
            live = ~self._profile.is_zero(norms)
            moments.update(norms[live], groups[live])
        return {
            "alpha_eff": {
                act: {name: alpha_eff(moments, p, 0, degree) for name, p in L2_POWER.items()}
                for act, degree in (("relu", 1), ("tanh-relu", 0))
            },
            "esf": {
                name: {
                    "all": moments.effective_batch_fraction(p),
                    "ns": moments.effective_batch_fraction(p, NON_SINKS),
                }
                for name, p in L2_POWER.items()
            },
        }


def count_tokens(tokens: torch.Tensor, text: TokenText, most: int) -> list[dict[str, Any]]:
    """The commonest of `tokens`, most frequent first, equal counts by id."""
    ids, counts = tokens.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most]
    return [
        {"token": int(token), "text": text(int(token)), "count": int(count)}
        for token, count in zip(ids[order].tolist(), counts[order].tolist(), strict=True)
    ]

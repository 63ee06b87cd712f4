"""`nsae analyze-top-norms`: what an SAE does on the rows with the largest and the smallest norms.

Measured on the store's held-out rows. Groups by norm: top and bottom are the k = round(top·rows) ≥ 1 rows with the
largest and smallest (n, row number), other is the rest. Kinds by place: position 0, other special token, ordinary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsae_cli import catalogue, interrupt
from nsae_cli.analysis.norms import count_tokens
from nsae_cli.analysis.row_groups import GROUPS, KINDS, distribution, group_by_norm, kind_of
from nsae_cli.assets import embedded_note
from nsae_cli.device import one_thread_if_small
from nsae_cli.lm.token_text import TokenText
from nsae_cli.metrics.features import FeatureAccumulator
from nsae_cli.metrics.groups import zero_rows
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator
from nsae_cli.reporter import Reporter
from nsae_cli.sae.objective import Objective
from nsae_cli.store import commit
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.finite import refuse_non_finite
from nsae_cli.store.sae_folder import SavedSae
from nsae_cli.store.shards import ActivationStore
from nsae_cli.training.measure import evaluation_batch

FORMAT_VERSION = 1
_LISTED = 10

# The fields of `metrics.reconstruction` that a group reports.
_METRICS = (
    "mre", "direction_error", "magnitude_error", "shrinkage", "norm_ratio", "l1_share", "loss_share",
)  # fmt: skip


@dataclass
class TopNormsResult:
    """top_norms.json and the per-row tensors of top_norms.safetensors."""

    document: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def check_fit(saved: SavedSae, store: ActivationStore) -> None:
    """Refuses a store that the SAE was not made for.

    Raises:
        ArtifactError: another width, or the SAE's hook is not stored.
    """
    if saved.hook not in store.manifest.hooks:
        raise catalogue.HOOK_MISMATCH(
            f"the SAE reads {saved.hook}, {store.name} holds {', '.join(store.manifest.hooks)}; "
            f"give activations of that hook with --activations"
        )
    if saved.sae.d_in != store.manifest.d_in:
        raise catalogue.WIDTH_MISMATCH(
            f"the SAE reads vectors of width {saved.sae.d_in}, {store.name} holds width {store.manifest.d_in}; "
            f"give activations of the same model with --activations"
        )
    trained_on = saved.run.get("model")
    if trained_on is not None and store.manifest.model is not None and trained_on != store.manifest.model:
        raise catalogue.MODEL_MISMATCH(
            f"the SAE was trained on {trained_on}, {store.name} is from {store.manifest.model}; "
            f"give activations of the same model with --activations"
        )


def analyze_top_norms(
    saved: SavedSae,
    name: str,
    store: ActivationStore,
    top: float,
    rows: int | None,
    text: TokenText,
    reporter: Reporter,
) -> TopNormsResult:
    """Runs the SAE over the held-out rows and compares groups and kinds.

    Args:
        saved: the SAE.
        name: its name, for the document.
        store: activations that fit it (see `check_fit`).
        top: share of the rows in the top group, and in the bottom group.
        rows: use the first so many held-out rows; None for all.
        text: says what a token id stands for.

    Raises:
        UsageError: no held-out rows.
        NumericalError: a norm is not finite.
        Interrupted: a signal asked to stop.
    """
    refuse_non_finite(store, saved.hook)
    table = _RowTable.collect(store, saved.hook, float(saved.run["norm_scale"]), rows)
    if not len(table.norm):
        raise catalogue.NOTHING_HELD_OUT(
            f"{store.name} has fewer than 20 contexts, so no rows are held out; collect more tokens"
        )
    group = group_by_norm(table.norm, top)
    kind = kind_of(table.token, table.position, store.manifest.special_token_ids or [])
    objective = Objective.from_run(saved.run)
    by_group, by_kind = _Comparison(saved, objective), _Comparison(saved, objective)
    l0, l1, rho = [], [], []
    batch = evaluation_batch(saved.sae.d_sae)
    product = batch * saved.sae.d_in * saved.sae.d_sae
    with (
        one_thread_if_small(product, torch.device("cpu")),
        reporter.task(f"analysing {name}", len(table.norm), "rows") as task,
    ):
        for start, x in table.vectors(store, saved.hook, batch):
            interrupt.stop_if_requested("stopped; nothing of this SAE was written, run the same command again")
            part = slice(start, start + len(x))
            acts = saved.sae.encode(x)
            x_hat = saved.sae.decode(acts)
            error = (x_hat - x).double()
            l0.append((acts > 0).sum(dim=1))
            l1.append(acts.sum(dim=1))
            rho.append(torch.linalg.vecdot(error, error) / torch.linalg.vecdot(x.double(), x.double()))
            for comparison, labels in ((by_group, group), (by_kind, kind)):
                comparison.update(x, x_hat, acts, table.norm[part], labels[part])
            task.advance(len(x))
    table.l0, table.l1 = torch.cat(l0), torch.cat(l1)
    document = {
        "format_version": FORMAT_VERSION,
        "sae": {"name": name, "weights_sha256": saved.run.get("weights_sha256")},
        "activations": {"name": store.name, "manifest_sha256": store.manifest_sha256},
        "model": store.manifest.model,
        "embedded_note": embedded_note(store.manifest.model),
        "context_size": store.manifest.context_size,
        "packing": store.manifest.packing,
        "bos": store.manifest.bos,
        "hook": saved.hook,
        "config": saved.run["config"],
        "top": top,
        "rows": len(table.norm),
        "groups": by_group.describe(GROUPS, group, table, text),
        "kinds": by_kind.describe(KINDS, kind, table, text),
    }
    return TopNormsResult(
        document,
        {
            "norm": table.norm,
            "l0": table.l0.int(),
            "l1": table.l1.float(),
            "rho": torch.cat(rho).float(),
            "group": group.to(torch.uint8),
            "kind": kind.to(torch.uint8),
            "token": table.token.int(),
            "position": table.position.int(),
            "row": table.row,
        },
    )


def write_top_norms(folder: Path, result: TopNormsResult) -> dict[str, Any]:
    """Writes top_norms.safetensors and, last, top_norms.json, which is returned as it was written."""
    commit.write_tensors(folder / "top_norms.safetensors", result.tensors)
    return commit.write_document(folder / "top_norms.json", result.document, ["top_norms.safetensors"])


@dataclass
class _RowTable:
    """The analysed rows, in store order: what is known of each without its vector, and the SAE's l0 and l1."""

    norm: torch.Tensor
    token: torch.Tensor
    position: torch.Tensor
    row: torch.Tensor
    l0: torch.Tensor
    l1: torch.Tensor

    @classmethod
    def collect(cls, store: ActivationStore, hook: str, norm_scale: float, limit: int | None) -> _RowTable:
        """The held-out rows, zero rows left out; token and position are −1 where the store has none."""
        contexts = Contexts(store)
        parts: list[tuple[torch.Tensor, ...]] = []
        offset, taken = 0, 0
        for shard, entry in enumerate(store.manifest.shards):
            norms = store.norms(shard, hook)
            index = (contexts.held_out(shard) & ~zero_rows(norms, norm_scale)).nonzero().squeeze(1)
            if limit is not None:
                index = index[: limit - taken]
            unknown = torch.full((entry.rows,), -1, dtype=torch.int64)
            tokens, positions = store.tokens(shard), store.positions(shard)
            columns = (norms, unknown if tokens is None else tokens, unknown if positions is None else positions)
            parts.append((*(column[index] for column in columns), index + offset))
            offset += entry.rows
            taken += len(index)
        norm, token, position, row = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(norm, token, position, row, torch.empty(0), torch.empty(0))

    def vectors(self, store: ActivationStore, hook: str, batch: int) -> Any:
        """(index of the first row, x float32 [B, d_in]) in the table's order."""
        first_row = 0
        for shard, entry in enumerate(store.manifest.shards):
            inside = (self.row >= first_row) & (self.row < first_row + entry.rows)
            index = inside.nonzero().squeeze(1)
            if len(index):
                x = store.read(shard, [hook])[hook]
                for part in index.split(batch):
                    yield int(part[0]), x[self.row[part] - first_row].float()
            first_row += entry.rows


class _Comparison:
    """Metrics of three labels side by side, through the accumulators that `nsae train` uses."""

    def __init__(self, saved: SavedSae, objective: Objective) -> None:
        self._objective = objective
        self._reconstruction = ReconstructionAccumulator(saved.sae.d_in)
        self._features = FeatureAccumulator(saved.sae.d_sae)
        scale = objective.input_scale
        acts_scale, decoder_scale = (scale, 1.0) if saved.sae.nonlinearity.homogeneous else (1.0, scale)
        self._acts_scale = acts_scale
        self._norms = decoder_scale * saved.sae.weights.W_dec.norm(dim=1)

    def update(
        self, x: torch.Tensor, x_hat: torch.Tensor, acts: torch.Tensor, norm: torch.Tensor, label: torch.Tensor
    ) -> None:
        """Adds rows; `label` 0, 1 or 2 per row [B]."""
        penalty = self._objective.penalty.value(acts * self._acts_scale, self._norms).sum(dim=1)
        l0, l1 = (acts > 0).sum(dim=1), acts.sum(dim=1)
        error_terms = self._objective.error_terms(x, x_hat, norm)
        self._reconstruction.update(x, x_hat, norm, label, l0, l1, penalty, error_terms)
        self._features.update(acts, norm, label)

    def describe(
        self, names: dict[str, int], label: torch.Tensor, table: _RowTable, text: TokenText
    ) -> dict[str, dict[str, Any]]:
        """One entry per name; `label` [rows] over the whole table."""
        # Labels 0…2 take the places of the first three norm bins.
        scopes = self._reconstruction.compute(self._objective.l2_power, self._objective.l1_power)["bins"]
        return {name: self._entry(value, scopes[value], label == value, table, text) for name, value in names.items()}

    def _entry(
        self, value: int, scope: dict[str, Any], mask: torch.Tensor, table: _RowTable, text: TokenText
    ) -> dict[str, Any]:
        norm, token, position = table.norm[mask], table.token[mask], table.position[mask]
        rows = int(mask.sum())
        return {
            "rows": rows,
            "norm_min": float(norm.min()) if rows else None,
            "norm_max": float(norm.max()) if rows else None,
            "l0": distribution(table.l0[mask]),
            "l1": distribution(table.l1[mask]),
            **{metric: scope[metric] for metric in _METRICS},
            "tokens": count_tokens(token[token >= 0], text, _LISTED),
            "positions": _count_positions(position[position >= 0]),
            "exclusive_features": int(self._features.exclusive_features([value]).sum()),
        }


def _count_positions(positions: torch.Tensor) -> list[dict[str, int]]:
    values, counts = positions.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:_LISTED]
    pairs = zip(values[order].tolist(), counts[order].tolist(), strict=True)
    return [{"position": position, "count": count} for position, count in pairs]

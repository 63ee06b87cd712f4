"""metrics.jsonl: a line per logged step, in raw units, without times; checkpoints hold a copy to go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsae_cli.metrics.norm_bias import gradient_norms
from nsae_cli.metrics.training_batch import batch_metrics
from nsae_cli.store.batches import HookRows
from nsae_cli.store.commit import append_log, disk_errors, to_json
from nsae_cli.training.cell import Cell, StepLog


def step_record(cell: Cell, rows: HookRows, log: StepLog, step: int) -> dict[str, Any]:
    """One line of metrics.jsonl: the training batch of a step, before its update, with noise as trained.

    The loss and its two terms are in raw units, L = L'·s^(p−2); `l1_all` is Σf in raw units; ratios need no unit.

    Args:
        cell: after the step.
        rows: the step's batch.
        log: what the step gave, with the gradient norms of its rows.
        step: 0-based number of the step.
    """
    objective, result = cell.objective, log.result
    s = objective.input_scale
    x_hat = log.x + result.error
    to_raw = 1 / objective.loss_scale
    loss_l2 = float(log.error_weight.double() @ result.distance.double()) * to_raw
    loss_sparsity = float(log.sparsity_weight.double() @ result.penalty.double()) * to_raw
    l1_scale = 1 / s if objective.nonlinearity.homogeneous else 1.0
    x_sq = torch.linalg.vecdot(log.x, log.x)
    assert result.row_gradients is not None
    batch = batch_metrics(
        x=log.x,
        norm=rows.norm,
        group=rows.group,
        sq_error=result.sq_error,
        dot=torch.linalg.vecdot(log.x, x_hat),
        x_sq=x_sq,
        x_hat_sq=torch.linalg.vecdot(x_hat, x_hat),
        l0=result.l0,
        l1=result.l1 * l1_scale,
        weight_error=log.plain_error_weight,
        distance=result.distance,
        penalty=result.penalty,
        # Without β: a share and a slope do not need it, and it is 0 when a warm-up begins.
        weight_sparsity=objective.row_weights(rows.norm, rows.zero)[1],
        gradient_norms=gradient_norms(result.row_gradients, x_sq.sqrt(), cell.config.decoder == "unit"),
    )
    bias_keys = ("loss_share", "bias_ratio", "l1_share", "grad_share", "nbi", "exponents")
    shares = {key: batch.pop(key) for key in bias_keys}
    return {
        "step": step + 1,
        "tokens": (step + 1) * cell.config.batch_size,
        "loss": loss_l2 + loss_sparsity,
        "loss_l2": loss_l2,
        "loss_sparsity": loss_sparsity,
        **batch,
        "dead_fraction_window": cell.window.dead_fraction(),
        "resampled": cell.resampled,
        "alpha": log.alpha,
        "lr": log.lr,
        **shares,
    }


class MetricsLog:
    """Appends records to one cell's metrics.jsonl.

    Args:
        path: the file.
        content: what the file held at the checkpoint that the run goes on from; empty to begin anew.
        also: takes every record that is appended too.
    """

    def __init__(self, path: Path, content: bytes, also: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._path, self._also = path, also
        with disk_errors(path):
            path.write_bytes(content)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line."""
        append_log(self._path, to_json(record, indent=None))
        if self._also is not None:
            self._also(record)

    def content(self) -> bytes:
        """All lines so far, for a checkpoint."""
        return self._path.read_bytes()

"""The gradient on a fixed batch of rows: whose it is, and what sinks leave in Adam's memory.

The rows are the first held-out ones of the hook, so a resumed run finds the same again and nothing of them is saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli.kernels.adam import BETAS
from nsae_cli.kernels.decoder import remove_parallel_component_
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.types import Activation, StepResult, Weights
from nsae_cli.metrics.groups import N_GROUPS, SINKS
from nsae_cli.metrics.norm_bias import AdamSinkShare
from nsae_cli.metrics.training_batch import by_group_name
from nsae_cli.metrics.undefined import ratio
from nsae_cli.sae.nonlinearity import JumpRelu
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows
from nsae_cli.store.profile import HookProfile
from nsae_cli.training.cell import Cell
from nsae_cli.training.parallel.gradients import shared_inner_product
from nsae_cli.training.parallel.ranks import ALONE, Ranks
from nsae_cli.training.plan import TrainPlan
from nsae_cli.training.schedule import is_probed, ramp

#: A probe has a quarter of a batch's rows, within these limits.
_FEWEST_ROWS, _MOST_ROWS = 256, 1024


def probe_rows(batch_size: int) -> int:
    """How many rows a probe has beside batches of this size."""
    return min(_MOST_ROWS, max(_FEWEST_ROWS, batch_size // 4))


@dataclass(frozen=True)
class ProbedGradient:
    """A gradient g and the parts g_b of the groups' rows, which add up to it.

    Attributes:
        projections: G_b = ⟨g_b, g⟩/‖g‖² by group; None for a group without rows.
        total_sq: ‖g‖².
        sinks_sq: ‖g_S‖²; None without sinks.
    """

    projections: list[float | None]
    total_sq: float
    sinks_sq: float | None


@torch.no_grad()
def probe_gradient(
    rows: HookRows,
    weights: Weights,
    objective: Objective,
    activation: Activation,
    beta: float,
    unit_decoder: bool,
    step: Callable[..., StepResult] | None = None,
    ranks: Ranks = ALONE,
) -> ProbedGradient:
    """The gradient of the mean loss over the rows, in all parameters, after projection and before clipping.

    Args:
        rows: on the weights' device.
        weights: in scaled units.
        objective: the loss.
        activation: as trained or as saved.
        beta: β of the penalty, in scaled units.
        unit_decoder: whether W_dec's gradient is projected.
        step: what to compute gradients with, of `reference.step_gradients`' signature; None for dense steps.
        ranks: the processes that have the other features; all of them probe on the same rows.
    """
    step = step or DenseStep()

    def gradient(part: HookRows, weights: Weights, into: Weights) -> StepResult:
        error_weight, sparsity_weight = objective.row_weights(part.norm, part.zero)
        return step(
            part.x.float() * objective.input_scale,
            weights,
            into,
            activation=activation,
            penalty=objective.penalty,
            error_weight=error_weight / len(rows.norm),
            sparsity_weight=sparsity_weight * (beta / len(rows.norm)),
            distance=objective.distance,
        )

    total, part = weights.zeros_like(), weights.zeros_like()
    least_act = gradient(rows, weights, total).least_act
    if unit_decoder:
        remove_parallel_component_(total.W_dec, weights.W_dec)
    whole = total.named()
    total_sq = shared_inner_product(ranks, whole, whole)
    if least_act is not None:  # what is selected depends on the whole batch: its parts get the same threshold
        threshold = torch.nextafter(least_act, torch.zeros_like(least_act))
        weights = dataclasses.replace(weights, log_threshold=torch.full_like(weights.b_enc, float(threshold)).log())
        part.log_threshold = torch.zeros_like(weights.b_enc)
        activation = JumpRelu.fixed()
    projections: list[float | None] = []
    sinks_sq = None
    for group in range(N_GROUPS):
        # One group at a time: a gradient is as large as the SAE.
        of_group = rows.select(rows.group == group)
        if not len(of_group.norm):
            projections.append(None)
            continue
        gradient(of_group, weights, part)
        found = {name: part.named()[name] for name in whole}
        projections.append(ratio(shared_inner_product(ranks, found, whole), total_sq))
        if group == SINKS:
            if unit_decoder:
                remove_parallel_component_(part.W_dec, weights.W_dec)
            sinks_sq = shared_inner_product(ranks, found, found)
    return ProbedGradient(projections, total_sq, sinks_sq)


class CellProbe:
    """Probes one cell's gradient as training goes on.

    Args:
        rows: to probe on, on the training device; None where no rows are held out.
        every: steps between probes; None for none at all.
    """

    def __init__(self, rows: HookRows | None, every: int | None) -> None:
        self._rows, self._every = rows, every
        self._sinks = AdamSinkShare(BETAS[1])
        self._last_step = -1

    def measure(self, cell: Cell, step: int) -> dict[str, Any] | None:
        """What a line of metrics.jsonl says of the gradient before `step` (0-based); None where it is not probed."""
        if self._rows is None or not is_probed(step, cell.config.steps, self._every):
            return None
        objective = cell.objective
        beta = objective.beta_scaled * ramp(step, cell.config.steps, cell.config.alpha_warm_up)
        unit = cell.config.decoder == "unit"
        found = probe_gradient(
            self._rows, cell.weights, objective, objective.nonlinearity, beta, unit, cell.probing.gradients, cell.ranks
        )
        if found.sinks_sq is not None:
            self._sinks.update(found.sinks_sq, found.total_sq, step - self._last_step)
        self._last_step = step
        return {
            "rows": len(self._rows.norm),
            "G": by_group_name(found.projections),
            "adam_sink_share": self.adam_sink_share,
        }

    @property
    def adam_sink_share(self) -> float | None:
        """See `AdamSinkShare`; None without sinks among the rows."""
        return self._sinks.compute()

    def state(self) -> dict[str, torch.Tensor]:
        """What later probes depend on."""
        return {"probe/averages": self._sinks.state(), "probe/last_step": torch.tensor(self._last_step)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from `state()`; other entries are ignored."""
        self._sinks.load_state(state["probe/averages"])
        self._last_step = int(state["probe/last_step"])


def make_probes(
    plan: TrainPlan, cells: Mapping[str, Cell], profiles: Mapping[str, HookProfile], device: torch.device
) -> dict[str, CellProbe]:
    """A probe for each cell. Cells of one hook share their rows, but for those that leave sinks out."""
    wanted = probe_rows(plan.batch_size)
    rows: dict[tuple[str, str], HookRows | None] = {}
    probes = {}
    for name, cell in cells.items():
        config = cell.config
        key = config.hook, config.sinks
        if config.probe_every is not None and key not in rows:
            found = _first_held_out(plan, profiles[config.hook], wanted, drop_sinks=config.sinks == "drop")
            rows[key] = None if found is None else found.to(device)
        probes[name] = CellProbe(rows.get(key), config.probe_every)
    return probes


def _first_held_out(plan: TrainPlan, profile: HookProfile, wanted: int, *, drop_sinks: bool) -> HookRows | None:
    parts: list[HookRows] = []
    for part, _ in plan.source.held_out_rows(profile, wanted):
        parts.append(part.select(part.group != SINKS) if drop_sinks else part)
        if sum(len(part.norm) for part in parts) >= wanted:
            break
    found = HookRows.cat(parts).select(slice(wanted)).copy() if parts else None
    return found if found is not None and len(found.norm) else None

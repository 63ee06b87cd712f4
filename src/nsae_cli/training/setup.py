"""From a plan to cells that can take a step: profiles of the hooks, streams of batches, initial weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsae_cli.errors import UsageError
from nsae_cli.kernels.select import Choice
from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.groups import SINKS
from nsae_cli.reporter import Reporter
from nsae_cli.sae.init import geometric_median, initialise
from nsae_cli.store.batches import HookRows, stable_seed
from nsae_cli.store.profile import HookProfile
from nsae_cli.training.cell import Cell, make_objective
from nsae_cli.training.options import CellConfig
from nsae_cli.training.plan import TrainPlan
from nsae_cli.training.source import TrainingStream

#: Rows from which the initialisation takes b_dec: the first that the cell will be trained on.
INIT_ROWS = 8192

#: Cells with equal keys see the same rows: same seed and, where sinks are dropped, the same hook.
StreamKey = tuple[int, str | None]


def stream_key(config: CellConfig) -> StreamKey:
    """Which stream of batches a cell reads."""
    return config.seed, config.hook if config.sinks == "drop" else None


def profile_hooks(plan: TrainPlan, reporter: Reporter) -> dict[str, HookProfile]:
    """Norms, sinks and bins of every hook of the plan."""
    plan.source.prepare(reporter)
    profiles = {}
    for hook in plan.hooks:
        profiles[hook] = profile = plan.source.profile(hook)
        reporter.note(
            f"{hook}: {plan.source.profiled_rows:,} rows, {profile.training_rows:,} to train on, "
            f"{profile.sink_counts.to_json()['total']:,} sinks, typical norm {profile.norm_scale:.4g}"
        )
    return profiles


def make_streams(plan: TrainPlan, profiles: dict[str, HookProfile]) -> dict[StreamKey, TrainingStream]:
    """One stream of batches for all cells that see the same rows."""
    streams: dict[StreamKey, TrainingStream] = {}
    for config in plan.configs.values():
        key = stream_key(config)
        hooks = dict.fromkeys(other.hook for other in plan.configs.values() if stream_key(other) == key)
        profile, drop_sinks = profiles[config.hook], config.sinks == "drop"
        if drop_sinks and profile.training_sinks == profile.training_rows:
            raise UsageError(f"--sinks drop: every training row of {plan.source.name} at {config.hook} is a sink")
        if key not in streams:
            streams[key] = plan.source.stream(
                [profiles[hook] for hook in hooks], config.batch_size, config.seed, drop_sinks
            )
    return streams


def make_cells(
    plan: TrainPlan, profiles: dict[str, HookProfile], device: torch.device, kernel: Choice
) -> dict[str, Cell]:
    """The cells with room for their weights, which `initialise_cells` or a checkpoint fills."""
    cells = {}
    d_in = plan.source.d_in
    for name, config in plan.configs.items():
        shapes = ((d_in, config.d_sae), (config.d_sae,), (config.d_sae, d_in), (d_in,))
        weights = Weights(*(torch.zeros(shape, device=device) for shape in shapes))
        cells[name] = Cell(config, make_objective(config, profiles[config.hook], d_in), weights, kernel)
    return cells


def initialise_cells(cells: dict[str, Cell], streams: dict[StreamKey, TrainingStream]) -> None:
    """Gives cells their weights of step 0, from the first rows that each will be trained on."""
    for key, stream in streams.items():
        first = stream.first_rows(INIT_ROWS)
        starts = {hook: _Start.of(rows) for hook, rows in first.items()}
        for cell in cells.values():
            if stream_key(cell.config) == key:
                starts[cell.config.hook].initialise(cell)


@dataclass(frozen=True)
class _Start:
    """Rows [N, d] of a hook and the geometric median of those that are no sinks, in raw units."""

    rows: torch.Tensor
    median: torch.Tensor

    @classmethod
    def of(cls, rows: HookRows) -> _Start:
        live = rows.x[~rows.zero]
        non_sinks = rows.x[~rows.zero & (rows.group != SINKS)]
        return cls(live, geometric_median(non_sinks if len(non_sinks) else live))

    def initialise(self, cell: Cell) -> None:
        """Overwrites the cell's weights."""
        config, scale = cell.config, cell.objective.input_scale
        weights = initialise(
            cell.objective.nonlinearity,
            config.decoder,
            config.d_sae,
            self.rows.float() * scale,
            self.median * scale,
            torch.Generator().manual_seed(stable_seed("init", config.seed)),
        )
        for target, value in zip(cell.weights.tensors(), weights.tensors(), strict=True):
            target.copy_(value)


def describe_run(
    plan: TrainPlan, cells: dict[str, Cell], streams: dict[StreamKey, TrainingStream], kernel: Choice
) -> str:
    """One line about size, memory and kernel, before the first step."""
    mixed = sum(stream.mixed_bytes for stream in streams.values())
    # Weights, gradients and Adam's two moments, 4 bytes each.
    weights = sum(16 * sum(tensor.numel() for tensor in cell.weights.tensors()) for cell in cells.values())
    return (
        f"{len(cells)} SAE{'s' if len(cells) > 1 else ''}, {plan.steps:,} steps of {plan.batch_size:,} rows; "
        f"memory: {mixed / 2**20:,.0f} MiB of mixed rows, {weights / 2**20:,.0f} MiB of weights and Adam; "
        f"kernel {kernel.name} ({kernel.reason})"
    )

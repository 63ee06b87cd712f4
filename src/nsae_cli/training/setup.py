"""From a plan to cells that can take a step: profiles of the hooks, streams of batches, initial weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nsae_cli import catalogue
from nsae_cli.errors import Interrupted
from nsae_cli.kernels.select import Choice
from nsae_cli.kernels.types import Weights, in_memory_order
from nsae_cli.metrics.groups import SINKS
from nsae_cli.reporter import Reporter
from nsae_cli.sae.init import geometric_median, initialise
from nsae_cli.store.batches import HookRows, stable_seed
from nsae_cli.store.profile import HookProfile
from nsae_cli.training.cell import Cell, make_objective
from nsae_cli.training.l0_control import sample_rows
from nsae_cli.training.options import CellConfig
from nsae_cli.training.parallel.ranks import ALONE, Ranks
from nsae_cli.training.plan import TrainPlan
from nsae_cli.training.source import StreamKey, TrainingStream

#: Held-out rows of a hook, at most, that stay in memory for the control of L0.
COMPARED_ROWS = 32_768

#: Rows from which the initialisation takes b_dec: the first that the cell will be trained on.
INIT_ROWS = 8192


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
        if profile.zero_rows:
            reporter.warn(f"{hook}: {profile.zero_rows:,} rows are zero; they weigh nothing in the loss and in metrics")
    return profiles


def hooks_by_stream(plan: TrainPlan, wave: Sequence[str]) -> dict[StreamKey, list[str]]:
    """The streams that cells need and the hooks that each has to bring."""
    found: dict[StreamKey, dict[str, None]] = {}
    for config in (plan.configs[name] for name in wave):
        found.setdefault(stream_key(config), {})[config.hook] = None
    return {key: list(hooks) for key, hooks in found.items()}


def make_streams(
    plan: TrainPlan, wave: Sequence[str], profiles: dict[str, HookProfile]
) -> dict[StreamKey, TrainingStream]:
    """One stream of batches for all cells of a wave that see the same rows."""
    streams: dict[StreamKey, TrainingStream] = {}
    for (seed, dropped), hooks in hooks_by_stream(plan, wave).items():
        for hook in hooks:
            if dropped and profiles[hook].training_sinks == profiles[hook].training_rows:
                raise catalogue.NO_ROWS(
                    f"--sinks drop: every training row of {plan.source.name} at {hook} is a sink; use --sinks keep"
                )
        streams[seed, dropped] = plan.source.stream(
            [profiles[hook] for hook in hooks], plan.batch_size, seed, dropped is not None
        )
    return streams


def make_cells(
    plan: TrainPlan, wave: Sequence[str], profiles: dict[str, HookProfile], kernel: Choice, ranks: Ranks = ALONE
) -> dict[str, Cell]:
    """The cells of a wave with room for their weights, which `initialise_cells` or a checkpoint fills."""
    cells = {}
    d_in = plan.source.d_in
    for name in wave:
        config = plan.configs[name]
        features = config.d_sae // ranks.features.size
        shapes = ((d_in, features), (features,), (features, d_in), (d_in,))
        weights = Weights(*(torch.zeros(shape, device=kernel.device) for shape in shapes))
        profile = profiles[config.hook]
        cells[name] = Cell(config, make_objective(config, profile, d_in), weights, kernel, profile.norm_scale, ranks)
    return cells


def initialise_cells(cells: dict[str, Cell], streams: dict[StreamKey, TrainingStream]) -> None:
    """Gives cells their weights of step 0, from the first rows that each will be trained on."""
    for key, stream in streams.items():
        first = stream.first_rows(INIT_ROWS)
        starts = {hook: _Start.of(rows) for hook, rows in first.items()}
        for cell in cells.values():
            if stream_key(cell.config) == key:
                starts[cell.config.hook].initialise(cell)


class HeldOutSample:
    """Held-out rows on the training device, evenly spread over all of them; read where first needed, then kept.

    Args:
        plan: has the source.
        profiles: of the hooks.
        device: of training.
        ranks: the processes that train together: each reads them all, and they stop together.
    """

    def __init__(
        self, plan: TrainPlan, profiles: dict[str, HookProfile], device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self._source, self._profiles, self._device, self._ranks = plan.source, profiles, device, ranks
        self._rows: dict[str, HookRows | None] = {}

    def of(self, hook: str) -> HookRows | None:
        """Rows of a hook; None if none are held out.

        Raises:
            Interrupted: a signal asked to stop while they were read.
        """
        if hook not in self._rows:
            profile = self._profiles[hook]
            held_out = self._source.profiled_rows - profile.training_rows
            rows = sample_rows(self._read(profile), held_out, COMPARED_ROWS)
            self._rows[hook] = None if rows is None else rows.to(self._device)
        return self._rows[hook]

    def _read(self, profile: HookProfile) -> Iterator[HookRows]:
        for rows, _ in self._source.held_out_rows(profile, INIT_ROWS):
            if (signum := self._ranks.stop_requested()) is not None:
                raise Interrupted(signum, "stopped while reading held-out rows")
            yield rows


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
        weights = weights.features(cell.ranks.own_features(config.d_sae))
        for target, value in zip(cell.weights.tensors(), weights.tensors(), strict=True):
            target.copy_(value)
            cell.ranks.data.spread_(in_memory_order(target))

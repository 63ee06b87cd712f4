"""From a plan to cells that can take a step: profiles of the hooks, streams of batches, initial weights."""

from __future__ import annotations

import torch

from nsae_cli.kernels.select import Choice
from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.groups import SINKS
from nsae_cli.reporter import Reporter
from nsae_cli.sae.init import initialise
from nsae_cli.store.batches import BatchStream, HookRows, stable_seed
from nsae_cli.store.profile import HookProfile, profile_hook
from nsae_cli.training.cell import Cell, make_objective
from nsae_cli.training.options import CellConfig
from nsae_cli.training.plan import TrainPlan

#: Rows from which the initialisation takes b_dec and its one factor: the first that the cell will be trained on.
INIT_ROWS = 8192

#: Cells with equal keys see the same rows: same seed and, where sinks are dropped, the same hook.
StreamKey = tuple[int, str | None]


def stream_key(config: CellConfig) -> StreamKey:
    """Which stream of batches a cell reads."""
    return config.seed, config.hook if config.sinks == "drop" else None


def profile_hooks(plan: TrainPlan, reporter: Reporter) -> dict[str, HookProfile]:
    """Norms, sinks and bins of every hook of the plan."""
    if not plan.store.has_positions:
        reporter.warn(f"{plan.store.name} has no positions: sink rule 1 is off, blocks of 128 rows stand for contexts")
    profiles = {}
    for hook in plan.hooks:
        profiles[hook] = profile = profile_hook(plan.store, hook, plan.contexts)
        reporter.note(
            f"{hook}: {plan.store.manifest.rows:,} rows, {profile.training_rows:,} to train on, "
            f"{profile.sink_counts.to_json()['total']:,} sinks, typical norm {profile.norm_scale:.4g}"
        )
    return profiles


def make_streams(plan: TrainPlan, profiles: dict[str, HookProfile]) -> dict[StreamKey, BatchStream]:
    """One stream of batches for all cells that see the same rows."""
    streams: dict[StreamKey, BatchStream] = {}
    for config in plan.configs.values():
        key = stream_key(config)
        hooks = dict.fromkeys(other.hook for other in plan.configs.values() if stream_key(other) == key)
        streams[key] = BatchStream(
            store=plan.store,
            profiles=[profiles[hook] for hook in hooks],
            contexts=plan.contexts,
            batch_size=config.batch_size,
            seed=config.seed,
            buffer_rows=config.buffer,
            drop_sinks=config.sinks == "drop",
        )
    return streams


def new_cell(
    config: CellConfig, profile: HookProfile, stream: BatchStream, device: torch.device, kernel: Choice
) -> Cell:
    """A cell at step 0."""
    objective = make_objective(config, profile, stream.store.manifest.d_in)
    first = first_rows(stream, config.hook)
    live = first.select((~first.zero).nonzero().squeeze(1))
    weights = initialise(
        config.act,
        config.decoder,
        config.d_sae,
        live.x.float() * objective.input_scale,
        live.group != SINKS,
        torch.Generator().manual_seed(stable_seed("init", config.seed)),
    )
    return Cell(config, objective, Weights(*(tensor.to(device) for tensor in weights.tensors())), kernel)


def first_rows(stream: BatchStream, hook: str) -> HookRows:
    """The first rows of the stream, at most INIT_ROWS and at most one epoch."""
    wanted = min(INIT_ROWS, stream.rows_per_epoch)
    parts: list[HookRows] = []
    for batch in stream.batches(0):
        parts.append(batch[hook])
        if sum(len(part.norm) for part in parts) >= wanted:
            break
    return HookRows.cat(parts).select(slice(0, wanted))


def describe_run(plan: TrainPlan, cells: dict[str, Cell], streams: dict[StreamKey, BatchStream], kernel: Choice) -> str:
    """One line about size, memory and kernel, before the first step."""
    manifest = plan.store.manifest
    window = min(next(iter(plan.configs.values())).buffer, manifest.rows)
    hooks = sum(len(stream.profiles) for stream in streams.values())
    mixed = hooks * window * manifest.d_in * manifest.torch_dtype.itemsize
    # Weights, gradients and Adam's two moments, 4 bytes each.
    weights = sum(16 * sum(tensor.numel() for tensor in cell.weights.tensors()) for cell in cells.values())
    return (
        f"{len(cells)} SAE{'s' if len(cells) > 1 else ''}, {plan.steps:,} steps of {plan.batch_size:,} rows; "
        f"memory: {mixed / 2**20:,.0f} MiB of mixed rows, {weights / 2**20:,.0f} MiB of weights and Adam; "
        f"kernel {kernel.name} ({kernel.reason})"
    )

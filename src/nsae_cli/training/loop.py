"""`train()`: from options to finished SAEs. Reads top to bottom: plan → cells → steps → finish."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import nsae_cli
from nsae_cli import interrupt
from nsae_cli.device import choose_device
from nsae_cli.errors import Interrupted, ResourceError, UsageError
from nsae_cli.kernels.select import Choice, choose_step
from nsae_cli.metrics.groups import SINKS
from nsae_cli.reporter import Reporter, Task
from nsae_cli.sae.init import initialise
from nsae_cli.sae.objective import Objective
from nsae_cli.store import commit
from nsae_cli.store.batches import Batch, BatchStream, HookRows, held_out_rows, stable_seed
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import HookProfile, profile_hook
from nsae_cli.store.sae_folder import FORMAT_VERSION, RUN, write_run, write_sae
from nsae_cli.store.shards import ActivationStore, describe_changes
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name, config_hash, log_timing
from nsae_cli.training.cell import Cell, StepLog, make_objective
from nsae_cli.training.checkpoint import Checkpoint, Checkpoints
from nsae_cli.training.evaluate import evaluate
from nsae_cli.training.options import CellConfig, TrainOptions, expand_cells, layer_of
from nsae_cli.training.records import MetricsLog, log_interval, step_record

#: Rows of the first batches from which the initialisation takes b_dec and its one factor.
INIT_ROWS = 8192

# L1 has stopped measuring sparsity when acts are this small and decoder rows this long, in scaled units.
_GAMED_MEAN_ACT, _GAMED_DECODER_NORM = 0.1, 5.0


@dataclass
class TrainResult:
    """What `train()` made: the artifacts, their run.json, and whether they were there already."""

    name: str
    artifacts: list[Artifact]
    runs: list[dict[str, Any]]
    already_complete: bool


@dataclass
class _Run:
    """One training run: its cells and where they go."""

    store: ActivationStore
    folder: Path
    configs: dict[str, CellConfig]
    device: torch.device
    reporter: Reporter
    checkpoint_every: str | int
    contexts: Contexts = field(init=False)
    profiles: dict[str, HookProfile] = field(init=False)

    def cell_folder(self, cell: str) -> Path:
        return self.folder if len(self.configs) == 1 else self.folder / cell

    @property
    def steps(self) -> int:
        return next(iter(self.configs.values())).steps


def train(
    options: TrainOptions, store: ActivationStore, workspace: Workspace, name: str | None, reporter: Reporter
) -> TrainResult:
    """Trains every SAE of the grid on one pass of shared batches and saves them.

    Finished runs are recognised and left alone; an interrupted one goes on from its last checkpoint.

    Args:
        options: as given; lists span a grid.
        store: the activations.
        workspace: where the SAEs go, as ``saes/NAME`` or ``saes/NAME/CELL``.
        name: NAME, or None for the default.

    Raises:
        UsageError: refused or impossible options, or NAME exists with other options.
        NumericalError: loss or gradients are not finite.
        Interrupted: a signal; a checkpoint was written.
    """
    contexts = Contexts(store)
    epoch_rows = sum(int((~contexts.held_out(shard)).sum()) for shard in range(len(store.manifest.shards)))
    hooks = select_hooks(options.layers, store)
    configs = expand_cells(options, hooks, store.manifest.d_in, epoch_rows)
    name = check_name(name) if name else default_name(store, configs)
    folder = workspace.folder(Kind.SAE, name)
    device, why = choose_device(options.device)
    run = _Run(store, folder, configs, device, reporter, options.checkpoint_every)
    run.contexts = contexts
    if (finished := _already_complete(run, name)) is not None:
        return finished
    _refuse_other_run(run)
    reporter.note(f"device {device.type}: {why}")
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
    run.profiles = {hook: _profile(run, hook) for hook in hooks}
    try:
        return _train(run, name)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of memory on {device.type} while training; lower --batch-size or --d-sae, or train fewer cells at once"
        ) from error
    finally:
        if options.deterministic:
            torch.use_deterministic_algorithms(False)


def select_hooks(layers: str | int | list[int | str] | None, store: ActivationStore) -> list[str]:
    """The stored hooks that ``--layers`` means; all of them without it.

    Raises:
        UsageError: a layer that the store does not hold.
    """
    stored = {layer_of(hook): hook for hook in store.manifest.hooks}
    if layers is None or layers == "all":
        return list(store.manifest.hooks)
    wanted: list[int] = []
    text = ",".join(map(str, layers)) if isinstance(layers, list) else str(layers)
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"--layers {text}: expected all, or numbers such as 6, 0,3 or 0-3")
        wanted += range(int(first), int(last or first) + 1)
    missing = [layer for layer in wanted if layer not in stored]
    if missing or not wanted:
        held = ", ".join(str(layer) for layer in stored)
        raise UsageError(f"--layers {text}: {store.name} holds layers {held}; collect others with `nsae collect`")
    return [stored[layer] for layer in dict.fromkeys(wanted)]


def default_name(store: ActivationStore, configs: Mapping[str, CellConfig]) -> str:
    """``{store}-L6-relu-none-HASH`` for one SAE, ``{store}-grid-HASH`` for several."""
    identity = {"store": store.manifest_sha256, "cells": {key: value.model_dump() for key, value in configs.items()}}
    digest = config_hash(identity)
    if len(configs) > 1:
        return f"{store.name}-grid-{digest}"
    cell, config = next(iter(configs.items()))
    return f"{store.name}-{cell}-{config.act}-{config.l2_norm}-{digest}"


def _identity(run: _Run) -> dict[str, Any]:
    return {
        "activations": {"name": run.store.name, "manifest_sha256": run.store.manifest_sha256},
        "cells": {cell: config.model_dump() for cell, config in run.configs.items()},
    }


def _already_complete(run: _Run, name: str) -> TrainResult | None:
    folders = [run.cell_folder(cell) for cell in run.configs]
    if not all((folder / RUN).is_file() for folder in folders):
        return None
    runs = [commit.read_json(folder / RUN) for folder in folders]
    identity = _identity(run)
    for cell, found in zip(run.configs, runs, strict=True):
        if found.get("config") != identity["cells"][cell] or found["inputs"]["activations"] != identity["activations"]:
            _refuse_changes(name, found.get("config", {}), found["inputs"]["activations"], identity, cell)
    return TrainResult(name, _artifacts(run, name), runs, already_complete=True)


def _refuse_other_run(run: _Run) -> None:
    """Refuses a folder that holds another finished or unfinished run."""
    identity = _identity(run)
    begun = Checkpoints(run.folder / "checkpoints").configs()
    if begun is not None and begun != identity:
        known = set(begun.get("cells", {})) & set(run.configs)
        cell = sorted(known)[0] if known else None
        found = begun.get("cells", {}).get(cell, {}) if cell else {}
        _refuse_changes(run.folder.name, found, begun.get("activations"), identity, cell)
    finished = [path.parent for path in (*run.folder.glob(RUN), *run.folder.glob(f"*/{RUN}"))]
    ours = {run.cell_folder(cell) for cell in run.configs}
    if any(folder not in ours for folder in finished):
        raise UsageError(f"--name {run.folder.name} holds SAEs of another grid; choose another --name")


def _refuse_changes(name: str, found: dict[str, Any], inputs: Any, identity: dict[str, Any], cell: str | None) -> None:
    if inputs != identity["activations"]:
        old = inputs.get("name") if isinstance(inputs, dict) else inputs
        raise UsageError(
            f"--name {name} was trained on the activations {old!r}, now given {identity['activations']['name']!r} "
            f"(or the store has changed); choose another --name"
        )
    changes = describe_changes(found, identity["cells"][cell]) if cell and found else "another grid"
    raise UsageError(f"--name {name} exists with other options ({changes}); choose another --name")


def _profile(run: _Run, hook: str) -> HookProfile:
    profile = profile_hook(run.store, hook, run.contexts)
    sinks = profile.sink_counts.to_json()
    run.reporter.note(
        f"{hook}: {run.store.manifest.rows:,} rows, {profile.training_rows:,} to train on, "
        f"{sinks['total']:,} sinks, typical norm {profile.norm_scale:.4g}"
    )
    if not run.store.has_positions:
        run.reporter.warn(f"{run.store.name} has no positions: sink rule 1 is off, blocks of 128 rows stand for contexts")
    return profile


def _train(run: _Run, name: str) -> TrainResult:
    checkpoints = Checkpoints(run.folder / "checkpoints")
    checkpoints.begin(_identity(run))
    kernel = choose_step("auto", run.device)
    streams = _streams(run)
    cells = {cell: _new_cell(run, config, streams[_stream_key(config)]) for cell, config in run.configs.items()}
    _report_plan(run, cells, streams, kernel)
    checkpoint = checkpoints.latest(run.reporter)
    first_step = _restore(run, cells, checkpoint)
    logs = {}
    for cell in cells:
        commit.make_folder(run.cell_folder(cell))
        keep = checkpoint.metrics_bytes.get(cell, 0) if checkpoint else 0
        logs[cell] = MetricsLog(run.cell_folder(cell) / "metrics.jsonl", keep)
    started = time.monotonic()
    _steps(run, cells, streams, logs, checkpoints, first_step)
    seconds = time.monotonic() - started
    rows = (run.steps - first_step) * next(iter(run.configs.values())).batch_size
    log_timing(run.folder, "trained", steps=run.steps - first_step, seconds=round(seconds, 3), rows=rows)
    runs = [_finish_cell(run, key, cell) for key, cell in cells.items()]
    if len(cells) > 1:
        commit.write_json(run.folder / "group.json", {"format_version": FORMAT_VERSION, **_identity(run)})
    checkpoints.remove()
    return TrainResult(name, _artifacts(run, name), runs, already_complete=False)


def _artifacts(run: _Run, name: str) -> list[Artifact]:
    single = len(run.configs) == 1
    return [Artifact(Kind.SAE, name if single else f"{name}/{c}", run.cell_folder(c)) for c in run.configs]


_StreamKey = tuple[int, str | None]


def _stream_key(config: CellConfig) -> _StreamKey:
    """Cells with equal keys see the same rows: same seed, and with dropped sinks the same hook."""
    return config.seed, config.hook if config.sinks == "drop" else None


def _streams(run: _Run) -> dict[_StreamKey, BatchStream]:
    streams: dict[_StreamKey, BatchStream] = {}
    for config in run.configs.values():
        key = _stream_key(config)
        if key in streams:
            continue
        hooks = {c.hook: None for c in run.configs.values() if _stream_key(c) == key}
        streams[key] = BatchStream(
            store=run.store,
            profiles=[run.profiles[hook] for hook in hooks],
            contexts=run.contexts,
            batch_size=config.batch_size,
            seed=config.seed,
            buffer_rows=config.buffer,
            drop_sinks=config.sinks == "drop",
        )
        if streams[key].rows_per_epoch < 1:
            raise UsageError(f"{run.store.name} has no rows to train on; collect more with `nsae collect --tokens`")
    return streams


def _new_cell(run: _Run, config: CellConfig, stream: BatchStream) -> Cell:
    profile = run.profiles[config.hook]
    objective = make_objective(config, profile, run.store.manifest.d_in)
    first = _first_rows(stream, config.hook)
    x = first.x.float() * objective.input_scale
    generator = torch.Generator().manual_seed(stable_seed("init", config.seed))
    live = ~first.zero
    non_sinks = first.group[live] != SINKS
    weights = initialise(config.act, config.decoder, config.d_sae, x[live], non_sinks, generator)
    on_device = type(weights)(*(tensor.to(run.device) for tensor in weights.tensors()))
    return Cell(config, objective, on_device, choose_step("auto", run.device))


def _first_rows(stream: BatchStream, hook: str) -> HookRows:
    wanted = min(INIT_ROWS, stream.rows_per_epoch)
    parts: list[HookRows] = []
    for batch in stream.batches(0):
        parts.append(batch[hook])
        if sum(len(part.norm) for part in parts) >= wanted:
            break
    return HookRows.cat(parts).select(slice(0, wanted))


def _restore(run: _Run, cells: dict[str, Cell], checkpoint: Checkpoint | None) -> int:
    if checkpoint is None:
        return 0
    for key, cell in cells.items():
        cell.load_state(checkpoint.cells[key])
    run.reporter.note(f"going on from the checkpoint at step {checkpoint.step:,}")
    return checkpoint.step


def _steps(
    run: _Run,
    cells: dict[str, Cell],
    streams: dict[_StreamKey, BatchStream],
    logs: dict[str, MetricsLog],
    checkpoints: Checkpoints,
    first_step: int,
) -> None:
    def save(step: int) -> None:
        checkpoints.save(
            step, {key: cell.state() for key, cell in cells.items()}, {key: log.size() for key, log in logs.items()}
        )

    batches = {key: stream.batches(first_step) for key, stream in streams.items()}
    interval = log_interval(run.steps)
    due = _CheckpointClock(run.checkpoint_every)
    batch_size = next(iter(run.configs.values())).batch_size
    with run.reporter.task("training", (run.steps - first_step) * batch_size, "rows") as task:
        for step in range(first_step, run.steps):
            if (signum := interrupt.stop_requested()) is not None:
                save(step)
                raise Interrupted(
                    signum, f"stopped at step {step:,} of {run.steps:,}, checkpoint saved; run the same command to go on"
                )
            if step > first_step and due.now(step):
                save(step)
            log_now = (step + 1) % interval == 0 or step + 1 == run.steps
            _one_step(run, cells, batches, logs, step, log_now, task)
            task.advance(batch_size)


def _one_step(
    run: _Run,
    cells: dict[str, Cell],
    batches: dict[_StreamKey, Iterator[Batch]],
    logs: dict[str, MetricsLog],
    step: int,
    log_now: bool,
    task: Task,
) -> None:
    taken = {key: {hook: _to(rows, run.device) for hook, rows in next(b).items()} for key, b in batches.items()}
    for key, cell in cells.items():
        rows = taken[_stream_key(cell.config)][cell.config.hook]
        log: StepLog = cell.train_step(rows, step)
        if log_now:
            record = step_record(cell, rows, log, step)
            logs[key].append(record)
            l0 = record["l0_ns"] if record["l0_ns"] is not None else record["l0_all"]
            task.advance(0, loss=f"{record['loss']:.4g}", l0=f"{l0 or 0:.1f}")


def _to(rows: HookRows, device: torch.device) -> HookRows:
    return HookRows(rows.x.to(device), rows.norm.to(device), rows.group.to(device), rows.zero.to(device))


class _CheckpointClock:
    """Says when a checkpoint is due: every N steps, or every so many seconds."""

    def __init__(self, every: str | int) -> None:
        self._steps = every if isinstance(every, int) else None
        self._seconds = None if isinstance(every, int) else float(every.removesuffix("s"))
        self._last = time.monotonic()

    def now(self, step: int) -> bool:
        if self._steps is not None:
            return step % self._steps == 0
        assert self._seconds is not None
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True


def _report_plan(run: _Run, cells: dict[str, Cell], streams: dict[_StreamKey, BatchStream], kernel: Choice) -> None:
    manifest = run.store.manifest
    config = next(iter(run.configs.values()))
    window = min(config.buffer, manifest.rows)
    row_bytes = manifest.d_in * manifest.torch_dtype.itemsize
    mixing = sum(len(stream.profiles) for stream in streams.values()) * window * row_bytes
    weights = sum(sum(t.numel() for t in cell.weights.tensors()) * 16 for cell in cells.values())
    run.reporter.note(
        f"{len(cells)} SAE{'s' if len(cells) > 1 else ''}, {run.steps:,} steps of {config.batch_size:,} rows; "
        f"memory: {mixing / 2**20:,.0f} MiB of mixed rows, {weights / 2**20:,.0f} MiB of weights and Adam; "
        f"kernel {kernel.name} ({kernel.reason})"
    )


def _finish_cell(run: _Run, key: str, cell: Cell) -> dict[str, Any]:
    config, store, profile = cell.config, run.store, run.profiles[cell.config.hook]
    folder = run.cell_folder(key)
    sae = cell.saved_sae()
    with run.reporter.task(f"evaluating {key}", None, "rows"):
        metrics, density = evaluate(
            sae,
            cell.objective,
            config.decoder == "unit",
            lambda batch: held_out_rows(store, profile, run.contexts, batch),
        )
    if not metrics["all"]["tokens"]:
        run.reporter.warn(f"{store.name} has fewer than 20 contexts: no rows are held out, so {key} has no metrics")
    write_sae(folder, sae, _sae_lens_metadata(store, config.hook))
    commit.write_tensors(folder / "features.safetensors", {"density": density.float()})
    document = _run_document(run, cell, metrics)
    document["weights_sha256"] = {name: commit.tensor_sha256(tensor) for name, tensor in sae.weights.named().items()}
    warning = gamed_sparsity(cell.objective, metrics, cell)
    document["warnings"] = [warning] if warning else []
    if warning:
        run.reporter.warn(f"{key}: {warning}")
    write_run(folder, document)
    return document


def gamed_sparsity(objective: Objective, metrics: dict[str, Any], cell: Cell) -> str | None:
    """A sentence if L1 no longer measures sparsity (mean act < .1 and max ‖d_i‖ > 5 in scaled units), else None."""
    if objective.sparsity != "l1" or not metrics["ns"]["l0"]:
        return None
    scale = objective.input_scale if objective.nonlinearity.homogeneous else 1.0
    mean_act = scale * metrics["ns"]["l1"] / metrics["ns"]["l0"]
    longest = float(cell.weights.W_dec.norm(dim=1).max())
    if mean_act >= _GAMED_MEAN_ACT or longest <= _GAMED_DECODER_NORM:
        return None
    return (
        f"L1 no longer measures sparsity: mean act {mean_act:.2g}, longest decoder row {longest:.2g} (scaled units); "
        "use --noise 0.1, --sparsity l1-decoder-norm or --decoder bounded"
    )


def _sae_lens_metadata(store: ActivationStore, hook: str) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "model_name": manifest.model,
        "hook_name": hook,
        "context_size": manifest.context_size,
        "dataset_path": (manifest.corpus or {}).get("name"),
        "prepend_bos": manifest.bos,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }


def _run_document(run: _Run, cell: Cell, metrics: dict[str, Any]) -> dict[str, Any]:
    config, profile, manifest = cell.config, run.profiles[cell.config.hook], run.store.manifest
    thresholds = profile.thresholds
    return {
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(),
        "inputs": {"activations": _identity(run)["activations"]},
        "versions": {"nsae": nsae_cli.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": manifest.model,
        "context_size": manifest.context_size,
        "hook": config.hook,
        "d_in": manifest.d_in,
        "d_sae": config.d_sae,
        "alpha": config.alpha,
        "beta": cell.objective.beta,
        "input_scale": cell.objective.input_scale,
        "norm_scale": profile.norm_scale,
        "edges": None if profile.edges is None else profile.edges.tolist(),
        "sinks": {
            **profile.sink_counts.to_json(),
            "median": thresholds.median,
            "median_position0": thresholds.median_position0,
            "median_elsewhere": thresholds.median_elsewhere,
        },
        "counts": {
            "tokens": config.steps * config.batch_size,
            "steps": config.steps,
            "zero_rows": cell.zero_rows,
        },
        "metrics": metrics,
    }

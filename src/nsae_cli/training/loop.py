"""`train()`: plan → cells → steps → saved SAEs, and the loop over steps."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli import interrupt
from nsae_cli.device import choose_device, one_thread_if_small
from nsae_cli.errors import Interrupted, ResourceError
from nsae_cli.kernels.select import Choice, choose
from nsae_cli.reporter import Reporter, Task
from nsae_cli.store import commit
from nsae_cli.store.batches import Batch
from nsae_cli.store.sae_folder import FORMAT_VERSION
from nsae_cli.store.workspace import Artifact, Workspace, log_timing
from nsae_cli.training.cell import Cell
from nsae_cli.training.cell_pool import CellPool
from nsae_cli.training.checkpoint import Checkpoint
from nsae_cli.training.finish import finish_cell
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.plan import GROUP, TrainPlan, find_finished, make_plan
from nsae_cli.training.records import MetricsLog, log_interval, step_record
from nsae_cli.training.setup import (
    StreamKey,
    describe_run,
    initialise_cells,
    make_cells,
    make_streams,
    profile_hooks,
    stream_key,
)
from nsae_cli.training.source import TrainingSource, TrainingStream


@dataclass
class TrainResult:
    """What `train()` made: the artifacts, their run.json, and whether they were there already."""

    name: str
    artifacts: list[Artifact]
    runs: list[dict[str, Any]]
    already_complete: bool


def train(
    options: TrainOptions, source: TrainingSource, workspace: Workspace, name: str | None, reporter: Reporter
) -> TrainResult:
    """Trains every SAE of the grid on one pass of shared batches and saves them.

    Finished runs are recognised and left alone; an interrupted one goes on from its last checkpoint.

    Args:
        options: as given; lists span a grid.
        source: where the rows come from; made from the same options.
        workspace: where the SAEs go, as ``saes/NAME`` or ``saes/NAME/CELL``.
        name: NAME, or None for the default.

    Raises:
        UsageError: refused or impossible options, or NAME exists with other options.
        ResourceError: the device is missing or its memory is too small.
        NumericalError: loss or gradients are not finite.
        Interrupted: a signal; a checkpoint was written.
    """
    plan = make_plan(options, source, workspace, name)
    artifacts = [plan.artifact(cell) for cell in plan.configs]
    finished = find_finished(plan)
    if finished.keys() == plan.configs.keys():
        plan.checkpoints.remove()  # left by a run that was killed in its very last moment
        return TrainResult(plan.name, artifacts, [finished[cell] for cell in plan.configs], already_complete=True)
    if options.deterministic:
        # Read by cuBLAS when CUDA starts; without it deterministic products are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device, why = choose_device(options.device)
    kernel = choose(options.kernel, options.precision, device)
    reporter.note(f"device {why}")
    try:
        with (
            _numerics(options.deterministic),
            one_thread_if_small(plan.largest_product, device) as side_by_side,
            CellPool(min(side_by_side, len(plan.configs))) as pool,
        ):
            runs = _run(plan, finished, device, kernel, pool, options.checkpoint_every, reporter)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of memory on {device.type} while training; lower --batch-size or --d-sae or train fewer cells"
        ) from error
    return TrainResult(plan.name, artifacts, runs, already_complete=False)


@contextlib.contextmanager
def _numerics(deterministic: bool) -> Iterator[None]:
    """Training's numerical settings of the process, restored afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    change = deterministic and not before  # asking for what is so already would import torch's compiler (seconds)
    if change:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if change:
            torch.use_deterministic_algorithms(False)


def _run(
    plan: TrainPlan,
    finished: dict[str, dict[str, Any]],
    device: torch.device,
    kernel: Choice,
    pool: CellPool,
    checkpoint_every: str | int,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    plan.checkpoints.begin(plan.identity())
    for folder in (plan.folder, *(plan.cell_folder(cell) for cell in plan.configs)):
        commit.make_folder(folder)
        commit.remove_leftovers(folder)
    profiles = profile_hooks(plan, reporter)
    streams = make_streams(plan, profiles)
    cells = make_cells(plan, profiles, device, kernel)
    reporter.note(describe_run(plan, cells, streams, kernel))
    loop = _Loop(plan, cells, streams, device, pool, _CheckpointClock(checkpoint_every), reporter)
    started = time.monotonic()
    first_step = loop.restore()
    loop.run(first_step)
    rows = (plan.steps - first_step) * plan.batch_size
    log_timing(plan.folder, "trained", rows=rows, seconds=round(time.monotonic() - started, 3))
    if len(cells) > 1:
        commit.write_json(plan.folder / GROUP, {"format_version": FORMAT_VERSION, **plan.identity()})
    with reporter.task("evaluating", len(cells), "SAEs") as task:

        def finish(name: str) -> dict[str, Any]:
            cell = cells[name]
            run = finished.get(name) or finish_cell(plan, name, cell, profiles[cell.config.hook], reporter)
            task.advance(1)
            return run

        runs = pool.map(finish, cells)
    plan.checkpoints.remove()
    return runs


class _Loop:
    """Steps all cells in lockstep, logs, and saves checkpoints."""

    def __init__(
        self,
        plan: TrainPlan,
        cells: dict[str, Cell],
        streams: dict[StreamKey, TrainingStream],
        device: torch.device,
        pool: CellPool,
        clock: _CheckpointClock,
        reporter: Reporter,
    ) -> None:
        self._plan, self._cells, self._streams = plan, cells, streams
        self._device, self._pool, self._clock, self._reporter = device, pool, clock, reporter
        self._logs: dict[str, MetricsLog] = {}
        #: For each cell the state of its stream before the step in hand: one that is stopped may have run ahead of it.
        self._stream_states: dict[str, dict[str, torch.Tensor]] = {}

    def restore(self) -> int:
        """Loads the last intact checkpoint, else initialises the cells; returns the number of steps done."""
        checkpoint: Checkpoint | None = self._plan.checkpoints.latest(self._reporter)
        if checkpoint is None:
            initialise_cells(self._cells, self._streams)
        for name, cell in self._cells.items():
            if checkpoint is not None:
                cell.load_state(checkpoint.cells[name])
                self._streams[stream_key(cell.config)].load_state(checkpoint.cells[name])
            content = b"" if checkpoint is None else checkpoint.logs[name]
            self._logs[name] = MetricsLog(self._plan.cell_folder(name) / "metrics.jsonl", content)
        self._note_stream_states()
        if checkpoint is None:
            return 0
        self._reporter.note(f"going on from the checkpoint at step {checkpoint.step:,}")
        return checkpoint.step

    def run(self, first_step: int) -> None:
        """Takes the steps from `first_step` to the end and saves a checkpoint there: the evaluation may be stopped.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint of the current step was written.
        """
        plan = self._plan
        batches = {key: stream.batches(first_step) for key, stream in self._streams.items()}
        interval = log_interval(plan.steps)
        with self._reporter.task("training", (plan.steps - first_step) * plan.batch_size, "rows") as task:
            for step in range(first_step, plan.steps):
                if (signum := interrupt.stop_requested()) is not None:
                    raise self._stopped(step, signum)
                if step > first_step and self._clock.due(step):
                    self._save(step)
                try:
                    taken = self._take(batches)
                except Interrupted as stopped:
                    raise self._stopped(step, stopped.signum) from stopped
                log_now = (step + 1) % interval == 0 or step + 1 == plan.steps
                self._step(taken, step, log_now, task)
                task.advance(plan.batch_size)
        self._save(plan.steps)

    def _stopped(self, step: int, signum: int) -> Interrupted:
        """Saves a checkpoint of `step`; returns what is to be raised."""
        self._save(step)
        steps = f"stopped at step {step:,} of {self._plan.steps:,}"
        return Interrupted(signum, f"{steps}, checkpoint saved; run the same command to go on")

    def _take(self, batches: dict[StreamKey, Iterator[Batch]]) -> dict[StreamKey, Batch]:
        """The next batch of every stream, on the training device."""
        taken = {
            key: {hook: rows.to(self._device) for hook, rows in next(stream).items()} for key, stream in batches.items()
        }
        self._note_stream_states()
        return taken

    def _note_stream_states(self) -> None:
        self._stream_states = {
            name: self._streams[stream_key(cell.config)].state() for name, cell in self._cells.items()
        }

    def _step(self, taken: dict[StreamKey, Batch], step: int, log_now: bool, task: Task) -> None:
        def advance(name: str) -> dict[str, Any] | None:
            cell = self._cells[name]
            rows = taken[stream_key(cell.config)][cell.config.hook]
            log = cell.train_step(rows, step)
            if not log_now:
                return None
            record = step_record(cell, rows, log, step)
            self._logs[name].append(record)
            return record

        records = self._pool.map(advance, self._cells)
        first = records[0]
        if first is not None:
            # One cell stands for all on the progress line: cells of a grid have losses that do not compare.
            label = "" if len(records) == 1 else f" of {next(iter(self._cells))}"
            task.advance(0, loss=f"{first['loss']:.4g}", l0=f"{first['l0_all'] or 0:.1f}{label}")

    def _save(self, step: int) -> None:
        self._plan.checkpoints.save(
            step,
            {name: cell.state() | self._stream_states[name] for name, cell in self._cells.items()},
            {name: log.content() for name, log in self._logs.items()},
        )


class _CheckpointClock:
    """Says when a checkpoint is due: every N steps, or every so many seconds."""

    def __init__(self, every: str | int) -> None:
        self._steps = every if isinstance(every, int) else None
        self._seconds = None if isinstance(every, int) else float(every.removesuffix("s"))
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save before `step`."""
        if self._seconds is None:
            return self._steps is not None and step % self._steps == 0
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True

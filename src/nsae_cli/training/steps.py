"""The loop over steps: all cells of a wave in lockstep on the same batches, logs and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import Interrupted, NumericalError
from nsae_cli.reporter import Reporter, Task
from nsae_cli.store.batches import Batch, HookRows
from nsae_cli.training.cell import Cell
from nsae_cli.training.cell_pool import CellPool
from nsae_cli.training.checkpoint import Checkpoint, CheckpointWriter
from nsae_cli.training.l0_control import is_compared, rows_to_compare
from nsae_cli.training.non_finite import explain
from nsae_cli.training.plan import TrainPlan
from nsae_cli.training.probe import CellProbe
from nsae_cli.training.records import MetricsLog, step_record
from nsae_cli.training.schedule import is_logged
from nsae_cli.training.setup import HeldOutSample, initialise_cells, stream_key
from nsae_cli.training.source import StreamKey, TrainingStream
from nsae_cli.training.trackers import Trackers


class StepLoop:
    """Steps all cells in lockstep, logs, and saves checkpoints."""

    def __init__(
        self,
        plan: TrainPlan,
        cells: dict[str, Cell],
        streams: dict[StreamKey, TrainingStream],
        probes: dict[str, CellProbe],
        device: torch.device,
        pool: CellPool,
        checkpoint_every: str | int,
        reporter: Reporter,
        held_out: HeldOutSample,
        trackers: Trackers,
    ) -> None:
        self._held_out, self._trackers = held_out, trackers
        self._plan, self._cells, self._streams, self._probes = plan, cells, streams, probes
        self._device, self._pool, self._reporter = device, pool, reporter
        self._clock = _CheckpointClock(checkpoint_every)
        self._writer = CheckpointWriter(plan.checkpoints)
        self._logs: dict[str, MetricsLog] = {}
        #: For each cell the state of its stream before the step in hand: one that is stopped may have run ahead of it.
        self._stream_states: dict[str, dict[str, torch.Tensor]] = {}

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Loads a checkpoint, or initialises the cells; returns the number of steps done.

        Raises:
            ArtifactError: the checkpoint lacks an item, or holds one of another shape.
        """
        if checkpoint is None:
            initialise_cells(self._cells, self._streams)
        for name, cell in self._cells.items():
            content = b"" if checkpoint is None else self._load(checkpoint, name, cell)
            step = 0 if checkpoint is None else checkpoint.step
            artifact, config = self._plan.artifact(name), cell.config.model_dump()
            tracked = self._trackers.follow(name, artifact.name, config, step, content)
            self._logs[name] = MetricsLog(artifact.path / "metrics.jsonl", content, tracked)
        self._note_stream_states()
        if checkpoint is None:
            return 0
        self._reporter.note(f"going on from the checkpoint at step {checkpoint.step:,}")
        return checkpoint.step

    def _load(self, checkpoint: Checkpoint, name: str, cell: Cell) -> bytes:
        """Loads what a cell goes on from; returns its metrics.jsonl. Nothing is made up for what is missing."""
        try:
            state = checkpoint.cells[name]
            cell.load_state(state)
            self._streams[stream_key(cell.config)].load_state(state)
            self._probes[name].load_state(state)
            return checkpoint.logs[name]
        except (KeyError, RuntimeError, ValueError) as error:
            folder = self._plan.checkpoints.folder / f"step-{checkpoint.step}"
            missing = isinstance(error, KeyError)
            what = f"lacks {error.args[0]}" if missing else f"holds what does not fit ({str(error).splitlines()[0]})"
            raise catalogue.CHECKPOINT_INCOMPLETE(
                f"the checkpoint {folder} {what}; delete it and run the same command again, which goes on from the "
                f"one before"
            ) from error

    def run(self, first_step: int) -> None:
        """Takes the steps from `first_step` to the end and saves a checkpoint there: the evaluation may be stopped.

        Checkpoints on the way are written beside training, from a copy of its state.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint of the current step was written.
            ResourceError: a checkpoint could not be written.
            NumericalError: something is not finite, with the step and the rows; the checkpoints before stay.
        """
        plan = self._plan
        batches = {key: stream.batches(first_step) for key, stream in self._streams.items()}
        rows = (plan.steps - first_step) * plan.batch_size
        with self._writer, self._reporter.task("training", rows, "rows") as task:
            for step in range(first_step, plan.steps):
                if (signum := interrupt.stop_requested()) is not None:
                    raise self._stopped(step, signum)
                self._writer.raise_failure()
                if step > first_step and self._clock.due(step):
                    self._writer.save_later(step, *self._state(step, copy=True))
                try:
                    compared = self._rows_to_compare(step)
                    taken = self._take(batches)
                except Interrupted as stopped:
                    raise self._stopped(step, stopped.signum) from stopped
                self._step(taken, compared, step, task)
                task.advance(plan.batch_size)
            self._writer.save(plan.steps, *self._state(plan.steps, copy=False))
        for name in self._cells:
            self._trackers.leave(name)

    def _stopped(self, step: int, signum: int) -> Interrupted:
        """Saves a checkpoint of `step`; returns what is to be raised."""
        self._writer.save(step, *self._state(step, copy=False))
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

    def _rows_to_compare(self, step: int) -> dict[str, HookRows]:
        """Held-out rows, by hook, for the cells with a target for L0; empty at most steps."""
        steps = self._plan.steps
        if not is_compared(step, steps):
            return {}
        hooks = {cell.config.hook for cell in self._cells.values() if cell.control is not None}
        found = {hook: self._held_out.of(hook) for hook in sorted(hooks)}
        return {hook: rows_to_compare(rows, step, steps) for hook, rows in found.items() if rows is not None}

    def _step(self, taken: dict[StreamKey, Batch], compared: dict[str, HookRows], step: int, task: Task) -> None:
        def advance(name: str) -> dict[str, Any] | None:
            cell = self._cells[name]
            rows = taken[stream_key(cell.config)][cell.config.hook]
            if cell.config.hook in compared:
                cell.look_at_held_out(compared[cell.config.hook])
            probe = self._probes[name].measure(cell, step)
            try:
                log = cell.train_step(rows, step)
            except NumericalError as error:
                stream = self._streams[stream_key(cell.config)]
                self._writer.wait()
                kept = self._plan.checkpoints.steps()
                raise explain(name, rows, step, partial(stream.origin, step), kept) from error
            if not is_logged(step, cell.config.steps, cell.config.probe_every):
                return None
            record = step_record(cell, rows, log, step) | {"probe": probe}
            self._logs[name].append(record)
            return record

        records = self._pool.map(advance, self._cells)
        first = records[0]
        if first is not None:
            # One cell stands for all on the progress line: cells of a grid have losses that do not compare.
            label = "" if len(records) == 1 else f" of {next(iter(self._cells))}"
            task.advance(0, loss=f"{first['loss']:.4g}", l0=f"{first['l0_all'] or 0:.1f}{label}")

    def _state(self, step: int, *, copy: bool) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, bytes]]:
        """By cell what a checkpoint holds, on the CPU, and its metrics.jsonl.

        Args:
            step: steps done.
            copy: in memory of its own; else the next step changes it.

        Raises:
            NumericalError: weights or moments are not finite.
        """
        for cell in self._cells.values():
            cell.refuse_non_finite_state(step)
        states = {
            name: cell.state() | self._stream_states[name] | self._probes[name].state()
            for name, cell in self._cells.items()
        }
        on_cpu = {
            cell: {name: tensor.to("cpu", copy=copy) for name, tensor in state.items()}
            for cell, state in states.items()
        }
        return on_cpu, {name: log.content() for name, log in self._logs.items()}


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

"""`train()`: plan → waves of cells → steps → saved SAEs."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli import catalogue
from nsae_cli.device import choose_device, one_thread_if_small
from nsae_cli.kernels import scratch
from nsae_cli.kernels.select import Choice, choose
from nsae_cli.launch import placement
from nsae_cli.reporter import Reporter, SilentReporter
from nsae_cli.sae.objective import ERROR_TERMS
from nsae_cli.store import commit
from nsae_cli.store.profile import HookProfile
from nsae_cli.store.sae_folder import FORMAT_VERSION
from nsae_cli.store.workspace import Artifact, Workspace, log_timing
from nsae_cli.training.cell_pool import CellPool
from nsae_cli.training.checkpoint import Checkpoint
from nsae_cli.training.environment import changes_of_environment, environment
from nsae_cli.training.finish import finish_cell
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.plan import ENVIRONMENT, GROUP, TRACKERS, TrainPlan, find_finished, make_plan
from nsae_cli.training.probe import make_probes
from nsae_cli.training.setup import HeldOutSample, hooks_by_stream, make_cells, make_streams, profile_hooks
from nsae_cli.training.source import TrainingSource
from nsae_cli.training.steps import StepLoop
from nsae_cli.training.trackers import Trackers
from nsae_cli.training.waves import plan_memory


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
        BusyError: another process is training under this name.
        Interrupted: a signal; a checkpoint was written.
    """
    plan = make_plan(options, source, workspace, name)
    artifacts = [plan.artifact(cell) for cell in plan.configs]
    finished = find_finished(plan)
    if finished.keys() == plan.configs.keys():
        workspace.tidy(plan.folder, reporter, plan.unneeded_files())
        return TrainResult(plan.name, artifacts, [finished[cell] for cell in plan.configs], already_complete=True)
    with workspace.writing(plan.folder, reporter):
        # Looked at again: another process may have trained on just now.
        tracked = options.log_to if placement().rank == 0 else []
        with Trackers(tracked, plan.name, workspace.root, reporter) as trackers:
            runs = _train_unfinished(plan, find_finished(plan), options, trackers, reporter)
    return TrainResult(plan.name, artifacts, runs, already_complete=False)


def _train_unfinished(
    plan: TrainPlan,
    finished: dict[str, dict[str, Any]],
    options: TrainOptions,
    trackers: Trackers,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Trains the cells that are not finished; run.json of all cells, in the plan's order."""
    if options.deterministic:
        # Read by cuBLAS when CUDA starts; without it deterministic products are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device, why = choose_device(options.device)
    distances = {ERROR_TERMS[config.l2_norm][1] for config in plan.configs.values()}
    kernel = choose(options.kernel, options.precision, device, distances)
    reporter.note(f"device {why}")
    try:
        with (
            _numerics(options.deterministic),
            one_thread_if_small(plan.largest_product, device) as side_by_side,
            CellPool(min(side_by_side, len(plan.configs))) as pool,
        ):
            return _Run(plan, kernel, pool, options, trackers, reporter).complete(finished)
    except torch.OutOfMemoryError as error:
        raise catalogue.OUT_OF_MEMORY(
            f"out of memory on {device.type} while training; lower --batch-size or --d-sae or train fewer cells"
        ) from error
    finally:
        scratch.clear()


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


class _Run:
    """Trains what is left of a plan, wave by wave.

    Args:
        plan: the cells and where their rows come from.
        kernel: what they step with, and on which device.
        pool: how they share the processor.
        options: as given.
        trackers: what else follows the training.
        reporter: for remarks and progress.
    """

    def __init__(
        self,
        plan: TrainPlan,
        kernel: Choice,
        pool: CellPool,
        options: TrainOptions,
        trackers: Trackers,
        reporter: Reporter,
    ) -> None:
        self._plan, self._kernel, self._pool, self._trackers = plan, kernel, pool, trackers
        self._options, self._reporter = options, reporter
        self._profiles: dict[str, HookProfile] = {}

    def complete(self, finished: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Trains and saves the cells that are not finished; run.json of all of them, in the plan's order."""
        plan, runs = self._plan, dict(finished)
        self._begin()
        for folder in (plan.folder, *(plan.cell_folder(cell) for cell in plan.configs)):
            commit.make_folder(folder)
            commit.remove_leftovers(folder)
        self._profiles = profile_hooks(plan, self._reporter)
        for number in itertools.count():
            checkpoint = plan.checkpoints.latest(self._reporter)
            left = [cell for cell in plan.configs if cell not in runs]
            if checkpoint is None and not left:
                break
            if number:
                plan.source.prepare(SilentReporter())  # the wave before has used its rows up
            runs |= self._train_wave(checkpoint, left, runs)
            plan.checkpoints.clear()
        plan.checkpoints.remove()
        return [runs[cell] for cell in plan.configs]

    def _begin(self) -> None:
        """Records what the run trains and where; says if what is there was begun elsewhere."""
        checkpoints, now = self._plan.checkpoints, environment(self._kernel.device)
        earlier = checkpoints.configs() or {}
        if checkpoints.steps():
            changes = changes_of_environment(earlier.get(ENVIRONMENT), now)
            if changes is not None:
                self._reporter.warn(f"resume is not bit-exact: {changes}")
        tracked = self._trackers.begin(list(self._plan.configs), earlier.get(TRACKERS))
        checkpoints.begin({**self._plan.identity(), ENVIRONMENT: now, **({TRACKERS: tracked} if tracked else {})})

    def _train_wave(
        self, checkpoint: Checkpoint | None, left: list[str], runs: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Trains and saves the cells of a checkpoint, or as many of those that are left as fit. → their run.json"""
        plan, reporter = self._plan, self._reporter
        needed = hooks_by_stream(plan, list(checkpoint.cells) if checkpoint else left)
        rows_bytes = plan.source.mixed_bytes({key: len(hooks) for key, hooks in needed.items()})
        memory = plan_memory(plan.configs, plan.source.d_in, self._kernel, rows_bytes, self._options.max_memory)
        wave = list(checkpoint.cells) if checkpoint else memory.next_wave(left)
        reporter.note(
            f"{_count(len(wave), len(plan.configs))}, {plan.steps:,} steps of {plan.batch_size:,} rows; "
            f"memory: {memory.describe(wave if checkpoint else left)}; "
            f"kernel {self._kernel.name} ({self._kernel.reason})"
        )
        streams = make_streams(plan, wave, self._profiles)
        cells = make_cells(plan, wave, self._profiles, self._kernel)
        every, device = self._options.checkpoint_every, self._kernel.device
        probes = make_probes(plan, cells, self._profiles, device)
        held_out = HeldOutSample(plan, self._profiles, device)
        loop = StepLoop(plan, cells, streams, probes, device, self._pool, every, reporter, held_out, self._trackers)
        started = time.monotonic()
        first_step = loop.restore(checkpoint)
        loop.run(first_step)
        rows = (plan.steps - first_step) * plan.batch_size
        log_timing(plan.folder, "trained", rows=rows, seconds=round(time.monotonic() - started, 3))
        if len(plan.configs) > 1:
            commit.write_document(plan.folder / GROUP, {"format_version": FORMAT_VERSION, **plan.identity()})
        with reporter.task("evaluating", len(cells), "SAEs") as task:

            def finish(name: str) -> dict[str, Any]:
                cell = cells[name]
                profile = self._profiles[cell.config.hook]
                run = runs.get(name) or finish_cell(plan, name, cell, profile, probes[name].adam_sink_share, reporter)
                task.advance(1)
                return run

            return dict(zip(cells, self._pool.map(finish, cells), strict=True))


def _count(cells: int, of: int) -> str:
    """``1 SAE``, ``6 SAEs``, ``4 of 6 SAEs``."""
    number = f"{cells}" if cells == of else f"{cells} of {of}"
    return f"{number} SAE{'s' if of > 1 else ''}"

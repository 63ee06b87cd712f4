"""`train()`: plan → waves of cells → steps → saved SAEs."""

from __future__ import annotations

import contextlib
import dataclasses
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
from nsae_cli.kernels.select import Choice
from nsae_cli.reporter import Reporter, SilentReporter
from nsae_cli.sae.objective import ERROR_TERMS
from nsae_cli.store import commit
from nsae_cli.store.profile import HookProfile
from nsae_cli.store.sae_folder import FORMAT_VERSION
from nsae_cli.store.workspace import Artifact, Workspace, log_timing
from nsae_cli.training.cell import Cell
from nsae_cli.training.cell_pool import CellPool
from nsae_cli.training.checkpoint import Checkpoint
from nsae_cli.training.environment import changes_of_environment, environment
from nsae_cli.training.finish import finish_cell
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.parallel.agreement import refuse_differences
from nsae_cli.training.parallel.limits import choose_kernel, refuse_uneven
from nsae_cli.training.parallel.ranks import ALONE, Ranks
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
    options: TrainOptions,
    source: TrainingSource,
    workspace: Workspace,
    name: str | None,
    reporter: Reporter,
    cell: str | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Trains every SAE of the grid on one pass of shared batches and saves them.

    Finished runs are recognised and left alone; an interrupted one goes on from its last checkpoint.

    Args:
        options: as given; lists span a grid.
        source: where the rows come from; made from the same options.
        workspace: where the SAEs go, as ``saes/NAME`` or ``saes/NAME/CELL``.
        name: NAME, or None for the default.
        reporter: for remarks and progress.
        cell: train only this one, as a run of its own beside those of the others.
        ranks: the processes that train together, each of which calls this with the same arguments. The first of them
            writes all files; the others' result has no run.json.

    Raises:
        UsageError: refused or impossible options, NAME exists with other options, or processes differ.
        ResourceError: the device is missing or its memory is too small.
        NumericalError: loss or gradients are not finite.
        BusyError: another process is training under this name.
        Interrupted: a signal; a checkpoint was written.
    """
    grid = make_plan(options, source, workspace, name)
    plan = grid if cell is None else grid.part(cell)
    refuse_uneven(ranks.mesh, plan.configs.values())
    refuse_differences(ranks, plan)
    artifacts = [plan.artifact(cell) for cell in plan.configs]
    finished = find_finished(plan)
    if ranks.of_first(finished.keys() == plan.configs.keys()):
        if not ranks.leads:
            return TrainResult(plan.name, artifacts, [], already_complete=True)
        workspace.tidy(plan.folder, reporter, plan.unneeded_files())
        return TrainResult(plan.name, artifacts, [finished[cell] for cell in plan.configs], already_complete=True)
    with workspace.writing(plan.folder, reporter) if ranks.leads else contextlib.nullcontext():
        # Looked at again: another command may have trained on just now.
        finished = ranks.of_first(find_finished(plan))
        with Trackers(options.log_to if ranks.leads else [], plan.name, workspace.root, reporter) as trackers:
            runs = _train_unfinished(plan, finished, options, trackers, reporter, ranks)
        if ranks.leads and plan is not grid and find_finished(grid).keys() == grid.configs.keys():
            _write_group(grid)  # whichever cell is the last; each would write the same
    return TrainResult(plan.name, artifacts, runs, already_complete=False)


def _train_unfinished(
    plan: TrainPlan,
    finished: dict[str, dict[str, Any]],
    options: TrainOptions,
    trackers: Trackers,
    reporter: Reporter,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """Trains the cells that are not finished; run.json of all cells, in the plan's order."""
    if options.deterministic:
        # Read by cuBLAS when CUDA starts; without it deterministic products are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device, why = choose_device(options.device)
    distances = {ERROR_TERMS[config.l2_norm][1] for config in plan.configs.values()}
    acts = {config.act for config in plan.configs.values()}
    kernel = choose_kernel(ranks.mesh, options.kernel, options.precision, device, distances, acts)
    reporter.note(f"device {why}" + (f"; {ranks.mesh}" if ranks.size > 1 else ""))
    try:
        with (
            _numerics(options.deterministic),
            one_thread_if_small(plan.largest_product // ranks.size, device) as side_by_side,
            CellPool(min(side_by_side, len(plan.configs))) as pool,
        ):
            return _Run(plan, kernel, pool, options, trackers, reporter, ranks).complete(finished)
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
        cell: train only this one, as a run of its own beside those of the others.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        plan: TrainPlan,
        kernel: Choice,
        pool: CellPool,
        options: TrainOptions,
        trackers: Trackers,
        reporter: Reporter,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._plan, self._kernel, self._pool, self._trackers = plan, kernel, pool, trackers
        self._options, self._reporter = options, reporter
        self._profiles: dict[str, HookProfile] = {}

    def complete(self, finished: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Trains and saves the cells that are not finished; run.json of all of them, in the plan's order.

        Of several processes all but the first end with the last step, and know of no run.json.
        """
        plan, runs = self._plan, dict(finished)
        if self._ranks.leads:
            self._begin()
        self._profiles = profile_hooks(plan, self._reporter)
        for number in itertools.count():
            checkpoint = self._latest_checkpoint()
            left = [cell for cell in plan.configs if cell not in runs]
            if checkpoint is None and not left:
                break
            if number:
                plan.source.prepare(SilentReporter())  # the wave before has used its rows up
            runs |= self._train_wave(checkpoint, left, runs)
            if not self._ranks.leads:
                return []
            plan.checkpoints.clear()
        plan.checkpoints.remove()
        return [runs[cell] for cell in plan.configs]

    def _begin(self) -> None:
        """Records what the run trains and where; says if what is there was begun elsewhere. Makes the folders."""
        checkpoints, now = self._plan.checkpoints, environment(self._kernel.device, self._ranks.mesh)
        earlier = checkpoints.configs() or {}
        if checkpoints.steps():
            changes = changes_of_environment(earlier.get(ENVIRONMENT), now)
            if changes is not None:
                self._reporter.warn(f"resume is not bit-exact: {changes}")
        tracked = self._trackers.begin(list(self._plan.configs), earlier.get(TRACKERS))
        checkpoints.begin({**self._plan.identity(), ENVIRONMENT: now, **({TRACKERS: tracked} if tracked else {})})
        for folder in (self._plan.folder, *(self._plan.cell_folder(cell) for cell in self._plan.configs)):
            commit.make_folder(folder)
            commit.remove_leftovers(folder)

    def _latest_checkpoint(self) -> Checkpoint | None:
        """Where to go on from: the newest checkpoint that the first process finds intact; it removes damaged ones."""
        checkpoints = self._plan.checkpoints
        found = checkpoints.latest(self._reporter) if self._ranks.leads else None
        step = self._ranks.of_first(None if found is None else found.step)
        return found if self._ranks.leads or step is None else checkpoints.at_step(step)

    def _train_wave(
        self, checkpoint: Checkpoint | None, left: list[str], runs: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Trains and saves the cells of a checkpoint, or as many of those that are left as fit. → their run.json"""
        plan, reporter = self._plan, self._reporter
        needed = hooks_by_stream(plan, list(checkpoint.cells) if checkpoint else left)
        rows_bytes = plan.source.mixed_bytes({key: len(hooks) for key, hooks in needed.items()})
        parts, most = self._ranks.features.size, self._options.max_memory
        memory = plan_memory(plan.configs, plan.source.d_in, self._kernel, rows_bytes, most, parts)
        wave = list(checkpoint.cells) if checkpoint else memory.next_wave(left)
        reporter.note(
            f"{_count(len(wave), len(plan.configs))}, {plan.steps:,} steps of {plan.batch_size:,} rows; "
            f"memory: {memory.describe(wave if checkpoint else left)}; "
            f"kernel {self._kernel.name} ({self._kernel.reason})"
        )
        streams = make_streams(plan, wave, self._profiles)
        cells = make_cells(plan, wave, self._profiles, self._kernel, self._ranks)
        every, device = self._options.checkpoint_every, self._kernel.device
        probes = make_probes(plan, cells, self._profiles, device)
        held_out, trackers, ranks = (
            HeldOutSample(plan, self._profiles, device, self._ranks),
            self._trackers,
            self._ranks,
        )
        loop = StepLoop(plan, cells, streams, probes, device, self._pool, every, reporter, held_out, trackers, ranks)
        started = time.monotonic()
        first_step = loop.restore(checkpoint)
        loop.run(first_step)
        cells, mesh = self._finishing(cells), self._ranks.mesh
        if not self._ranks.leads:
            return {}
        self._ranks = ALONE
        rows = (plan.steps - first_step) * plan.batch_size
        log_timing(plan.folder, "trained", rows=rows, seconds=round(time.monotonic() - started, 3))
        if len(plan.configs) > 1:
            _write_group(plan)
        with reporter.task("evaluating", len(cells), "SAEs") as task:

            def finish(name: str) -> dict[str, Any]:
                cell = cells[name]
                profile = self._profiles[cell.config.hook]
                share = probes[name].adam_sink_share
                run = runs.get(name) or finish_cell(plan, name, cell, profile, share, reporter, mesh)
                task.advance(1)
                return run

            return dict(zip(cells, self._pool.map(finish, cells), strict=True))

    def _finishing(self, cells: dict[str, Cell]) -> dict[str, Cell]:
        """The cells as the first process evaluates and saves them; the processes part here.

        Where it has a part of the features only, cells with all of them are made from the checkpoint of the last step.
        """
        if self._ranks.size > 1:
            self._ranks.leave()
        if self._ranks.features.size == 1 or not self._ranks.leads:
            return cells
        kernel = dataclasses.replace(self._kernel, device=torch.device("cpu"))
        whole = make_cells(self._plan, list(cells), self._profiles, kernel)
        checkpoint = self._plan.checkpoints.at_step(self._plan.steps)
        for name, cell in whole.items():
            cell.load_state(checkpoint.cells[name])
        return whole


def _write_group(plan: TrainPlan) -> None:
    commit.write_document(plan.folder / GROUP, {"format_version": FORMAT_VERSION, **plan.identity()})


def _count(cells: int, of: int) -> str:
    """``1 SAE``, ``6 SAEs``, ``4 of 6 SAEs``."""
    number = f"{cells}" if cells == of else f"{cells} of {of}"
    return f"{number} SAE{'s' if of > 1 else ''}"

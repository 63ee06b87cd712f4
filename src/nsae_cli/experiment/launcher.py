"""`nsae run --launcher submitit`: the work of a stage as jobs of a cluster, one command line each.

Stages keep their order: this process submits the jobs of one, waits until all have ended, and goes on to the next.
Each job is ``nsae run CONFIG --stage N [--cell CELL]``, which anybody may type as well. A job that succeeds leaves its
JSON in KEY.json of the jobs' folder; KEY is made of the stage and its options. Nothing that submitit has pickled is
read here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import Interrupted, NsaeError
from nsae_cli.experiment.job import Command
from nsae_cli.experiment.launcher_options import SlurmOptions
from nsae_cli.experiment.stages import Stage, unfinished_cells
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.workspace import Kind, Workspace, config_hash

_POLL_SECONDS = 1.0
_FOLDER = "jobs"


@dataclass(frozen=True)
class Unit:
    """What one job does.

    Attributes:
        key: names its files.
        label: for people.
        stage: number of the stage, from 1.
        cell: of the stage's grid; None for all of the stage.
    """

    key: str
    label: str
    stage: int
    cell: str | None = None


@dataclass
class SubmititLauncher:
    """Submits stages and waits for them.

    Args:
        config: the configuration file.
        workspace: where results go.
        options: of ``--slurm``.
        by_cell: whether each cell of a grid is a job of its own.
        reporter: is told of jobs and where their logs are.
    """

    config: Path
    workspace: Workspace
    options: SlurmOptions
    by_cell: bool
    reporter: Reporter

    def __post_init__(self) -> None:
        try:
            import submitit  # noqa: F401 - asked for before anything is done
        except ImportError as error:
            raise catalogue.LAUNCHER_MISSING(
                "--launcher submitit needs a package that is not installed; pip install submitit"
            ) from error
        if self.options.cluster == "slurm" and shutil.which("srun") is None:
            raise catalogue.LAUNCHER_MISSING(
                "--launcher submitit: there is no SLURM here (no srun on the PATH); run it on a login node, or give "
                "--slurm cluster=local to try it on this machine"
            )
        self._folder = (self.options.folder or self._default_folder()).expanduser().absolute()

    def _default_folder(self) -> Path:
        # The copy of a workspace at a URL is on a disk of this machine.
        local = self.workspace.place == str(self.workspace.root)
        return self.workspace.root / _FOLDER if local else Path(f"nsae-{_FOLDER}")

    def run(self, number: int, stage: Stage, inputs: Sequence[str]) -> None:
        """Has the work of a stage done that is not done yet.

        Args:
            number: of the stage, from 1.
            stage: without cells.
            inputs: names of what it reads.

        Raises:
            ResourceError: a job failed, or could not be submitted.
            Interrupted: a signal; jobs that were submitted go on.
        """
        units = [unit for unit in self._units(number, stage, inputs) if not self._is_done(unit)]
        if not units:
            return
        commit.make_folder(self._folder)
        with _reworded():
            waiting = self._submit(units)
        self._say(number, stage, waiting)
        self._wait(waiting)
        self.workspace.open()
        failed = [(unit, job) for unit, job in waiting if not self._is_done(unit)]
        if failed:
            raise self._failure(failed, len(waiting))

    def _units(self, number: int, stage: Stage, inputs: Sequence[str]) -> list[Unit]:
        what = {
            "command": stage.command,
            "options": stage.options.model_dump(mode="json"),
            "inputs": list(inputs),
            "name": stage.name,
            "activations": stage.activations,
        }
        key = f"{number:02d}-{stage.command}-{config_hash(what)}"
        cells = unfinished_cells(stage, inputs, self.workspace) if self.by_cell else None
        if cells is None:
            return [Unit(key, stage.label, number)]
        return [Unit(f"{key}-{cell}", f"{stage.label} {cell}", number, cell) for cell in cells]

    def _is_done(self, unit: Unit) -> bool:
        """Whether its job has succeeded and what it made is still there."""
        try:
            made = json.loads((self._folder / f"{unit.key}.json").read_text(encoding="utf-8"))["artifact"]
            kinds = {kind.folder: kind for kind in Kind}
            artifacts = [(kinds[one["kind"]], one["name"]) for one in (made if isinstance(made, list) else [made])]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return all((self.workspace.folder(kind, name) / kind.mark).is_file() for kind, name in artifacts)

    # Jobs

    def _submit(self, units: Sequence[Unit]) -> list[tuple[Unit, Any]]:
        """Jobs of an earlier call that still run, and new ones for the others."""
        found = [(unit, job) for unit in units if (job := self._running(unit)) is not None]
        left = [unit for unit in units if unit not in [one for one, _ in found]]
        if found:
            self.reporter.note(f"waiting for {_count(found)} of an earlier call: {_ids([job for _, job in found])}")
        if not left:
            return found
        executor = self._executor(left[0])
        with executor.batch():
            jobs = [executor.submit(self._command(unit)) for unit in left]
        for unit, job in zip(left, jobs, strict=True):
            (self._folder / f"{unit.key}.json").unlink(missing_ok=True)
            commit.write_text(self._folder / f"{unit.key}.job", f"{job.job_id}\n")
        return [*found, *zip(left, jobs, strict=True)]

    def _command(self, unit: Unit) -> Command:
        place = self.workspace.place
        if place == str(self.workspace.root):
            place = str(self.workspace.root.absolute())
        cell = [] if unit.cell is None else ["--cell", unit.cell]
        arguments = ["--workspace", place, "--json", "run", str(self.config.absolute()), "--stage", str(unit.stage)]
        return Command([sys.executable, "-m", "nsae_cli", *arguments, *cell], str(self._folder / f"{unit.key}.json"))

    def _executor(self, unit: Unit) -> Any:
        import submitit

        options = self.options
        if options.cluster == "debug":
            return submitit.DebugExecutor(self._folder)
        if options.cluster == "local":
            executor: Any = submitit.LocalExecutor(self._folder, max_num_timeout=options.requeues)
            executor.update_parameters(**options.local_parameters())
            return executor
        executor = submitit.SlurmExecutor(self._folder, max_num_timeout=options.requeues)
        executor.update_parameters(**options.slurm_parameters(f"nsae-{unit.key[:40]}"))
        return executor

    def _running(self, unit: Unit) -> Any | None:
        """The job that an earlier call has submitted for the unit, if it has not ended."""
        if self.options.cluster != "slurm":
            return None
        import submitit

        with contextlib.suppress(OSError):
            job_id = (self._folder / f"{unit.key}.job").read_text(encoding="ascii").strip()
            job: Any = submitit.SlurmJob(self._folder, job_id)
            return None if job.done(force_check=True) else job
        return None

    def _wait(self, waiting: Sequence[tuple[Unit, Any]]) -> None:
        left = list(waiting)
        with self.reporter.task("jobs", len(left), "jobs") as task:
            while left:
                ended = [one for one in left if self._has_ended(*one)]
                left = [one for one in left if one not in ended]
                if ended:
                    task.advance(len(ended))
                if left and (signum := interrupt.stop_requested()) is not None:
                    ids = _ids([job for _, job in left])
                    raise Interrupted(
                        signum, f"stopped waiting; jobs {ids} go on (scancel ends them), the same command waits again"
                    )
                if left:
                    time.sleep(_POLL_SECONDS)

    def _has_ended(self, unit: Unit, job: Any) -> bool:
        if self.options.cluster == "debug":
            job.exception()  # runs it, here and now
            return True
        if self.options.cluster == "slurm" and (self._folder / f"{unit.key}.json").is_file():
            return True  # SLURM's accounting tells it later
        return bool(job.done())

    def _say(self, number: int, stage: Stage, waiting: Sequence[tuple[Unit, Any]]) -> None:
        ids = _ids([job for _, job in waiting])
        self.reporter.note(
            f"stage {number}, {stage.label}: {_count(waiting)} submitted, {ids}; logs {self._folder}/JOB_0_log.err, "
            f"results `nsae --workspace {self.workspace.place} list`"
        )

    def _failure(self, failed: Sequence[tuple[Unit, Any]], of: int) -> NsaeError:
        unit, job = failed[0]
        log, said = job.paths.stderr, ""
        with contextlib.suppress(OSError):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = next((line.removeprefix("nsae: ") for line in reversed(lines) if line.startswith("nsae: ")), "")
        said = said.partition(f": {unit.label}: ")[2] or said  # the place in the file is said here too
        others = f" (and {len(failed) - 1} more of {of})" if len(failed) > 1 else ""
        return catalogue.JOB_FAILED(
            f"job {job.job_id}, {unit.label}, has failed{others}: {said or 'no word of nsae in its log'}; read {log}, "
            f"then run the same command again"
        )


def _count(jobs: Sequence[Any]) -> str:
    return "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"


def _ids(jobs: Sequence[Any]) -> str:
    ids = [str(job.job_id) for job in jobs]
    return ", ".join(ids) if len(ids) <= 4 else f"{ids[0]} to {ids[-1]}"


@contextlib.contextmanager
def _reworded() -> Iterator[None]:
    """Says in one sentence why jobs could not be submitted."""
    try:
        yield
    except NsaeError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise catalogue.JOB_FAILED(
            f"the jobs could not be submitted: {reason}; check --slurm and whether `sbatch` works here"
        ) from error


def with_cell(stage: Stage, cell: str | None) -> Stage:
    """The stage, or the part of it that makes one cell."""
    return stage if cell is None else dataclasses.replace(stage, cell=cell)

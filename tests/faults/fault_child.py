"""What happens in the child of a trial: faults are put in place, then `nsae` runs as its console script would.

Faults meet *durable operations*, counted from 1 below the workspace as the interpreter performs them: opening for
writing, making, renaming and removing files and folders (seen by an audit hook), fsync, and the files that safetensors
writes by itself (which `commit` announces). So an operation counts whether or not it goes through `commit`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Where the phases of a command begin: (module, qualified name) of a function whose calls are counted.
PHASES: dict[str, list[tuple[str, str]]] = {
    "model load": [("nsae_cli.lm.collect", "load_model")],
    "tokenizing": [("nsae_cli.lm.tokenizing", "_batches")],
    "harvest": [("nsae_cli.lm.harvest", "Harvester._launch")],
    "norm estimate": [("nsae_cli.store.profile", "_StoreRows.norms"), ("nsae_cli.analysis.norms", "_Hook.histogram")],
    "train step": [("nsae_cli.training.cell", "Cell.train_step")],
    "evaluation": [("nsae_cli.training.evaluate", "_TrainingUnits.gradient_norms")],
    "checkpoint write": [("nsae_cli.training.checkpoint", "Checkpoints.save")],
    "finalise": [("nsae_cli.training.finish", "write_sae"), ("nsae_cli.store.shards", "StoreWriter.finish")],
}
#: Functions whose calls are written to the log of events, with the number of the step or shard.
WORK = {
    "step": ("nsae_cli.training.cell", "Cell.train_step", 2),
    "shard": ("nsae_cli.store.shards", "StoreWriter._commit_shard", 1),
}


class Log:
    """Events of the child, a line each, on the disk as soon as they happen."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *fields: object) -> None:
        """Appends a line: the time, then the fields, separated by tabs."""
        line = "\t".join([f"{time.monotonic():.6f}", *(str(field) for field in fields)])
        with _no_file_size_limit():
            os.write(self._descriptor, line.encode() + b"\n")


@contextlib.contextmanager
def _no_file_size_limit() -> Iterator[None]:
    """The log of events is no file of the command's: a trial's limit does not hold for it."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit[0] == resource.RLIM_INFINITY:
        yield
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


class DurableOperations:
    """Counts operations on files below a root and calls `fault` before each one.

    Args:
        root: only what lies below it counts.
        log: gets a line for each operation.
        fault: called with the number (from 1), kind and path of an operation; may raise or not return.
        snapshots: where the content of a file is kept each time that it is flushed, or None.
    """

    def __init__(
        self, root: Path, log: Log, fault: Callable[[int, str, str], None] | None, snapshots: Path | None
    ) -> None:
        self._root, self._log, self._fault, self._snapshots = f"{root}{os.sep}", log, fault, snapshots
        self._lock = threading.RLock()
        self._busy = threading.local()
        self.count = 0
        self._fsync = os.fsync

    def install(self) -> None:
        """From here on operations count."""
        from nsae_cli.store import commit

        sys.addaudithook(self._audit)
        os.fsync = self._counted_fsync
        if hasattr(os, "fdatasync"):
            os.fdatasync = self._counted_fsync

        def written_by_safetensors(operation: str, path: Path) -> None:
            if operation == "write" and ".safetensors." in path.name:
                self._happens("write", str(path))

        commit.fault_hook = written_by_safetensors

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if writes and isinstance(path, (str, bytes)):
                created = "open" if os.path.exists(path) and not flags & os.O_TRUNC else "create"
                self._happens(created, os.fsdecode(path))
        elif event == "os.rename":
            self._happens("rename", _at(arguments[0], arguments[2]), _at(arguments[1], arguments[3]))
        elif event in ("os.remove", "os.rmdir"):
            self._happens("remove", _at(arguments[0], arguments[1]))
        elif event == "os.mkdir":
            self._happens("mkdir", _at(arguments[0], arguments[2]))
        elif event == "os.truncate":
            self._happens("open", os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else "")

    def _counted_fsync(self, descriptor: int) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        operation = self._happens("fsync", path)
        self._fsync(descriptor)
        if operation is not None and self._snapshots is not None and os.path.isfile(path):
            self._keep(operation, path)

    def _keep(self, operation: int, path: str) -> None:
        self._busy.value = True
        try:
            content = Path(path).read_bytes()
            with self._lock:
                (self._snapshots / f"{operation}").write_bytes(content)  # type: ignore[operator]
                self._log.write("flushed", operation, path)
        finally:
            self._busy.value = False

    def _happens(self, kind: str, *paths: str) -> int | None:
        """Counts an operation and lets the fault look at it; its number, or None where it is none of the workspace."""
        if getattr(self._busy, "value", False) or not any(path.startswith(self._root) for path in paths):
            return None
        with self._lock:
            self.count += 1
            number = self.count
            self._log.write("operation", number, kind, *paths)
        if self._fault is not None:
            self._busy.value = True
            try:
                self._fault(number, kind, paths[-1])
            finally:
                self._busy.value = False
        return number


def _at(path: Any, folder: Any) -> str:
    """An absolute path; `folder` is a descriptor, or -1 for none."""
    name = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(name):
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.abspath(name)


def make_fault(wanted: dict[str, Any], log: Log) -> Callable[[int, str, str], None]:
    """The fault of a trial: at operation `at` (and with `lasting` at every later one) the process dies or fails."""
    at, how, kinds = wanted["at"], wanted["how"], wanted.get("kinds")
    seen = 0

    def fault(number: int, kind: str, path: str) -> None:
        nonlocal seen
        if kinds is not None and kind not in kinds:
            return
        seen += 1
        if seen < at or (seen > at and not wanted.get("lasting")):
            return
        log.write("fault", number, kind, path)
        if how == "exit":
            os._exit(137)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        if how == "fill":
            _fill(Path(wanted["filler"]), wanted["leave"])
            return
        raise OSError(int(how), os.strerror(int(how)), path)

    return fault


def _fill(filler: Path, leave: int) -> None:
    """Takes the file system's room, all but about `leave` bytes."""
    free = os.statvfs(filler.parent).f_bavail * os.statvfs(filler.parent).f_frsize
    with contextlib.suppress(OSError):
        filler.write_bytes(bytes(max(0, free - leave)))


def _owner(module: str, name: str) -> tuple[Any, str]:
    owner: Any = __import__(module, fromlist=["_"])
    *classes, attribute = name.split(".")
    for one in classes:
        owner = getattr(owner, one)
    return owner, attribute


def wrap(module: str, name: str, before: Callable[[tuple[Any, ...]], None]) -> None:
    """Makes a function call `before` with its positional arguments first."""
    owner, attribute = _owner(module, name)
    kept = owner.__dict__[attribute]
    static = isinstance(kept, staticmethod)
    function = kept.__func__ if static else kept

    def wrapped(*arguments: Any, **named: Any) -> Any:
        before(arguments)
        return function(*arguments, **named)

    setattr(owner, attribute, staticmethod(wrapped) if static else wrapped)


def log_work(log: Log) -> None:
    """Steps and shards go to the log when they begin."""
    for kind, (module, name, place) in WORK.items():
        wrap(module, name, lambda arguments, kind=kind, place=place: log.write(kind, arguments[place]))


def count_phases(log: Log) -> None:
    """Every call that belongs to a phase goes to the log."""
    for phase, functions in PHASES.items():
        for module, name in functions:
            wrap(module, name, lambda _, phase=phase: log.write("phase", phase))


def signal_in_phase(wanted: dict[str, Any], log: Log) -> None:
    """Sends signals in the `call`-th call of a phase, `delay` seconds after it began, a second one later if asked."""
    calls = 0

    def send(signum: int) -> None:
        log.write("signal", signum)
        (os.killpg if wanted.get("group") else os.kill)(os.getpid(), signum)

    def signals() -> None:
        time.sleep(wanted.get("delay", 0.0))
        send(wanted["signum"])
        if "second" in wanted:
            time.sleep(wanted["second"]["after"])
            send(wanted["second"]["signum"])

    def before(_: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == wanted["call"]:
            if wanted.get("delay", 0.0) or "second" in wanted:
                threading.Thread(target=signals, daemon=True).start()
            else:
                signals()

    for module, name in PHASES[wanted["phase"]]:
        wrap(module, name, before)


def turn_clock_back() -> None:
    """From now on each look at the wall clock finds it an hour earlier than the look before."""
    now = time.time()
    state = {"now": now}

    def backwards() -> float:
        state["now"] -= 3600
        return state["now"]

    real_strftime = time.strftime
    time.time = backwards  # type: ignore[assignment]
    time.strftime = lambda form, *rest: real_strftime(form, *(rest or (time.localtime(backwards()),)))


def run_trial(trial: dict[str, Any]) -> int:
    """Runs the command of a trial; returns the exit code that its process would have."""
    scratch = Path(trial["scratch"])
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as the process's own
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = Log(scratch / "events")
    import torch

    if trial.get("threads"):
        torch.set_num_threads(trial["threads"])
    from nsae_cli.cli import app
    from nsae_cli.lm import plan

    plan.MAX_SHARD_ROWS = trial.get("shard_rows", plan.MAX_SHARD_ROWS)
    log_work(log)
    if trial.get("count_phases"):
        count_phases(log)
    if trial.get("signal"):
        signal_in_phase(trial["signal"], log)
    if trial.get("clock") == "backwards":
        turn_clock_back()
    if trial.get("file_size"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (trial["file_size"], resource.RLIM_INFINITY))
    workspace = Path(trial["workspace"])
    if trial.get("count_operations", True):
        fault = make_fault(trial["fault"], log) if trial.get("fault") else None
        snapshots = Path(trial["snapshots"]) if trial.get("snapshots") else None
        DurableOperations(workspace, log, fault, snapshots).install()
    sys.argv = ["nsae", "--workspace", str(workspace), *trial["arguments"]]
    log.write("begin")
    code: Any
    try:
        app.main()
        code = 0
    except SystemExit as ended:
        code = ended.code
    threading._shutdown()  # type: ignore[attr-defined] # the interpreter would wait for threads that are no daemons
    log.write("end", code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if trial.get("list_modules"):
        (scratch / "modules").write_text("\n".join(sorted(sys.modules)))
    return int(code or 0)

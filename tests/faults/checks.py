"""What must hold after a fault, and after the same command was run again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from forked import Ended, Server, Trial
from stages import CHECKPOINT_EVERY, Prepared

from command import contents

#: Files that grow while a command works; whole only when their artifact is.
_GROWING = ("progress.jsonl", "metrics.jsonl")
#: Files that may change whatever a command does.
PASSING = ("timings.jsonl", "verified.jsonl", "metrics.jsonl", "begun.json")
#: The completion mark of the artifact that a growing file belongs to.
_MARKS = {"progress.jsonl": "manifest.json", "metrics.jsonl": "run.json"}


def is_temporary(path: str) -> bool:
    """Whether a path below the workspace is of a temporary or a lock file: nothing that a reader looks at."""
    return any(part.startswith(".") or ".tmp-" in part for part in path.split("/"))


def leftovers(workspace: Path) -> list[str]:
    """Temporary files, locks and the traceback of a bug that are in the workspace."""
    found = (path.relative_to(workspace).as_posix() for path in workspace.rglob("*"))
    return sorted(path for path in found if is_temporary(path) or path == "error.log")


def half_files(prepared: Prepared, workspace: Path) -> list[str]:
    """What is under a final name without being whole: every file there must be one that the undisturbed run writes.

    Checkpoints, of which an undisturbed run leaves none, are compared with the hashes that they carry.
    """
    problems = []
    for path, content in contents(workspace).items():
        if is_temporary(path):
            continue
        name = path.rsplit("/", 1)[-1]
        if "/checkpoints/" in path:
            if name == "files.json":
                problems += _damaged_checkpoint(workspace / path)
        elif name in _GROWING or name.startswith("progress-"):
            if name == "metrics.jsonl" and (workspace / path).with_name(_MARKS[name]).exists():
                problems += [] if content == prepared.whole[path] else [f"{path} is not whole beside its run.json"]
        elif content != prepared.whole.get(path):
            problems.append(f"{path} is half a file, or one that an undisturbed run does not write")
    return problems


def _damaged_checkpoint(files: Path) -> list[str]:
    try:
        expected = json.loads(files.read_text())
        expected = expected.get("files", expected)
        hashes = {name: value for name, value in expected.items() if name not in ("checksum", "format_version")}
        found = {name: hashlib.sha256((files.parent / name).read_bytes()).hexdigest() for name in hashes}
    except (OSError, ValueError) as error:
        return [f"checkpoint {files.parent.name}: {error}"]
    return [] if found == hashes else [f"checkpoint {files.parent.name} is not what its files.json says"]


def verify(server: Server, workspace: Path) -> list[str]:
    """What `nsae verify` of the whole workspace finds damaged. Unfinished artifacts and leftovers are none of that."""
    ended = server.run(Trial(workspace, ("verify",), {"count_operations": False}))
    return [] if ended.code == 0 else [f"nsae verify: {ended.describe()} {ended.out[-300:]}"]


def run_again(server: Server, prepared: Prepared, workspace: Path) -> tuple[Ended, list[str]]:
    """The same command without a fault: it must end well, in the same bytes, and leave nothing else."""
    ended = server.run(prepared.trial(workspace))
    problems = [] if ended.code == 0 else [f"run again: {ended.describe()}"]
    if "Traceback" in ended.err:
        problems.append("run again: a traceback")
    return ended, problems + differences(prepared, workspace)


def differences(prepared: Prepared, workspace: Path) -> list[str]:
    """In what a workspace differs from the one of an undisturbed run; leftovers count."""
    found, whole = contents(workspace), prepared.whole
    problems = [f"{path} is missing" for path in whole if path not in found]
    problems += [f"{path} is left over" for path in found if path not in whole]
    problems += [f"{path} has other bytes" for path in whole if path in found and found[path] != whole[path]]
    return problems + [f"{path} is left over" for path in leftovers(workspace) if path not in found]


def work_done_twice(prepared: Prepared, runs: list[Ended]) -> int:
    """Steps or shards that the last run began though the run before it had begun them too: what the fault cost."""
    kind = prepared.stage.resumes
    assert kind is not None
    return len(set(runs[-2].work(kind)) & set(runs[-1].work(kind)))


def too_much_lost(prepared: Prepared, runs: list[Ended]) -> tuple[int, list[str]]:
    """Work done twice, and whether that is more than one shard or one checkpoint interval.

    Steps go on while a checkpoint is being written, so that of the interval before it as much may be lost as was taken
    meanwhile; the next checkpoint waits for it, so it is never more than two.
    """
    if prepared.stage.resumes is None:
        return 0, []
    lost = work_done_twice(prepared, runs)
    most = 1 if prepared.stage.resumes == "shard" else 2 * CHECKPOINT_EVERY
    return lost, [] if lost <= most else [f"{lost} {prepared.stage.resumes}s were done twice, {most} at most"]


def failed_in_one_line(ended: Ended, code: int) -> list[str]:
    """A refusal: the exit code, exactly one `nsae:` line, which is the last, and no traceback."""
    lines = ended.err.splitlines()
    problems = [] if ended.code == code else [f"exit {ended.code} and not {code}: {ended.describe()}"]
    if [line.startswith("nsae: ") for line in lines].count(True) != 1 or not lines[-1].startswith("nsae: "):
        problems.append(f"not one nsae: line at the end: {lines[-3:]}")
    if "Traceback" in ended.err:
        problems.append("a traceback")
    return problems

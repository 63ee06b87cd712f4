"""A function run in several forked processes that are joined as a launcher's would be."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsae_cli.launch import Placement
from nsae_cli.training.parallel.joining import joined
from nsae_cli.training.parallel.mesh import Mesh
from nsae_cli.training.parallel.ranks import Ranks

#: Called once per mesh with the ranks; the first process's answers are returned, so they have to fit into JSON.
Work = Callable[[Ranks], Any]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_processes(world: int, work: list[tuple[Mesh, Work]], folder: Path, timeout: float = 120.0) -> list[Any]:
    """Forks `world` processes, which do one piece of work after the other; the answers of all processes by piece.

    Args:
        world: how many.
        work: how they share each piece, and what is to be done.
        folder: for their answers.
        timeout: after which they are killed.
    """
    ports = [free_port() for _ in work]
    gc.collect()  # an earlier test's process group must not end in the children
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            gc.disable()
            code = 1
            try:
                answers = [_do(rank, world, *piece, port) for piece, port in zip(work, ports, strict=True)]
                (folder / f"answers-{rank}.json").write_text(json.dumps(answers))
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        pids.append(pid)
    until = time.monotonic() + timeout
    codes = [_wait(pid, until) for pid in pids]
    assert codes == [0] * world, f"exit codes by rank: {codes}; their tracebacks stand above"
    by_rank = [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(world)]
    return [[answers[piece] for answers in by_rank] for piece in range(len(work))]


def _do(rank: int, world: int, mesh: Mesh, function: Work, port: int) -> Any:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined(mesh, Placement(rank, world, rank), "cpu", timeout=60) as job:
        return function(job.ranks)


def _wait(pid: int, until: float) -> int:
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL

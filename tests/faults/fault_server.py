"""A process that has imported nsae once and forks a child for every trial, so that a trial costs no import.

Reads one JSON request per line on stdin and answers each with one JSON line. A request is a list of trials that begin
together; the answer lists how each of them ended. Started by `forked.Server`; nothing else is meant to use it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "lm")]

_POLL = 0.002


def preload(modules: list[str]) -> int:
    """Imports what a command would import; returns how many threads that has left running."""
    for name in modules:
        with contextlib.suppress(Exception):  # a module that cannot be imported alone is imported by the command
            __import__(name)
    return len(os.listdir("/proc/self/task"))


def start(trial: dict[str, Any], answers: int) -> int:
    """Forks the child of a trial; returns its process id."""
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        code = 70
        try:
            os.setpgid(0, 0)
            from fault_child import run_trial

            code = run_trial(trial)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    return pid


def serve_group(trials: list[dict[str, Any]], answers: int) -> list[dict[str, Any]]:
    """Runs trials side by side until all of them have ended."""
    running: dict[int, tuple[int, dict[str, Any], float]] = {}
    ended: list[dict[str, Any]] = [{} for _ in trials]
    for number, trial in enumerate(trials):
        if number and trial.get("after"):
            time.sleep(trial["after"])
        begun = time.monotonic()
        running[start(trial, answers)] = (number, trial, begun)
    while running:
        for pid in list(running):
            number, trial, begun = running[pid]
            done, status = os.waitpid(pid, os.WNOHANG)
            now = time.monotonic()
            if done:
                del running[pid]
                code = os.waitstatus_to_exitcode(status)
                ended[number] |= {"code": code, "seconds": now - begun, "ended": now}
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)  # what a child may have left behind
                continue
            kill_after = trial.get("kill_after")
            if kill_after is not None and now - begun >= kill_after:
                os.killpg(pid, signal.SIGKILL)
            elif now - begun >= trial.get("timeout", 60):
                ended[number]["timed_out"] = True
                os.killpg(pid, signal.SIGKILL)
        time.sleep(_POLL)
    return ended


def main() -> None:
    """Serves until stdin ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    out = os.fdopen(answers, "w", encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        if "preload" in request:
            answer: Any = {"threads": preload(request["preload"])}
        else:
            answer = serve_group(request["trials"], answers)
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()

"""What a job of a cluster does: run one plain `nsae` command line, and go on with it after a preemption.

submitit pickles a `Command` when it is submitted, and unpickles it in the job: a reference to this class and texts. The
command runs in a process of its own, which unpickles nothing. Only the standard library is imported here: this process
has nothing to do but to wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.2
#: How long a job waits for its end after its command was stopped by a signal that was not submitit's.
_SECONDS_TO_THE_END = 60.0


class Command:
    """A command line whose JSON goes to a file, which is there once the command has succeeded.

    Args:
        arguments: the command line.
        result: where its stdout is put.
    """

    def __init__(self, arguments: list[str], result: str) -> None:
        self.arguments, self.result = arguments, result
        self.process_id: int | None = None

    def __call__(self) -> int:
        """Runs the command.

        Raises:
            RuntimeError: it failed, with its exit code; why stands in the job's log.
        """
        temporary = Path(f"{self.result}.{os.getpid()}.tmp")
        with temporary.open("wb") as out:
            # SLURM signals every process of a job; SIGUSR2 is for this one, which asks the command to stop.
            process = subprocess.Popen(self.arguments, stdout=out, preexec_fn=_ignore_sigusr2)
            self.process_id = process.pid
            try:
                while (code := process.poll()) is None:
                    time.sleep(_POLL_SECONDS)
            finally:
                if process.poll() is None:
                    self._stop()
        if code == 0:
            temporary.replace(self.result)
            return 0
        temporary.unlink()
        if code in (130, 143):
            # Ended by SLURM itself, which is about to end this process too and may start the job again.
            time.sleep(_SECONDS_TO_THE_END)
        raise RuntimeError(f"nsae ended with exit code {code}")

    def checkpoint(self) -> Any:
        """Called by submitit when the job is to make room: the command saves what it has; the job is submitted again.

        Returns:
            The same command, to be run again: it goes on from its checkpoint.
        """
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(Command(self.arguments, self.result))

    def _stop(self) -> None:
        """Asks the command to save and end, and waits until it has; it is reaped where it is waited for."""
        if self.process_id is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process_id, signal.SIGTERM)
                os.waitid(os.P_PID, self.process_id, os.WEXITED | os.WNOWAIT)


def _ignore_sigusr2() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)

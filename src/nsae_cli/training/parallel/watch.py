"""Who has failed: each process shows that it lives and how far it is, and says why it ends.

All of it goes through the launcher's key-value store, by a connection and a thread of its own, so that it works while
the main thread waits in a collective. The first to claim a failure is the one that says it; the others end silently.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from nsae_cli import catalogue
from nsae_cli.errors import ResourceError

#: Seconds between two signs of life.
_BEAT = 0.25
#: A process that gives no sign for so long has ended or stands still, where a collective has failed as well.
_SILENCE = 3.0
#: How long a process that fails waits to see whether all the others fail with the same words.
_COMMON = 2.0
#: From the claim of a failure on, a process that does not end by itself is ended.
_GRACE = 10.0
_GO_ON = "checkpoints are kept; run the same command to go on"
#: Exit code of a process that is ended because of another's failure.
_EXIT = 4


class Watch:
    """Signs of life of this process, and what the others show. Its thread begins with `begin`.

    Args:
        connect: makes a connection to the store; one for the thread, one for the main thread.
        rank: of this process.
        world: how many there are.
        first_holds: whether the store is the first process's, and ends with it; else it is the launcher's.
    """

    def __init__(self, connect: Callable[[], dist.Store], rank: int, world: int, *, first_holds: bool) -> None:
        self.rank, self.world, self._first_holds = rank, world, first_holds
        self._store, self._own = connect(), connect()
        self._collectives = 0
        self._claimed: str | None = None  # by another process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nsae-watch", daemon=True)

    def begin(self) -> None:
        """Starts to show signs of life."""
        self._show(0)
        self._thread.start()

    def end(self) -> None:
        """Says that this process goes on without the others, or has done its part."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")

    def entering(self) -> None:
        """Counts a collective: who is behind in a job that hangs is told by these."""
        self._collectives += 1

    def name(self, rank: int | None = None) -> str:
        """``rank 2 of 4``; of this process by default."""
        return f"rank {self.rank if rank is None else rank} of {self.world}"

    def fails(self, text: str) -> str | None:
        """What this process says as it fails: the text, its rank before it unless all fail alike; None for nothing.

        Args:
            text: what it would say by itself.
        """
        named = f"{self.name()}: {text}"
        try:
            self._store.set(f"failure/{self.rank}", text)
            if self._is_common(text):
                return text if self._is_first() else None
            return named if self._claim(named) else None
        except RuntimeError:  # the store has gone, with its process
            return named if self._claimed is None else None
        finally:
            self._linger()

    def peer_lost(self, what: str) -> ResourceError | None:
        """The error to raise where a collective has failed here; None if another process says it.

        Args:
            what: the backend's words.
        """
        try:
            self._wait_for_claim()
            error = None if self._claimed is not None else self._lost(what)
            return error if error is not None and self._claim(str(error)) else None
        except RuntimeError:
            # Nothing can be claimed any more: the first of those that should be left says it.
            if self._claimed is not None or self.rank != int(self._first_holds):
                return None
            who = self.name(0) if self._first_holds else "the launcher"
            return catalogue.RANK_LOST(f"{who} has ended (killed, crashed or out of memory); {_GO_ON}")
        finally:
            self._linger()

    def _linger(self) -> None:
        """The store may be this process's: the others have to hear of the failure first."""
        if self.rank == 0:
            time.sleep(4 * _BEAT)

    def _is_first(self) -> bool:
        return all(self._store.check([f"left/{rank}"]) for rank in range(self.rank))

    def _is_common(self, text: str) -> bool:
        """Whether all that are still there fail with these words."""
        until = time.monotonic() + _COMMON
        while True:
            present = [rank for rank in range(self.world) if not self._store.check([f"left/{rank}"])]
            posted = [rank for rank in present if self._store.check([f"failure/{rank}"])]
            if any(self._store.get(f"failure/{rank}").decode() != text for rank in posted):
                return False
            if len(posted) == len(present):
                return True
            if time.monotonic() > until or self._claimed is not None:
                return False
            time.sleep(0.02)

    def _claim(self, text: str) -> bool:
        """Whether this failure is the first to be claimed."""
        mine = f"{self.rank} {text}"
        return self._store.compare_set("claim", "", mine).decode() == mine

    def _wait_for_claim(self) -> None:
        until = time.monotonic() + _SILENCE
        while self._claimed is None and time.monotonic() < until:
            time.sleep(_BEAT / 2)

    def _lost(self, what: str) -> ResourceError:
        """Which process has failed, as far as can be told from its signs; `_SILENCE` after the collective failed."""
        now, seen = time.monotonic(), {rank: self._shown(rank) for rank in range(self.world) if rank != self.rank}
        while time.monotonic() < now + _SILENCE / 2:
            time.sleep(_BEAT)
        later = {rank: self._shown(rank) for rank in seen}
        silent = [rank for rank, shown in later.items() if shown == seen[rank]]
        if silent:
            names = ", ".join(self.name(rank) for rank in silent)
            return catalogue.RANK_LOST(
                f"{names} gives no sign of life any more (killed, crashed, out of memory or stopped); {_GO_ON}"
            )
        behind = min(later, key=lambda rank: later[rank][1])
        if later[behind][1] < self._collectives:
            return catalogue.RANK_LOST(
                f"{self.name(behind)} has not taken part for longer than --rank-timeout, it hangs or is far slower; "
                f"{_GO_ON}"
            )
        return catalogue.RANK_LOST(f"the processes have lost each other ({what[:80]}); {_GO_ON}")

    def _shown(self, rank: int) -> tuple[int, int]:
        """Beats and collectives that a process has shown last; −1 for none."""
        if not self._store.check([f"beat/{rank}"]):
            return -1, -1
        beats, collectives = self._store.get(f"beat/{rank}").decode().split()
        return int(beats), int(collectives)

    def _show(self, beats: int) -> None:
        self._own.set(f"beat/{self.rank}", f"{beats} {self._collectives}")

    def _watch(self) -> None:
        beats, over_since = 0, math.inf
        while not self._ended.wait(_BEAT):
            beats += 1
            try:
                self._show(beats)
                if self._claimed is None and self._own.check(["claim"]):
                    by, _, text = self._own.get("claim").decode().partition(" ")
                    self._claimed = text if int(by) != self.rank else None
            except RuntimeError:  # the store has gone, and does not come back
                over_since = min(over_since, time.monotonic())
            if self._claimed is not None:
                over_since = min(over_since, time.monotonic())
            if time.monotonic() > over_since + _GRACE:
                os._exit(_EXIT)  # the main thread waits for what will not come

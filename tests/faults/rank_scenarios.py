"""Scenarios of several processes: this one is the first, a forked one the second."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from provoking import Place, scenario
from several import free_port
from several import place as placed

from nsae_cli.cli import app

TRAIN = ["train", "--d-sae", "32", "--device", "cpu", "--tokens", "2560", "--batch-size", "256", "--name", "new",
         "--rank-timeout", "60s"]  # fmt: skip


def _beside(place: Place, workspace: Path, arguments: list[Any], *, dies: bool = False) -> list[Any]:
    """Starts the second process of a command, and makes this the first; → the first's arguments."""
    port = free_port()
    gc.collect()  # what an earlier scenario has left of its process group must not end in the child
    if os.fork() == 0:
        gc.disable()
        with contextlib.suppress(BaseException):
            os.environ |= placed(1, 2, port)
            if dies:
                from nsae_cli.training.cell import Cell

                Cell.train_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            app.invoke(["--quiet", "--workspace", str(workspace), *map(str, arguments)])
        os._exit(0)
    for name, value in placed(0, 2, port).items():
        place.patch.setenv(name, value)
    return TRAIN


@scenario("RANKS_NOT_MET")
def _(place: Place) -> list[Any]:
    for name, value in placed(0, 2, free_port()).items():
        place.patch.setenv(name, value)
    return [*TRAIN[:-1], "1s"]


@scenario("RANKS_DIFFER")
def _(place: Place) -> list[Any]:
    return _beside(place, place.workspace, [*TRAIN, "--lr", "0.01"])


@scenario("RANKS_SEE_OTHERS")
def _(place: Place) -> list[Any]:
    other = Path(shutil.copytree(place.finished, place.tmp / "lagging"))
    [manifest] = other.glob("activations/*/manifest.json")
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    return _beside(place, other, TRAIN)


@scenario("RANK_LOST")
def _(place: Place) -> list[Any]:
    return _beside(place, place.damaged(), TRAIN, dies=True)

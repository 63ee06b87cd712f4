"""Training that is stopped at any step and goes on ends in the same bits as training that was not (G5)."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tally import Tally

from command import contents
from hand_store import HOOKS, make_rows, write_full
from nsae_cli import interrupt
from nsae_cli.errors import Interrupted
from nsae_cli.reporter import SilentReporter
from nsae_cli.store import commit
from nsae_cli.store.shards import open_activations
from nsae_cli.store.workspace import Workspace
from nsae_cli.training.cell import Cell
from nsae_cli.training.loop import train
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.source import StoreSource
from nsae_cli.values import validate_options

#: 50 steps, several epochs of 494 rows, several windows, warm-ups and decay; the log has a line for every step.
STEPS = 50
_SMALL = {
    "d_sae": "20", "tokens": f"{64 * STEPS}", "batch_size": "64", "buffer": "300", "lr": "0.003", "layers": "4",
    "alpha_warm_up": "30%", "lr_warm_up": "10%", "checkpoint_every": "1000", "device": "cpu",
}  # fmt: skip
METHODS: dict[str, dict[str, str]] = {
    "relu unit": {"noise": "0.1"},
    "tanh-relu free": {"act": "tanh-relu", "l2_norm": "sq", "clip": "1"},
    "topk": {"act": "topk", "k": "3", "dead_window": "256"},
    "target-l0": {"target_l0": "4", "resample_dead": "10", "dead_window": "128"},
    "grid": {"act": "relu,tanh-relu", "sinks": "keep,drop", "layers": "all"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Training:
    """Counts steps, stops at one, and notes the state of every cell at its end, the optimizer's included."""

    def __init__(self) -> None:
        self.done = 0
        self.stop_at: int | None = None
        self.states: dict[str, str] = {}

    def stop_requested(self) -> int | None:
        """SIGINT, once so many steps have been taken."""
        return 2 if self.stop_at is not None and self.done >= self.stop_at else None


@contextlib.contextmanager
def watched() -> Iterator[_Training]:
    """Training in this process, watched."""
    training = _Training()
    step, saved, asked = Cell.train_step, Cell.saved_sae, interrupt.stop_requested

    def train_step(cell: Cell, rows: Any, number: int) -> Any:
        log = step(cell, rows, number)
        training.done = number + 1
        return log

    def saved_sae(cell: Cell) -> Any:
        digest = hashlib.sha256()
        for name, tensor in sorted(cell.state().items()):
            digest.update(f"{name} {commit.tensor_sha256(tensor)}".encode())
        training.states[str(cell.config)] = digest.hexdigest()
        return saved(cell)

    Cell.train_step, Cell.saved_sae = train_step, saved_sae  # type: ignore[method-assign]
    interrupt.stop_requested = training.stop_requested
    try:
        yield training
    finally:
        Cell.train_step, Cell.saved_sae = step, saved  # type: ignore[method-assign]
        interrupt.stop_requested = asked


def cut_and_go_on(folder: Path, method: str, dtype: str, steps: Iterable[int] = range(STEPS + 1)) -> Tally:
    """Stops at each of `steps`, goes on, and compares every file, and every tensor of the state at the end."""
    tally = Tally("stopped at a step and gone on", f"{method}, {dtype}")
    rows = make_rows(65, 8, hooks=HOOKS)
    rows.x = {hook: x.to(DTYPES[dtype]) for hook, x in rows.x.items()}
    store = write_full(folder / f"{method} {dtype}", rows, [200, 120, 0, 200])
    options = validate_options(TrainOptions, _SMALL | METHODS[method])

    def run(workspace: Path) -> None:
        source = StoreSource(open_activations(store), options)
        train(options, source, Workspace(workspace), "sae", SilentReporter())

    with watched() as training:
        run(folder / "whole")
        whole, states = contents(folder / "whole"), dict(training.states)
        for step in steps:
            training.done, training.stop_at, training.states = 0, step, {}
            problems = []
            try:
                run(folder / "cut")
                problems.append("it did not stop")
            except Interrupted as stopped:
                expected = "while evaluating" if step == STEPS else f"at step {step} of {STEPS}"
                if expected not in str(stopped):
                    problems.append(f"{stopped}")
            training.stop_at = None
            run(folder / "cut")
            if training.states != states:
                problems.append("another state at the end")
            found = contents(folder / "cut")
            problems += [f"{name} differs" for name in {**whole, **found} if whole.get(name) != found.get(name)]
            tally.add(f"step {step}", problems)
            shutil.rmtree(folder / "cut")
    shutil.rmtree(folder / "whole")
    return tally

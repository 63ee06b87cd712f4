"""Why a step's loss or gradient is not finite: a row of its batch, or the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nsae_cli import catalogue
from nsae_cli.errors import NumericalError
from nsae_cli.store.batches import HookRows


def explain(name: str, rows: HookRows, step: int, origin: Callable[[int], str], kept: Sequence[int]) -> NumericalError:
    """The error to raise in place of one that `Cell.train_step` has raised: with the reason.

    Args:
        name: of the cell.
        rows: the step's batch.
        step: 0-based number of the step.
        origin: says where a row of the batch comes from.
        kept: steps of the checkpoints on disk.
    """
    # In float32, as it is trained on: a row whose squares overflow there is no better than one with an infinity.
    squares = rows.x.float().square().sum(dim=1).cpu()
    bad = (~torch.isfinite(squares)).nonzero().squeeze(1)
    if len(bad):
        verb = "is" if len(bad) == 1 else "are"
        why = (
            f": {len(bad):,} of its {len(squares):,} rows {verb} not finite, first {origin(int(bad[0]))}; "
            f"leave such rows out of the store"
        )
    else:
        longest = int(squares.argmax())
        why = (
            f", its {len(squares):,} rows are (longest: {origin(longest)}, norm {float(squares[longest]) ** 0.5:.4g}); "
            f"lower --lr or give --clip 1"
        )
    checkpoint = f"; checkpoint step-{kept[-1]} is kept" if kept else ""
    return catalogue.LOSS_NOT_FINITE(f"loss or gradient is not finite at step {step + 1} of {name}{why}{checkpoint}")

"""Rows that cannot be computed with: NaN, infinity, or values so large that their squares are no float32."""

from __future__ import annotations

import torch

from nsae_cli import catalogue, interrupt
from nsae_cli.store.shards import ActivationStore


def refuse_non_finite(store: ActivationStore, hook: str) -> None:
    """Looks at every norm of a hook: `nsae collect` stores none that is not finite, a store from elsewhere may.

    Raises:
        NumericalError: a row that is not finite, with its shard and its number there.
        Interrupted: a signal asked to stop.
    """
    shards = store.manifest.shards
    flagged = {entry.file: entry.nonfinite_rows for entry in shards if entry.nonfinite_rows}
    if flagged:
        first, count = next(iter(flagged.items()))
        more = f" ({sum(flagged.values()):,} in {len(flagged):,} shards)" if len(flagged) > 1 else ""
        raise catalogue.STORE_NOT_FINITE(
            f"{store.name}: by its manifest {count:,} rows of {first}{more} hold NaN or infinity; "
            f"collect it again, or leave such rows out of the store"
        )
    for shard, entry in enumerate(shards):
        interrupt.stop_if_requested("stopped while reading norms, nothing was written; run the same command again")
        bad = (~torch.isfinite(store.norms(shard, hook))).nonzero().squeeze(1)
        if not len(bad):
            continue
        row = int(bad[0])
        rows = f"{len(bad):,} rows at {hook} are not finite, the first is row {row:,} of {entry.file}"
        largest = _largest(store, hook, shard, row)
        if largest is None:
            remedy = "collect again with --dtype fp32, or leave such rows out of the store"
        else:
            rows = rows.replace("are not finite", "overflow float32 when squared") + f" with {largest:.3g}"
            remedy = "scale the activations down, or leave such rows out"
        raise catalogue.STORE_NOT_FINITE(f"{store.name}: {rows}; {remedy}")


def _largest(store: ActivationStore, hook: str, shard: int, row: int) -> float | None:
    """max_j |x_j| of a row whose vector is finite, though its norm is not; None for any other."""
    if hook not in store.manifest.hooks:
        return None
    largest = float(store.read(shard, [hook])[hook][row].abs().max())
    return largest if largest < float("inf") else None  # NaN compares as False

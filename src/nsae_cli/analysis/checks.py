"""What is looked at before a store is measured: values that are not numbers, and rows that say too little."""

from __future__ import annotations

import torch

from nsae_cli import catalogue, interrupt
from nsae_cli.reporter import Reporter
from nsae_cli.store.contexts import BLOCK_ROWS
from nsae_cli.store.manifest import describe_alterations
from nsae_cli.store.shards import ActivationStore


def refuse_non_finite(store: ActivationStore, hook: str) -> None:
    """Looks at every norm of a hook: collect stores none that is not finite, a store from elsewhere may.

    Raises:
        NumericalError: NaN or infinity.
        Interrupted: a signal asked to stop.
    """
    for shard, entry in enumerate(store.manifest.shards):
        interrupt.stop_if_requested("stopped; nothing was written, run the same command again")
        bad = (~torch.isfinite(store.norms(shard, hook))).nonzero().squeeze(1)
        if len(bad):
            raise catalogue.STORE_NOT_FINITE(
                f"{store.name}: {len(bad):,} rows at {hook} are not finite, the first is row {int(bad[0]):,} of "
                f"{entry.file}; collect again with --dtype fp32, or leave such rows out of the store"
            )


def say_what_is_missing(store: ActivationStore, reporter: Reporter) -> None:
    """Warns where a store from elsewhere lacks what the measurements use, and says if its norms were altered."""
    if (altered := describe_alterations(store.manifest)) is not None:
        reporter.note(f"{store.name}: {altered}")
    if not store.has_positions:
        reporter.warn(
            f"{store.name} has no positions: sink rule 1 is off, blocks of {BLOCK_ROWS} rows stand for contexts"
        )
    if not store.has_tokens:
        reporter.warn(f"{store.name} has no tokens: nothing can be said of special tokens or of the commonest")

"""What is said before a store is measured: what it lacks, and what was done to it."""

from __future__ import annotations

from nsae_cli.reporter import Reporter
from nsae_cli.store.contexts import BLOCK_ROWS
from nsae_cli.store.manifest import describe_alterations
from nsae_cli.store.shards import ActivationStore


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

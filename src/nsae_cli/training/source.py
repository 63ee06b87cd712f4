"""Where training rows come from: what training asks of a source, and the source that is an activation store.

`nsae_cli.lm.live` has the other one, which runs a language model while the SAEs train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from nsae_cli import catalogue
from nsae_cli.reporter import Reporter
from nsae_cli.store.batches import WHOLE, Batch, BatchStream, HookRows, Share, held_out_rows
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.manifest import describe_alterations
from nsae_cli.store.profile import HookProfile, profile_hook
from nsae_cli.store.provenance import Provenance
from nsae_cli.store.shards import ActivationStore
from nsae_cli.training.options import TrainOptions, layer_of

#: Cells with equal keys see the same rows: same seed and, where sinks are dropped, the same hook.
StreamKey = tuple[int, str | None]


class TrainingStream(Protocol):
    """Batches of training rows for the cells that share a seed and, where sinks are dropped, a hook."""

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches, beginning with that of step `first_step` (0-based).

        A batch is to be used before the next one is taken.

        Raises:
            Interrupted: while taking a batch, if a signal asked to stop.
        """

    def first_rows(self, count: int) -> Batch:
        """Up to `count` of the rows that a run begins with, on the CPU."""

    def origin(self, step: int, index: int) -> str:
        """Where a row of the batch of `step`, the one taken last, comes from, for messages."""

    def state(self) -> dict[str, torch.Tensor]:
        """What the next batch depends on beside its step; empty where that is nothing."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from `state()`; other entries are ignored. Before `batches`."""


class TrainingSource(Protocol):
    """Rows of one or several hooks, a part of their contexts held out.

    Everything that it yields is a pure function of what `inputs` says and of the arguments.
    """

    @property
    def name(self) -> str:
        """For default names and messages."""

    @property
    def label(self) -> str:
        """How a message refers to it: what kind of source, and its name."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What identifies the rows; `inputs` of run.json."""

    @property
    def name_key(self) -> dict[str, Any]:
        """What a default name's hash is made from, beside the cells."""

    @property
    def hooks(self) -> list[str]:
        """The hooks to train on, in order."""

    @property
    def d_in(self) -> int:
        """Width of the rows."""

    @property
    def provenance(self) -> Provenance:
        """Model and text behind the rows."""

    @property
    def run_details(self) -> dict[str, Any]:
        """What run.json says about the rows beside `inputs`. After `prepare`."""

    @property
    def profiled_rows(self) -> int:
        """How many rows profiles are made from. After `prepare`."""

    def epoch_rows(self, tokens: int | None) -> int | None:
        """Training rows of one epoch, for the default of ``--tokens``; may be None where `tokens` are given.

        Raises:
            UsageError: there are none, or finding out how many would take too long.
        """

    def changes_from(self, inputs: Mapping[str, Any]) -> str | None:
        """In what other `inputs` differ, ``--option old -> new, …``; None where they are of another kind of source."""

    def prepare(self, reporter: Reporter) -> None:
        """Does what profiles and streams need; streams made before are no longer used.

        Raises:
            Interrupted: a signal asked to stop.
        """

    def profile(self, hook: str) -> HookProfile:
        """Norms, sinks and bins of a hook."""

    def stream(self, profiles: Sequence[HookProfile], batch_size: int, seed: int, drop_sinks: bool) -> TrainingStream:
        """A stream of batches; all streams of a run are made before the first batch is taken.

        Args:
            profiles: one per hook.
            batch_size: rows per batch.
            seed: of the order.
            drop_sinks: leave out the rows that are sinks at the (one) hook.
        """

    def mixed_bytes(self, streams: Mapping[StreamKey, int]) -> int:
        """Memory of the rows that are mixed for streams with these keys, each of so many hooks. After `prepare`."""

    def held_out_rows(self, profile: HookProfile, batch_size: int) -> Iterator[tuple[HookRows, torch.Tensor]]:
        """Held-out rows of a hook with their context numbers [B], on the CPU; rows that are zero are left out."""


class StoreSource:
    """An activation store.

    Args:
        store: the activations.
        options: of training, for the layers and the buffer.
        share: the part of every batch that its streams yield.

    Raises:
        UsageError: a layer that the store does not hold.
    """

    def __init__(self, store: ActivationStore, options: TrainOptions, share: Share = WHOLE) -> None:
        self._store, self._share = store, share
        self._buffer_rows = options.buffer
        self.hooks = select_hooks(options.layers, store)
        self._contexts = Contexts(store)

    @property
    def name(self) -> str:
        return self._store.name

    @property
    def label(self) -> str:
        return f"the activations {self.name!r}"

    @property
    def inputs(self) -> dict[str, Any]:
        return {"activations": {"name": self.name, "manifest_sha256": self._store.manifest_sha256}}

    @property
    def name_key(self) -> dict[str, Any]:
        return {"store": self._store.manifest_sha256}

    @property
    def d_in(self) -> int:
        return self._store.manifest.d_in

    @property
    def provenance(self) -> Provenance:
        manifest = self._store.manifest
        corpus = (manifest.corpus or {}).get("name")
        return Provenance(manifest.model, corpus, manifest.context_size, manifest.packing, manifest.bos)

    @property
    def run_details(self) -> dict[str, Any]:
        return {}

    @property
    def profiled_rows(self) -> int:
        return self._store.manifest.rows

    def epoch_rows(self, tokens: int | None) -> int:
        held_out = (self._contexts.held_out(shard) for shard in range(len(self._store.manifest.shards)))
        rows = sum(int((~rows).sum()) for rows in held_out)
        if not rows:
            raise catalogue.NO_ROWS(f"{self.name} has no rows to train on; collect more with `nsae collect --tokens`")
        return rows

    def changes_from(self, inputs: Mapping[str, Any]) -> str | None:
        if "activations" not in inputs:
            return None
        earlier = inputs["activations"]
        old = earlier.get("name") if isinstance(earlier, dict) else earlier
        return f"activations {old!r} -> {self.name!r}" if old != self.name else "the store has changed"

    def prepare(self, reporter: Reporter) -> None:
        if (altered := describe_alterations(self._store.manifest)) is not None:
            reporter.note(f"{self.name}: {altered}")
        if not self._store.has_positions:
            reporter.warn(f"{self.name} has no positions: sink rule 1 is off, blocks of 128 rows stand for contexts")

    def profile(self, hook: str) -> HookProfile:
        return profile_hook(self._store, hook, self._contexts)

    def stream(self, profiles: Sequence[HookProfile], batch_size: int, seed: int, drop_sinks: bool) -> BatchStream:
        buffer = self._buffer_rows
        return BatchStream(self._store, profiles, self._contexts, batch_size, seed, buffer, drop_sinks, self._share)

    def mixed_bytes(self, streams: Mapping[StreamKey, int]) -> int:
        manifest = self._store.manifest
        window = min(self._buffer_rows, manifest.rows) * manifest.d_in * manifest.torch_dtype.itemsize
        return window * sum(streams.values()) // self._share.of

    def held_out_rows(self, profile: HookProfile, batch_size: int) -> Iterator[tuple[HookRows, torch.Tensor]]:
        return held_out_rows(self._store, profile, self._contexts, batch_size)


def select_hooks(layers: str | int | list[int | str] | None, store: ActivationStore) -> list[str]:
    """The stored hooks that ``--layers`` means; all of them without it.

    Raises:
        UsageError: a layer that the store does not hold.
    """
    if layers is None or layers == "all":
        return list(store.manifest.hooks)
    stored = {layer_of(hook): hook for hook in store.manifest.hooks}
    text = ",".join(map(str, layers)) if isinstance(layers, list) else str(layers)
    chosen: dict[str, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise catalogue.LAYER_NOT_THERE(f"--layers {text}: expected all, or numbers such as 6, 0,3 or 0-3")
        low, high = int(first), int(last or first)
        inside = {layer for layer in stored if layer is not None and low <= layer <= high}
        if len(inside) != high - low + 1:
            held = ", ".join(str(layer) for layer in stored if layer is not None) or "none that has a number"
            raise catalogue.LAYER_NOT_THERE(
                f"--layers {text}: {store.name} holds layers {held}; collect others with `nsae collect`"
            )
        chosen |= {stored[layer]: None for layer in sorted(inside)}
    return list(chosen)

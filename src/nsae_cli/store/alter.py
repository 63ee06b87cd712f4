"""Controls: stores whose norms were changed and whose directions were not.

What a loss makes of norms and what norms have to do with content cannot be told apart on one store. On a store whose
norms were permuted over directions they have nothing to do with each other any more; on one whose norms were stretched
every effect of norms grows or shrinks while each token keeps its place in their order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import Interrupted
from nsae_cli.metrics.groups import zero_rows
from nsae_cli.reporter import Reporter
from nsae_cli.store.batches import stable_seed
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.manifest import MANIFEST, Manifest, describe_alterations, read_manifest
from nsae_cli.store.profile import HookProfile, profile_hook
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name, log_timing
from nsae_cli.store.writer import StoreWriter, unneeded_files
from nsae_cli.values import Size

#: Tensors that every row keeps.
_KEPT = ("tokens", "positions", "documents")


class AlterOptions(BaseModel):
    """Options of `nsae alter`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    permute_norms: bool = Field(False, description="permute the norms of non-sink rows over their directions")
    stretch_norms: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="k of n ← ñ·(n/ñ)^k for non-sink rows"
    )
    seed: Size | None = Field(None, ge=0, description="of the permutation [default: 0]")

    @model_validator(mode="after")
    def _one_change(self) -> AlterOptions:
        if self.permute_norms == (self.stretch_norms is not None):
            raise ValueError("--permute-norms or --stretch-norms: give one of them")
        if self.seed is not None and not self.permute_norms:
            raise ValueError(f"--seed {self.seed}: only with --permute-norms; stretching draws nothing at random")
        return self

    def describe(self) -> dict[str, Any]:
        """What is done, for manifest.json."""
        if self.permute_norms:
            return {"change": "permute-norms", "seed": self.seed or 0}
        return {"change": "stretch-norms", "k": self.stretch_norms}

    @property
    def suffix(self) -> str:
        """For the default name: ``permuted-norms-seed0``, ``stretched-norms-2``."""
        if self.permute_norms:
            return f"permuted-norms-seed{self.seed or 0}"
        return f"stretched-norms-{self.stretch_norms!r}".removesuffix(".0")


@dataclass
class AlteredStore:
    """The new store, its manifest and whether it was there already."""

    artifact: Artifact
    manifest: Manifest
    already_complete: bool


def alter_store(
    store: ActivationStore, options: AlterOptions, workspace: Workspace, name: str | None, reporter: Reporter
) -> AlteredStore:
    """Writes a store with the same rows in the same order, whose non-sink norms are changed.

    A row x of norm n becomes x·n'/n, rounded to the storage dtype, and n' is its stored norm. Sinks (by the rules, per
    hook) and zero rows stay as they are, and so do tokens, positions and documents. Norms of hooks whose vectors are
    not stored are left out.

    Beside a few shards, 4 bytes a row and hook are in memory. An interrupted run goes on after its last durable shard.

    Args:
        store: the store to start from.
        options: the change.
        name: of the new store; None makes one from the old name and the change.

    Raises:
        UsageError: NAME is another store.
        ArtifactError: the store is damaged or holds nothing to change.
        NumericalError: a changed value does not fit the storage dtype, or rows are not finite.
        BusyError: another process is writing the new store.
        Interrupted: a signal asked to stop.
    """
    base = re.sub(r"[^A-Za-z0-9_.\-]+", "_", store.name).lstrip("._-")[:80] or "store"
    name = check_name(name or f"{base}-{options.suffix}")
    artifact = Artifact(Kind.ACTIVATIONS, name, workspace.folder(Kind.ACTIVATIONS, name))
    source = {"activations": store.name, "manifest_sha256": store.manifest_sha256}
    change = options.describe() | source
    if artifact.path.resolve() == store.path.resolve():
        raise catalogue.OUTPUT_IS_INPUT(f"--name {name} is the store itself; choose another --name")
    if (artifact.path / MANIFEST).is_file():
        manifest, _ = read_manifest(artifact.path)
        latest = manifest.altered[-1] if manifest.altered else {}
        if {key: latest.get(key) for key in change} != change:
            raise catalogue.NAME_TAKEN(f"--name {name} is another store; choose another --name")
        workspace.tidy(artifact.path, reporter, unneeded_files(artifact.path))
        return AlteredStore(artifact, manifest, already_complete=True)
    with workspace.writing(artifact.path, reporter):
        return _write_altered(store, options, artifact, change, reporter)


def _write_altered(
    store: ActivationStore, options: AlterOptions, artifact: Artifact, change: dict[str, Any], reporter: Reporter
) -> AlteredStore:
    name = artifact.name
    contexts = Contexts(store)
    alterations = [
        _Alteration.plan(store, profile_hook(store, hook, contexts), options) for hook in store.manifest.hooks
    ]
    done = change | {"hooks": {alteration.hook: alteration.summary for alteration in alterations}}
    for alteration in alterations:
        summary = alteration.summary
        reporter.note(
            f"{alteration.hook}: {summary['rows']:,} of {store.manifest.rows:,} norms change, "
            f"{summary['sinks']:,} sinks do not"
        )
    writer = StoreWriter(artifact.path, change)
    started = time.monotonic()
    try:
        if writer.durable_shards:
            reporter.note(f"going on with {writer.durable_shards} shards done")
        for index, tensors in _altered_shards(store, alterations, writer.durable, reporter):
            writer.write(index, tensors, nonfinite_rows=0)
        manifest = writer.finish(_description(store, done))
    except BaseException as error:
        writer.abandon()
        if isinstance(error, Interrupted):
            on_disk = f"{writer.durable_shards} shards of {name} are on disk"
            raise Interrupted(error.signum, f"stopped; {on_disk}, the same command goes on from there") from error
        raise
    log_timing(artifact.path, "alter", rows=manifest.rows, seconds=round(time.monotonic() - started, 3))
    reporter.note(f"{name}: {describe_alterations(manifest)}")
    _compare_sinks(open_activations(artifact.path), alterations, reporter)
    return AlteredStore(artifact, manifest, already_complete=False)


@dataclass
class _Alteration:
    """The change at one hook.

    Attributes:
        hook: its name.
        target: n' of every row of the store, float32.
        offsets: number of each shard's first row, and of all rows.
        summary: for manifest.json.
    """

    hook: str
    target: torch.Tensor
    offsets: list[int]
    summary: dict[str, Any]

    @classmethod
    def plan(cls, store: ActivationStore, profile: HookProfile, options: AlterOptions) -> _Alteration:
        norms, free = [], []
        for shard in range(len(store.manifest.shards)):
            interrupt.stop_if_requested("stopped; nothing was written, run the same command again")
            of_shard = store.norms(shard, profile.hook)
            norms.append(of_shard)
            free.append(~(profile.flags(shard, of_shard).any | zero_rows(of_shard, profile.norm_scale)))
        target, changed = torch.cat(norms), torch.cat(free)
        before = target[changed]
        if options.permute_norms:
            generator = torch.Generator().manual_seed(stable_seed("permute-norms", options.seed or 0, profile.hook))
            after = before[torch.randperm(len(before), generator=generator)]
        else:
            assert options.stretch_norms is not None
            after = stretch(before, profile.norm_scale, options.stretch_norms)
        target[changed] = after
        offsets = torch.tensor([0, *(len(part) for part in norms)]).cumsum(0).tolist()
        summary = {
            "norm_scale": profile.norm_scale,
            "rows": len(before),
            "sinks": profile.sink_counts.to_json()["total"],
        }
        return cls(profile.hook, target, offsets, summary)

    def norms(self, shard: int) -> torch.Tensor:
        """n' of a shard's rows, float32 [rows]."""
        return self.target[self.offsets[shard] : self.offsets[shard + 1]]


def stretch(norm: torch.Tensor, norm_scale: float, k: float) -> torch.Tensor:
    """ñ·(n/ñ)^k, float32 [B]: log n stretched by k about log ñ. k = 1 gives n itself, k = 0 gives ñ, both exactly."""
    if k == 0:
        return torch.full_like(norm, norm_scale)
    exact = norm.double()
    return (exact * (exact / norm_scale).pow(k - 1)).float()


def _altered_shards(
    store: ActivationStore, alterations: list[_Alteration], done: Container[int], reporter: Reporter
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Shard numbers, without those that are done, and their tensors."""
    shards = store.manifest.shards
    with reporter.task("altering", store.manifest.rows, "rows") as task:
        for index in range(len(shards)):
            if index in done:
                task.advance(shards[index].rows)
                continue
            interrupt.stop_if_requested("stopped")
            kept = [name for name in _KEPT if store.has(name)]
            tensors = store.read(index, [*store.manifest.hooks, *kept])
            for alteration in alterations:
                hook = alteration.hook
                tensors[hook] = _rescale(store, index, hook, tensors[hook], alteration.norms(index))
            tensors |= {name: tensors[name].int() for name in kept}
            tensors["norms"] = torch.stack([alteration.norms(index) for alteration in alterations], dim=1)
            yield index, tensors
            task.advance(shards[index].rows)


def _rescale(store: ActivationStore, shard: int, hook: str, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x·n'/n of the rows of a shard, in their dtype; rows whose norm stays, and zero rows, bit by bit as they were."""
    norm = store.norms(shard, hook)
    rows = (target != norm).nonzero().squeeze(1)
    scaled = x[rows].double() * (target[rows].double() / norm[rows].double())[:, None]
    largest = scaled.abs().amax(dim=1) if len(rows) else scaled.new_zeros(0)
    most = torch.finfo(x.dtype).max
    too_large = (~(largest <= most)).nonzero().squeeze(1)  # a NaN too
    if len(too_large):
        worst = int(too_large[0])
        raise catalogue.STORAGE_OVERFLOW(
            f"{store.name}: row {int(rows[worst]):,} of {store.manifest.shards[shard].file} at {hook} would hold "
            f"{float(largest[worst]):.4g}, which does not fit {store.manifest.dtype} (at most {most:,.5g}); "
            f"give a smaller --stretch-norms, or collect with --dtype bf16"
        )
    changed = x.clone()
    changed[rows] = scaled.to(x.dtype)
    return changed


def _description(store: ActivationStore, change: dict[str, Any]) -> dict[str, Any]:
    """The new manifest without rows and shards: the old one's, and what was done."""
    manifest = store.manifest
    kept = manifest.model_dump(exclude={"format_version", "rows", "shards", "command", "checksum"})
    return kept | {"norm_hooks": list(manifest.hooks), "altered": [*(manifest.altered or []), change]}


def _compare_sinks(altered: ActivationStore, alterations: list[_Alteration], reporter: Reporter) -> None:
    """Warns where the rules find other sinks in the new store, since every later command goes by them."""
    contexts = Contexts(altered)
    for alteration in alterations:
        found = profile_hook(altered, alteration.hook, contexts).sink_counts.to_json()["total"]
        before = alteration.summary["sinks"]
        if found != before:
            reporter.warn(
                f"{alteration.hook}: the sink rules find {found:,} sinks in the altered store, {before:,} before; "
                f"rows that became longer than 10 × the median count as sinks from here on"
            )

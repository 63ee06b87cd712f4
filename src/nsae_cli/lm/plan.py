"""What a run will take: rows, bytes and time, known before the weights are loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsae_cli import catalogue
from nsae_cli.lm.config import MAX_SHARD_ROWS, ResolvedConfig
from nsae_cli.lm.loading import ModelInfo
from nsae_cli.lm.tokenizing import TokenIds
from nsae_cli.store.writable import nearest_existing

MAX_SHARD_BYTES = 256 * 2**20

_DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_INDEX_BYTES = 12  # tokens, positions and documents, int32 each
_NORM_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """Size of a store.

    Attributes:
        row_bytes: bytes on disk of one row, all its tensors together.
        shard_contexts: contexts per shard, a multiple of the batch: a resumed run then has the same batches, and its
            shards the same bytes, as one that was never interrupted.
        rows: how many there will be at most; None for a whole corpus of unknown size.
        estimated: `rows` is estimated from the corpus's size.
    """

    row_bytes: int
    shard_contexts: int
    rows: int | None
    estimated: bool

    def shards(self, context: int) -> int | None:
        """How many shards there will be, of contexts of this many rows."""
        return None if self.rows is None else -(-self.rows // (self.shard_contexts * context))

    @property
    def total_bytes(self) -> int | None:
        """Bytes on disk at the end."""
        return None if self.rows is None else self.rows * self.row_bytes


def make_plan(
    resolved: ResolvedConfig, info: ModelInfo, text_bytes: int | None, sample: Sequence[TokenIds], sample_bytes: int
) -> Plan:
    """Plans a store.

    Args:
        resolved: the run.
        info: the model.
        text_bytes: size of the corpus's text; None where unknown.
        sample: token ids of its first documents.
        sample_bytes: UTF-8 bytes of the same documents.
    """
    row_bytes = (
        len(resolved.layers) * info.d_model * _DTYPE_BYTES[resolved.dtype]
        + len(resolved.norm_layers(info.n_layers)) * _NORM_BYTES
        + _INDEX_BYTES
    )
    shard_rows = min(MAX_SHARD_ROWS, MAX_SHARD_BYTES // row_bytes)
    batches = max(1, shard_rows // (resolved.batch_size * resolved.context))
    rows, estimated = _expected_rows(resolved, text_bytes, sample, sample_bytes)
    return Plan(row_bytes, batches * resolved.batch_size, rows, estimated)


def _expected_rows(
    resolved: ResolvedConfig, text_bytes: int | None, sample: Sequence[TokenIds], sample_bytes: int
) -> tuple[int | None, bool]:
    limit = resolved.row_limit
    if limit is not None and resolved.packing:
        limit = limit // resolved.context * resolved.context
    if text_bytes is None:
        return limit, False
    sample_tokens = sum(len(ids) + 1 for ids in sample)
    # Each context's own separator comes on top of the stream.
    per_token = resolved.context / (resolved.context - resolved.bos)
    in_corpus = round(text_bytes * sample_tokens / max(1, sample_bytes) * per_token)
    return (in_corpus, True) if limit is None or in_corpus < limit else (limit, False)


def check_space(plan: Plan, folder: Path) -> int:
    """Bytes free where `folder` is or will be.

    Raises:
        ResourceError: the store, less what it already holds, does not fit.
    """
    free, held = free_bytes(folder), held_bytes(folder)
    if plan.total_bytes is not None and plan.total_bytes - held > free:
        raise catalogue.DISK_TOO_SMALL(
            f"the store needs {size_text(plan.total_bytes - held)}, {size_text(free)} are free in "
            f"{nearest_existing(folder)}; lower --tokens, store fewer --layers, or choose another --workspace"
        )
    return free


def free_bytes(folder: Path) -> int:
    """Bytes free where `folder` is or will be."""
    return shutil.disk_usage(nearest_existing(folder)).free


def held_bytes(folder: Path) -> int:
    """Bytes that a store's shards take already."""
    return sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))


def size_text(size: float) -> str:
    """Bytes for people: ``3.1 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def duration_text(seconds: float) -> str:
    """Seconds for people: ``40 s``, ``35 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Activation stores written by hand, with safetensors alone, and the rows that they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HOOK = "blocks.2.hook_resid_post"
#: Two hooks, for stores of several layers.
HOOKS = ("blocks.1.hook_resid_post", "blocks.4.hook_resid_post")


@dataclass
class Rows:
    """What a store holds: vectors by hook [N, d], positions [N]."""

    x: dict[str, torch.Tensor]
    positions: torch.Tensor


def make_rows(
    contexts: int = 60, context: int = 8, d_in: int = 12, hooks: tuple[str, ...] = (HOOK,), sink: float = 30.0
) -> Rows:
    """Random rows whose norms vary; position 0 of every context is `sink` × as long (1 for none)."""
    generator = torch.Generator().manual_seed(3)
    positions = torch.arange(contexts * context) % context
    x = {}
    for number, hook in enumerate(hooks):
        rows = torch.randn(contexts * context, d_in, generator=generator) + 0.3
        rows *= (1 + number) * torch.exp(0.4 * torch.randn(contexts * context, 1, generator=generator))
        rows[positions == 0] *= sink
        x[hook] = rows.half()
    return Rows(x, positions)


def write_foreign(folder: Path, rows: Rows, shard_rows: list[int], **changes: Any) -> Path:
    """A store as another tool would write it: the required manifest keys and the vectors, nothing else."""
    folder.mkdir(parents=True)
    shards, start = [], 0
    for index, count in enumerate(shard_rows):
        name = f"part{index}.safetensors"
        part = {hook: x[start : start + count].contiguous() for hook, x in rows.x.items()}
        save_file(part, folder / name)
        shards.append({"file": name, "rows": count})
        start += count
    first = next(iter(rows.x.values()))
    manifest = {
        "format_version": 1,
        "hooks": list(rows.x),
        "d_in": first.shape[1],
        "dtype": str(first.dtype).removeprefix("torch."),
        "rows": start,
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def write_full(folder: Path, rows: Rows, shard_rows: list[int]) -> Path:
    """A store with positions, tokens, documents, norms and hashes, through nsae's own writer."""
    from nsae_cli.store.writer import StoreWriter

    writer = StoreWriter(folder, {"tokens": sum(shard_rows)})
    try:
        start = 0
        for index in range(len(shard_rows)):
            part = slice(start, start + shard_rows[index])
            start = part.stop
            if index in writer.durable:
                continue
            tensors = {hook: x[part].clone() for hook, x in rows.x.items()}
            count = shard_rows[index]
            tensors |= {
                "positions": rows.positions[part].int(),
                "tokens": (rows.positions[part] * 7).int(),
                "documents": torch.zeros(count, dtype=torch.int32),
                "norms": torch.stack([torch.linalg.vector_norm(x[part].float(), dim=1) for x in rows.x.values()], 1),
            }
            writer.write(index, tensors, nonfinite_rows=0)
        writer.finish(
            {
                "hooks": list(rows.x),
                "norm_hooks": list(rows.x),
                "d_in": next(iter(rows.x.values())).shape[1],
                "dtype": str(next(iter(rows.x.values())).dtype).removeprefix("torch."),
                "context_size": int(rows.positions.max()) + 1,
                "bos": True,
            }
        )
    except BaseException:
        writer.abandon()
        raise
    return folder

"""`nsae collect --dry-run`: what a collection would take, without writing anything."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from nsae_cli.launch import Placement
from nsae_cli.lm.collect import Job, find_complete, inspect, plan_of
from nsae_cli.lm.config import CollectConfig
from nsae_cli.lm.loading import ModelInfo
from nsae_cli.lm.plan import free_bytes, held_bytes
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.lm.tokenizing import load_tokenizer_for
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.progress import durable_shards
from nsae_cli.store.workspace import Workspace

#: Batches that are measured, after one that pays for warming up.
_MEASURED = 3


def dry_run(config: CollectConfig, workspace: Workspace, worker: Placement) -> dict[str, Any]:
    """What `collect` with the same options would do: rows, shards, bytes, time, and where.

    Reads the model's configuration, its tokenizer and the corpus's first documents, and, where its weights are on this
    machine, runs a few batches to measure the time.

    Returns:
        name, path, state (``new``, ``unfinished``, ``complete``); what is collected from what, and on what; contexts,
        rows, shards and bytes (None where not known before the corpus is read), estimated (they are reckoned from the
        size of its text); durable_shards and durable_rows; free_bytes, fits; workers; rows_per_second of one worker and
        seconds for what is left to do by all of them (None where not known, then `unknown_time` says why).

    Raises:
        UsageError, ArtifactError, ResourceError: as `collect` before it begins, but for a disk that is too small.
    """
    with quiet_libraries():
        request = inspect(config, workspace, worker)
        folder, resolved = request.artifact.path, request.resolved
        complete = find_complete(request.artifact, resolved.model_dump())
        tokenizer = load_tokenizer_for(request.corpus.content, request.info, SilentReporter())
        plan = plan_of(request, tokenizer)
        durable = durable_shards(folder, resolved.model_dump())
        durable_rows = sum(entry.rows for entry in durable.values())
        rate, unknown = None, "the store is complete"
        if complete is None:
            rate, unknown = _rows_per_second(Job(request, tokenizer, plan, worker))
        else:
            plan = dataclasses.replace(plan, rows=complete.rows)
        rows, size, shards = plan.rows, plan.total_bytes, plan.shards(resolved.context)
        if rate is not None and rows is None:
            unknown = "how much text there is is not known before it is read"
        seconds = None
        if rate is not None and rows is not None and shards is not None:
            seconds = max(0, rows - durable_rows) / rate / max(1, min(worker.world, shards))
        free = free_bytes(folder)
        return {
            "name": request.artifact.name,
            "path": str(folder),
            "state": "complete" if complete is not None else "unfinished" if durable else "new",
            "model": request.info.name,
            "corpus": request.corpus.name,
            "layers": resolved.layers,
            "norm_layers": resolved.norm_layers(request.info.n_layers),
            "site": resolved.site,
            "dtype": resolved.dtype,
            "model_dtype": resolved.model_dtype,
            "device": request.device_reason,
            "context": resolved.context,
            "packing": resolved.packing,
            "estimated": plan.estimated and complete is None,
            "contexts": rows // resolved.context if rows is not None and resolved.packing else None,
            "rows": rows,
            "shards": shards,
            "bytes": size,
            "durable_shards": len(durable),
            "durable_rows": durable_rows,
            "free_bytes": free,
            "fits": size is None or complete is not None or size - held_bytes(folder) <= free,
            "workers": worker.world,
            "rows_per_second": rate,
            "seconds": seconds,
            "unknown_time": unknown if seconds is None else None,
        }


def _rows_per_second(job: Job) -> tuple[float | None, str]:
    """How fast this machine harvests, writing aside; or why that is not known."""
    if not _is_here(job.request.info):
        return None, "the model's weights are not on this machine"
    some = itertools.islice(job.contexts(job.packer()), (1 + _MEASURED) * job.request.resolved.batch_size)
    with job.threads:
        batches = job.harvest(some)
        if next(batches, None) is None:
            return None, "there is too little text to measure"
        started = time.perf_counter()
        rows = sum(batch.rows for batch in batches)
        seconds = time.perf_counter() - started
    return (rows / seconds, "") if rows else (None, "there is too little text to measure")


def _is_here(info: ModelInfo) -> bool:
    """Whether the weights can be loaded without a download."""
    if Path(info.source).is_dir():
        return True
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(info.source, name, revision=info.revision), str) for name in names)

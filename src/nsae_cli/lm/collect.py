"""`nsae collect`: a model and a corpus → an activation store.

`collect` reads top to bottom: inspect, resolve, plan, run, describe. The run can be interrupted anywhere and goes on at
the last durable shard when the same command is given again; a resumed store has the same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from nsae_cli import catalogue, interrupt
from nsae_cli.device import choose_device, one_thread_if_small
from nsae_cli.errors import Interrupted
from nsae_cli.lm.config import CollectConfig, ResolvedConfig, resolve
from nsae_cli.lm.corpus import Corpus, open_corpus, refuse_output_in_corpus
from nsae_cli.lm.harvest import HarvestedBatch, Harvester, HarvestSpec
from nsae_cli.lm.layers import hook_name
from nsae_cli.lm.loading import DTYPE_NAMES, DTypeName, ModelInfo, inspect_model, load_model
from nsae_cli.lm.packing import Context, Packer
from nsae_cli.lm.plan import Plan, check_space, duration_text, make_plan, size_text
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.lm.records import holds_something
from nsae_cli.lm.shard_buffer import ShardBuffer
from nsae_cli.lm.tokenizing import DocumentTokenizer, load_tokenizer_for
from nsae_cli.reporter import Reporter
from nsae_cli.store.manifest import MANIFEST, Manifest, read_manifest
from nsae_cli.store.shards import StoreWriter, describe_changes, unneeded_files
from nsae_cli.store.workspace import Artifact, Kind, Workspace, config_hash, log_timing
from nsae_cli.store.writable import require_writable

_SAMPLE_DOCUMENTS = 256
_SAMPLE_CHARACTERS = 2**17

T = TypeVar("T")


@dataclass(frozen=True)
class CollectResult:
    """A complete store.

    Attributes:
        artifact: where it is.
        manifest: what is in it.
        reused: it was complete before.
    """

    artifact: Artifact
    manifest: Manifest
    reused: bool


def collect(config: CollectConfig, workspace: Workspace, reporter: Reporter) -> CollectResult:
    """Collects activations into the workspace, goes on with an interrupted collection, or finds a complete one.

    Raises:
        UsageError: an option does not fit model or corpus, the corpus is empty, or the name belongs to other options.
        ArtifactError: model, tokenizer or an unfinished store is damaged.
        ResourceError: model, hub, corpus, device, memory or disk not available.
        NumericalError: values that are not finite or do not fit the storage dtype.
        BusyError: another process is writing the store.
        Interrupted: a signal asked to stop; the same command goes on.
    """
    with quiet_libraries():
        device, device_reason = choose_device(config.device)
        info = inspect_model(config.model, config.revision)
        choice = config.corpus_choice(info.embedded)
        refuse_output_in_corpus(choice, workspace.root)
        corpus = open_corpus(choice)
        resolved = resolve(config, info, corpus, device)
        options = resolved.model_dump()
        base = info.name.rsplit("/", 1)[-1]
        name = config.name or f"{base}-{resolved.site}-{config_hash(options)}"
        artifact = Artifact(Kind.ACTIVATIONS, name, workspace.folder(Kind.ACTIVATIONS, name))

        if (found := _complete(artifact, options, reporter)) is not None:
            workspace.tidy(artifact.path, reporter, unneeded_files(artifact.path))
            return found
        require_writable(artifact.path)
        with workspace.writing(artifact.path, reporter):
            # Looked at again: another process may have completed it just now.
            if (found := _complete(artifact, options, reporter)) is not None:
                return found
            tokenizer = load_tokenizer_for(corpus.content, info, reporter)
            plan = _plan(resolved, info, corpus, tokenizer)
            free = check_space(plan, artifact.path)
            reporter.note(f"{name}: {_plan_text(plan)}, {size_text(free)} free")
            reporter.note(f"device {device_reason}, {resolved.model_dtype}")
            manifest = _run(_Job(resolved, info, corpus, tokenizer, plan, device), artifact, reporter)
            return CollectResult(artifact, manifest, reused=False)


def _complete(artifact: Artifact, options: dict[str, Any], reporter: Reporter) -> CollectResult | None:
    """The store, if it is complete.

    Raises:
        UsageError: it was collected with other options.
        ArtifactError: its manifest is damaged.
    """
    if not (artifact.path / MANIFEST).is_file():
        return None
    manifest, _ = read_manifest(artifact.path)
    _require_same_options(artifact.name, manifest, options)
    reporter.note(f"{artifact.name} is already complete: {manifest.rows:,} rows")
    return CollectResult(artifact, manifest, reused=True)


def _require_same_options(name: str, manifest: Manifest, options: dict[str, Any]) -> None:
    earlier = (manifest.command or {}).get("options")
    if not isinstance(earlier, dict):
        raise catalogue.NAME_TAKEN(
            f"--name {name}: a store of this name is there that nsae did not collect; give another --name"
        )
    if earlier != options:
        raise catalogue.OPTIONS_CHANGED(
            f"--name {name}: the store of this name was made with other options "
            f"({describe_changes(earlier, options)}); give another --name"
        )


def _plan(resolved: ResolvedConfig, info: ModelInfo, corpus: Corpus, tokenizer: DocumentTokenizer) -> Plan:
    """Plans from the corpus's first documents, which also shows now whether it can be read at all."""
    documents = _until_stopped(corpus.documents())
    # How many tokens its text makes is asked only where the size of its text is known.
    sample = list(itertools.islice(documents, 1 if corpus.text_bytes is None else _SAMPLE_DOCUMENTS))
    if not any(holds_something(document) for document in itertools.chain(sample, documents)):
        raise catalogue.CORPUS_EMPTY(f"corpus {corpus.name} is empty: it holds no text; give another --corpus")
    sample = [document[:_SAMPLE_CHARACTERS] if isinstance(document, str) else document for document in sample]
    token_ids = [ids for batch in tokenizer.encode_batches(sample) for ids in batch]
    sample_bytes = sum(len(document.encode("utf-8")) for document in sample if isinstance(document, str))
    return make_plan(resolved, info, corpus.text_bytes, token_ids, sample_bytes)


def _plan_text(plan: Plan) -> str:
    if plan.rows is None or plan.total_bytes is None:
        return f"the whole corpus, {plan.row_bytes:,} bytes a row on disk"
    about = "about " if plan.estimated else "up to "
    return f"{about}{plan.rows:,} rows, {size_text(plan.total_bytes)} on disk"


@dataclass(frozen=True)
class _Job:
    """What a run needs, all checked."""

    resolved: ResolvedConfig
    info: ModelInfo
    corpus: Corpus
    tokenizer: DocumentTokenizer
    plan: Plan
    device: torch.device

    def harvester(self) -> Harvester:
        """Loads the weights."""
        resolved = self.resolved
        spec = HarvestSpec(
            site=resolved.site,
            vector_layers=tuple(resolved.layers),
            norm_layers=tuple(resolved.norm_layers(self.info.n_layers)),
            storage_dtype=DTYPE_NAMES[resolved.dtype],
        )
        model = load_model(self.info, self.device, DTYPE_NAMES[resolved.model_dtype])
        return Harvester(model, self.info.family, spec, self.device, self.tokenizer.text_of)

    def packer(self) -> Packer:
        """The rules by which documents become contexts."""
        resolved = self.resolved
        return Packer(resolved.layout(self.tokenizer.separator, resolved.row_limit))


def _run(job: _Job, artifact: Artifact, reporter: Reporter) -> Manifest:
    packer = job.packer()
    contexts = packer.contexts(job.tokenizer.encode_batches(_until_stopped(job.corpus.documents())))
    first = next(contexts, None)
    if first is None:
        raise catalogue.CORPUS_TOO_SHORT(
            f"corpus {job.corpus.name} is too short: its {packer.dropped_tokens} tokens do not fill a context of "
            f"{job.resolved.context}; give a smaller --context, or --no-packing"
        )
    writer = StoreWriter(artifact.path, job.resolved.model_dump())
    started = time.perf_counter()
    try:
        durable_rows = writer.durable_rows
        if durable_rows:
            reporter.note(f"going on after {durable_rows:,} rows in {writer.durable_shards} shards")
        numbered = enumerate(itertools.chain([first], contexts))
        # Shards hold whole batches, so leaving some shards out moves no border of the others' batches.
        left = (one for number, one in numbered if number // job.plan.shard_contexts not in writer.durable)
        # The largest product is the MLP's, four times the model's width.
        product = 4 * job.resolved.batch_size * job.resolved.context * job.info.d_model**2
        with one_thread_if_small(product, job.device):
            _write_shards(job, writer, _harvest(job, left), durable_rows, reporter)
        manifest = writer.finish(_description(job, packer))
    except BaseException as error:
        writer.abandon()
        if isinstance(error, Interrupted):
            on_disk = f"{writer.durable_shards} shards of {artifact.name} are on disk"
            raise Interrupted(error.signum, f"stopped; {on_disk}, the same command goes on from there") from error
        raise
    seconds = time.perf_counter() - started
    collected = manifest.rows - durable_rows
    with contextlib.suppress(OSError):  # the store is complete, with or without a note of how long it took
        log_timing(artifact.path, "collect", device=str(job.device), rows=collected, seconds=round(seconds, 3))
    reporter.note(_summary(job, manifest, packer))
    return manifest


def _harvest(job: _Job, contexts: Iterator[Context]) -> Iterator[HarvestedBatch]:
    """Rows of the contexts that are left; where none are, the weights are not even loaded."""
    first = next(contexts, None)
    if first is None:
        return
    harvester = job.harvester()
    yield from harvester.harvest(_batches(_until_stopped(itertools.chain([first], contexts)), job.resolved.batch_size))


def _write_shards(
    job: _Job, writer: StoreWriter, harvested: Iterator[HarvestedBatch], durable_rows: int, reporter: Reporter
) -> None:
    """Gathers batches into shards and hands each full one to the writer's thread."""
    shard = ShardBuffer(job.plan.shard_contexts, job.resolved.context)
    index = writer.missing_from(0)
    clock = _Clock(None if job.plan.rows is None else job.plan.rows - durable_rows)
    with reporter.task("collect", job.plan.rows, "rows") as task:
        task.advance(durable_rows)
        for batch in harvested:
            shard.add(batch)
            if shard.full:
                # Rows that are not finite have stopped the run before.
                writer.write(index, shard.take(), nonfinite_rows=0)
                index = writer.missing_from(index + 1)
            task.advance(batch.rows)
            if (expected := clock.after(batch.rows)) is not None:
                reporter.note(f"expected time {duration_text(expected)}")
        if not shard.empty:
            writer.write(index, shard.take(), nonfinite_rows=0)


class _Clock:
    """Expects the whole run's time from one batch: the second, since the first pays for warming up."""

    def __init__(self, rows: int | None) -> None:
        self._rows = rows
        self._batches = 0
        self._last = 0.0

    def after(self, batch_rows: int) -> float | None:
        """To be called after each batch; the expected seconds for all rows, once, after the second batch."""
        self._batches += 1
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        if self._batches != 2 or self._rows is None:
            return None
        return elapsed / batch_rows * self._rows


def _until_stopped(items: Iterable[T]) -> Iterator[T]:
    """The same items, unless a signal asks to stop."""
    for item in items:
        signum = interrupt.stop_requested()
        if signum is not None:
            raise Interrupted(signum, "stopped before anything was collected")
        yield item


def _batches(contexts: Iterable[Context], size: int) -> Iterator[list[Context]]:
    iterator = iter(contexts)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _description(job: _Job, packer: Packer) -> dict[str, Any]:
    """The manifest without rows and shards."""
    resolved, info = job.resolved, job.info
    return {
        "hooks": [hook_name(layer, resolved.site) for layer in resolved.layers],
        "d_in": info.d_model,
        "dtype": _json_dtype(resolved.dtype),
        "norm_hooks": [hook_name(layer, resolved.site) for layer in resolved.norm_layers(info.n_layers)],
        "model": info.name,
        "model_sha256": info.model_sha256,
        "revision": info.revision,
        "n_layers": info.n_layers,
        "model_type": info.model_type,
        "tokenizer": job.tokenizer.identity_for(job.corpus.content),
        "special_token_ids": job.tokenizer.special_token_ids,
        "corpus": job.corpus.identity,
        "site": resolved.site,
        "context_size": resolved.context,
        "packing": resolved.packing,
        "bos": resolved.bos,
        "model_dtype": _json_dtype(resolved.model_dtype),
        "dropped": {"tokens": packer.dropped_tokens, "documents": packer.dropped_documents},
        "versions": {
            "nsae": version("nsae"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "safetensors": version("safetensors"),
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        },
        "command": {"name": "collect", "options": resolved.model_dump()},
    }


def _json_dtype(name: DTypeName) -> str:
    """``fp16`` → ``float16``."""
    return str(DTYPE_NAMES[name]).removeprefix("torch.")


def _summary(job: _Job, manifest: Manifest, packer: Packer) -> str:
    text = f"{manifest.rows:,} rows"
    limit = job.resolved.row_limit
    if limit is not None and manifest.rows <= limit - job.resolved.context:
        text += f" (the corpus ended before {limit:,})"
    if packer.dropped_tokens:
        where = "behind --context" if packer.layout.rows_are_contexts else "at the corpus's end"
        why = "" if packer.layout.rows_are_contexts else " (no whole context)"
        text += f", {packer.dropped_tokens:,} tokens {where} dropped{why}"
    if packer.dropped_documents:
        text += f", {packer.dropped_documents:,} documents without a row"
    return text

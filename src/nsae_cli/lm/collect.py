"""`nsae collect`: a model and a corpus → an activation store.

`collect` reads top to bottom: inspect, resolve, plan, run, describe. The run can be interrupted anywhere and goes on at
the last durable shard when the same command is given again; a resumed store has the same bytes. `collect_share` is the
same for one of several processes that share the work (`lm.shares`).
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
from nsae_cli.device import one_thread_if_small
from nsae_cli.errors import Interrupted, NsaeError
from nsae_cli.launch import ALONE, Placement
from nsae_cli.lm.ahead import ahead
from nsae_cli.lm.config import CollectConfig, ResolvedConfig, resolve
from nsae_cli.lm.corpus import Corpus, open_corpus, refuse_output_in_corpus
from nsae_cli.lm.harvest import HarvestedBatch, Harvester, HarvestSpec
from nsae_cli.lm.layers import hook_name
from nsae_cli.lm.loading import DTYPE_NAMES, DTypeName, ModelInfo, inspect_model, load_model
from nsae_cli.lm.packing import Context, Packer
from nsae_cli.lm.plan import Plan, check_space, make_plan, size_text
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.lm.records import holds_something
from nsae_cli.lm.shard_buffer import ShardBuffer, write_shards
from nsae_cli.lm.shares import Share, WorkerReporter, device_of, idle_text, last_word, left_to_others
from nsae_cli.lm.tokenizing import DocumentTokenizer, load_tokenizer_for
from nsae_cli.reporter import Reporter
from nsae_cli.store.lock import Turn
from nsae_cli.store.manifest import MANIFEST, Manifest, read_manifest
from nsae_cli.store.shards import describe_changes, shards_text
from nsae_cli.store.workspace import Artifact, Kind, Workspace, config_hash, log_timing
from nsae_cli.store.writable import require_writable
from nsae_cli.store.writer import StoreWriter, unneeded_files

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
    result = _collect(config, workspace, reporter, ALONE)
    assert result is not None  # alone it either completes the store or fails
    return result


def collect_share(
    config: CollectConfig, workspace: Workspace, reporter: Reporter, worker: Placement
) -> CollectResult | None:
    """As `collect`, for one of several processes that share the shards of a store; none waits for another.

    Returns:
        The store, for the one worker that has completed it, or for worker 0 where it was complete before; None for all
        others.

    Raises:
        ArtifactError: also where all that is left belongs to a worker that was killed.
        Others as `collect`, with the worker's number in the message.
    """
    if worker.alone:
        return collect(config, workspace, reporter)
    try:
        return _collect(config, workspace, WorkerReporter(reporter, worker), worker)
    except NsaeError as error:
        error.reword(lambda text: f"worker {worker}: {text}")
        raise


def _collect(
    config: CollectConfig, workspace: Workspace, reporter: Reporter, worker: Placement
) -> CollectResult | None:
    with quiet_libraries():
        request = inspect(config, workspace, worker)
        resolved, artifact = request.resolved, request.artifact
        options = resolved.model_dump()
        if (found := _complete(artifact, options, reporter)) is not None:
            workspace.tidy(artifact.path, reporter, unneeded_files(artifact.path), worker)
            if worker.rank == 0:
                return found
            last_word(reporter, f"{artifact.name} is already complete")
            return None
        require_writable(artifact.path)
        software = {} if worker.alone else _versions() | {"device": request.device.type}
        with workspace.writing(artifact.path, reporter, worker, software) as turn:
            # Looked at again: another process may have completed it just now.
            if (found := _complete(artifact, options, reporter)) is not None:
                return found if worker.alone else None
            tokenizer = load_tokenizer_for(request.corpus.content, request.info, reporter)
            plan = plan_of(request, tokenizer)
            free = check_space(plan, artifact.path)
            reporter.note(f"{artifact.name}: {_plan_text(plan)}, {size_text(free)} free")
            if idle := idle_text(plan.shards(resolved.context), worker):
                reporter.warn(idle)
            reporter.note(f"device {request.device_reason}, {resolved.model_dtype}")
            job = Job(request, tokenizer, plan, worker)
            manifest = _run(job, turn, reporter)
            return None if manifest is None else CollectResult(artifact, manifest, reused=False)


@dataclass(frozen=True)
class Request:
    """What is to be collected, from where, on what and into what; nothing is loaded yet."""

    resolved: ResolvedConfig
    info: ModelInfo
    corpus: Corpus
    device: torch.device
    device_reason: str
    artifact: Artifact


def inspect(config: CollectConfig, workspace: Workspace, worker: Placement = ALONE) -> Request:
    """Finds model, corpus and device and fills in the defaults.

    Raises:
        UsageError, ArtifactError, ResourceError: as `collect`.
    """
    device, device_reason = device_of(config.device, worker)
    info = inspect_model(config.model, config.revision)
    choice = config.corpus_choice(info.embedded)
    refuse_output_in_corpus(choice, workspace.root)
    corpus = open_corpus(choice)
    resolved = resolve(config, info, corpus, device)
    base = info.name.rsplit("/", 1)[-1]
    name = config.name or f"{base}-{resolved.site}-{config_hash(resolved.model_dump())}"
    artifact = Artifact(Kind.ACTIVATIONS, name, workspace.folder(Kind.ACTIVATIONS, name))
    return Request(resolved, info, corpus, device, device_reason, artifact)


def _complete(artifact: Artifact, options: dict[str, Any], reporter: Reporter) -> CollectResult | None:
    """The store, if it is complete; says so."""
    if (manifest := find_complete(artifact, options)) is None:
        return None
    reporter.note(f"{artifact.name} is already complete: {manifest.rows:,} rows")
    return CollectResult(artifact, manifest, reused=True)


def find_complete(artifact: Artifact, options: dict[str, Any]) -> Manifest | None:
    """The manifest of the store, if it is complete.

    Raises:
        UsageError: it was collected with other options.
        ArtifactError: it is damaged.
    """
    if not (artifact.path / MANIFEST).is_file():
        return None
    manifest, _ = read_manifest(artifact.path)
    _require_same_options(artifact.name, manifest, options)
    return manifest


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


def plan_of(request: Request, tokenizer: DocumentTokenizer) -> Plan:
    """Plans from the corpus's first documents, which also shows now whether it can be read at all."""
    corpus = request.corpus
    documents = _until_stopped(corpus.documents())
    # How many tokens its text makes is asked only where the size of its text is known.
    sample = list(itertools.islice(documents, 1 if corpus.text_bytes is None else _SAMPLE_DOCUMENTS))
    if not any(holds_something(document) for document in itertools.chain(sample, documents)):
        raise catalogue.CORPUS_EMPTY(f"corpus {corpus.name} is empty: it holds no text; give another --corpus")
    sample = [document[:_SAMPLE_CHARACTERS] if isinstance(document, str) else document for document in sample]
    token_ids = [ids for batch in tokenizer.encode_batches(sample) for ids in batch]
    sample_bytes = sum(len(document.encode("utf-8")) for document in sample if isinstance(document, str))
    return make_plan(request.resolved, request.info, corpus.text_bytes, token_ids, sample_bytes)


def _plan_text(plan: Plan) -> str:
    if plan.rows is None or plan.total_bytes is None:
        return f"the whole corpus, {plan.row_bytes:,} bytes a row on disk"
    about = "about " if plan.estimated else "up to "
    return f"{about}{plan.rows:,} rows, {size_text(plan.total_bytes)} on disk"


@dataclass(frozen=True)
class Job:
    """What a run needs, all checked."""

    request: Request
    tokenizer: DocumentTokenizer
    plan: Plan
    worker: Placement = ALONE

    def harvester(self) -> Harvester:
        """Loads the weights."""
        resolved, info = self.request.resolved, self.request.info
        spec = HarvestSpec(
            site=resolved.site,
            vector_layers=tuple(resolved.layers),
            norm_layers=tuple(resolved.norm_layers(info.n_layers)),
            storage_dtype=DTYPE_NAMES[resolved.dtype],
        )
        model = load_model(info, self.request.device, DTYPE_NAMES[resolved.model_dtype])
        return Harvester(model, info.family, spec, self.request.device, self.tokenizer.text_of)

    def packer(self) -> Packer:
        """The rules by which documents become contexts."""
        resolved = self.request.resolved
        return Packer(resolved.layout(self.tokenizer.separator, resolved.row_limit))

    def contexts(self, packer: Packer) -> Iterator[Context]:
        """All contexts of the corpus, in its order.

        Raises:
            UsageError: there is none.
        """
        corpus = self.request.corpus
        contexts = packer.contexts(self.tokenizer.encode_batches(_until_stopped(corpus.documents())))
        first = next(contexts, None)
        if first is None:
            raise catalogue.CORPUS_TOO_SHORT(
                f"corpus {corpus.name} is too short: its {packer.dropped_tokens} tokens do not fill a context of "
                f"{self.request.resolved.context}; give a smaller --context, or --no-packing"
            )
        return itertools.chain([first], contexts)

    def harvest(self, contexts: Iterator[Context]) -> Iterator[HarvestedBatch]:
        """Rows of the contexts that are left; where none are, the weights are not even loaded."""
        first = next(contexts, None)
        if first is None:
            return
        left = _until_stopped(itertools.chain([first], contexts))
        yield from self.harvester().harvest(_batches(left, self.request.resolved.batch_size))

    @property
    def threads(self) -> contextlib.AbstractContextManager[int]:
        """As many threads as the work is worth."""
        resolved = self.request.resolved
        # The largest product is the MLP's, four times the model's width.
        product = 4 * resolved.batch_size * resolved.context * self.request.info.d_model**2
        return one_thread_if_small(product, self.request.device)


def _run(job: Job, turn: Turn, reporter: Reporter) -> Manifest | None:
    """Makes the shards of this worker's that are not there; the manifest too, if then none is missing."""
    artifact, worker = job.request.artifact, job.worker
    packer = job.packer()
    contexts = job.contexts(packer)
    with turn.taken():
        if (artifact.path / MANIFEST).is_file():
            return None
        writer = StoreWriter(artifact.path, job.request.resolved.model_dump(), worker)
    started = time.perf_counter()
    manifest = None
    try:
        if writer.durable_rows:
            reporter.note(f"going on after {writer.durable_rows:,} rows in {shards_text(writer.durable_shards)}")
        # Shards hold whole batches, so leaving some shards out moves no border of the others' batches.
        share = Share(contexts, job.plan.shard_contexts, writer.makes)
        # Each worker tokenizes the whole corpus, which must not hold up its own part of the harvest.
        walked = iter(share) if worker.alone else ahead(share, job.plan.shard_contexts)
        with job.threads, contextlib.closing(walked) as own:
            buffer = ShardBuffer(job.plan.shard_contexts, job.request.resolved.context)
            write_shards(job.harvest(own), writer, buffer, job.plan.rows, reporter)
        writer.wait()
        with turn.taken():
            # Whoever comes last finds all shards durable, and completes the store; nobody waits for others.
            if not (artifact.path / MANIFEST).is_file():
                missing = [] if worker.alone else writer.missing(share.shards)
                left = left_to_others(missing, share.shards, turn) if missing else ""
                manifest = None if missing else writer.finish(_description(job, packer))
            else:
                left = "another worker has completed the store"
    except BaseException as error:
        writer.abandon()
        if isinstance(error, Interrupted):
            kept = writer.durable_shards
            on_disk = f"{shards_text(kept)} of {artifact.name} {'is' if kept == 1 else 'are'} on disk"
            raise Interrupted(error.signum, f"stopped; {on_disk}, the same command goes on from there") from error
        raise
    spent = {"device": str(job.request.device), "seconds": round(time.perf_counter() - started, 3)}
    if not worker.alone:
        spent |= {"worker": str(worker)}
    with contextlib.suppress(OSError):  # what was made is durable, with or without a note of how long it took
        log_timing(artifact.path, "collect", rows=writer.written_rows, **spent)
    if manifest is not None:
        reporter.note(_summary(job, manifest, packer))
    if not worker.alone:
        last_word(reporter, f"{shards_text(writer.written_shards)} made; {left or 'the store is complete'}")
    return manifest


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


def _versions() -> dict[str, str]:
    return {
        "nsae": version("nsae"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def _description(job: Job, packer: Packer) -> dict[str, Any]:
    """The manifest without rows and shards."""
    resolved, info = job.request.resolved, job.request.info
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
        "tokenizer": job.tokenizer.identity_for(job.request.corpus.content),
        "special_token_ids": job.tokenizer.special_token_ids,
        "corpus": job.request.corpus.identity,
        "site": resolved.site,
        "context_size": resolved.context,
        "packing": resolved.packing,
        "bos": resolved.bos,
        "model_dtype": _json_dtype(resolved.model_dtype),
        "dropped": {"tokens": packer.dropped_tokens, "documents": packer.dropped_documents},
        "versions": _versions(),
        "command": {"name": "collect", "options": resolved.model_dump()},
    }


def _json_dtype(name: DTypeName) -> str:
    """``fp16`` → ``float16``."""
    return str(DTYPE_NAMES[name]).removeprefix("torch.")


def _summary(job: Job, manifest: Manifest, packer: Packer) -> str:
    text = f"{manifest.rows:,} rows"
    limit = job.request.resolved.row_limit
    if limit is not None and manifest.rows <= limit - job.request.resolved.context:
        text += f" (the corpus ended before {limit:,})"
    if packer.dropped_tokens:
        where = "behind --context" if packer.layout.rows_are_contexts else "at the corpus's end"
        why = "" if packer.layout.rows_are_contexts else " (no whole context)"
        text += f", {packer.dropped_tokens:,} tokens {where} dropped{why}"
    if packer.dropped_documents:
        text += f", {packer.dropped_documents:,} documents without a row"
    return text

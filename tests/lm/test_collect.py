"""`collect` end to end on a tiny model: rows, resuming, naming, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_gpt2 import MAX_CONTEXT, N_LAYERS, RecordingReporter, build_model, build_tokenizer
from torch import Tensor

from nsae_cli import interrupt
from nsae_cli.errors import Interrupted, NumericalError, ResourceError, UsageError
from nsae_cli.lm import collect as collect_module
from nsae_cli.lm import plan as plan_module
from nsae_cli.lm.collect import collect
from nsae_cli.lm.config import CollectConfig
from nsae_cli.store import commit
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Workspace
from nsae_cli.values import validate_options

NAMES = ["tokens", "positions", "documents", "norms"]


def changed(config: CollectConfig, **options: object) -> CollectConfig:
    return validate_options(CollectConfig, {**config.model_dump(), **options})


def read_all(store: ActivationStore, names: list[str]) -> dict[str, Tensor]:
    shards = [store.read(shard, names) for shard in range(len(store.manifest.shards))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in names}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two batches instead of 65 536 rows."""
    monkeypatch.setattr(plan_module, "MAX_SHARD_ROWS", 2 * 4 * 16)


@pytest.mark.usefixtures("small_shards")
def test_collected_rows_equal_an_independent_forward(
    tiny_config: CollectConfig, workspace: Workspace, documents: list[str], reporter: RecordingReporter
) -> None:
    result = collect(changed(tiny_config, layers="0,2", dtype="fp32"), workspace, reporter)
    store = open_activations(result.artifact.path)
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    rows = read_all(store, NAMES + hooks)

    tokenizer, stream = build_tokenizer(), []
    for text in documents:
        stream += [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    contexts = torch.tensor([[0, *stream[i : i + 15]] for i in range(0, len(stream) - 14, 15)])
    assert torch.equal(rows["tokens"].view(-1, 16).long(), contexts)
    assert store.manifest.dropped == {"tokens": len(stream) % 15, "documents": 0}
    assert len(store.manifest.shards) > 3

    blocks: list[Tensor] = []
    model = build_model()
    for block in model.transformer.h:
        block.register_forward_hook(lambda _m, _i, output: blocks.append(output.flatten(0, 1)))
    with torch.inference_mode():
        model(contexts)
    for layer, hook in ((0, hooks[0]), (2, hooks[1])):
        torch.testing.assert_close(rows[hook], blocks[layer], rtol=1e-5, atol=1e-5)
    norms = torch.stack([block.norm(dim=1) for block in blocks], dim=1)
    torch.testing.assert_close(rows["norms"], norms, rtol=1e-5, atol=1e-5)
    assert reporter.advanced == store.manifest.rows


def test_manifest_records_the_run(
    tiny_config: CollectConfig, workspace: Workspace, reporter: RecordingReporter
) -> None:
    result = collect(tiny_config, workspace, reporter)
    manifest = result.manifest
    assert manifest.hooks == ["blocks.1.hook_resid_post"], "the middle layer by default"
    assert manifest.norm_hooks == [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    assert (manifest.model, manifest.model_type, manifest.n_layers) == ("tiny-gpt2", "gpt2", N_LAYERS)
    assert (manifest.dtype, manifest.model_dtype, manifest.context_size) == ("float16", "float32", 16)
    assert manifest.special_token_ids == [0]
    assert set(manifest.versions or {}) == {"nsae", "torch", "transformers", "safetensors", "python"}
    assert (manifest.command or {})["name"] == "collect"
    text = (result.artifact.path / "manifest.json").read_text()
    assert "/tmp" not in text
    assert str(workspace.root) not in text
    assert "seconds" in (result.artifact.path / "timings.jsonl").read_text()


def test_first_documents_of_a_store(tiny_config: CollectConfig, workspace: Workspace) -> None:
    """A store without packing: pads are dropped, contexts start with <|endoftext|>, empty documents have no row."""
    reporter = RecordingReporter()
    result = collect(changed(tiny_config, packing=False, context=MAX_CONTEXT), workspace, reporter)
    rows = read_all(open_activations(result.artifact.path), NAMES)
    starts = rows["positions"] == 0
    assert (rows["tokens"][starts] == 0).all()
    assert not (rows["tokens"][~starts] == 0).any()
    assert (result.manifest.dropped or {})["documents"] == 60 - len(rows["documents"].unique())
    assert any("documents without a row" in note for note in reporter.notes)


@pytest.mark.parametrize(("tokens", "rows"), [(100, 96), (96, 96), ("1k", 992)])
def test_rows_are_whole_contexts(
    tokens: int | str, rows: int, tiny_config: CollectConfig, workspace: Workspace, reporter: RecordingReporter
) -> None:
    assert collect(changed(tiny_config, tokens=tokens), workspace, reporter).manifest.rows == rows


def test_corpus_that_ends_earlier_is_no_error(
    tiny_config: CollectConfig, workspace: Workspace, reporter: RecordingReporter
) -> None:
    result = collect(changed(tiny_config, tokens="1M"), workspace, reporter)
    assert 0 < result.manifest.rows < 1_000_000
    assert "the corpus ended before 1,000,000" in reporter.notes[-1]


def test_norms_stored_stops_early(
    tiny_config: CollectConfig, workspace: Workspace, reporter: RecordingReporter
) -> None:
    result = collect(changed(tiny_config, layers=0, norms="stored"), workspace, reporter)
    assert result.manifest.norm_hooks == result.manifest.hooks == ["blocks.0.hook_resid_post"]


# Reuse and resume ----------------------------------------------------------------------------------------------------


def test_same_command_finds_its_store(
    tiny_config: CollectConfig, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect(tiny_config, workspace, RecordingReporter())
    monkeypatch.setattr(collect_module, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    reporter = RecordingReporter()
    second = collect(tiny_config, workspace, reporter)
    assert (first.reused, second.reused) == (False, True)
    assert second.artifact == first.artifact
    assert "already complete" in reporter.notes[-1]
    other = changed(tiny_config, bos=False)
    monkeypatch.undo()
    assert collect(other, workspace, RecordingReporter()).artifact.name != first.artifact.name


def test_default_name(tiny_config: CollectConfig, workspace: Workspace) -> None:
    name = collect(tiny_config, workspace, RecordingReporter()).artifact.name
    assert name.startswith("tiny-gpt2-resid_post-")
    assert len(name) == len("tiny-gpt2-resid_post-") + 6


def test_name_of_another_configuration_is_refused(tiny_config: CollectConfig, workspace: Workspace) -> None:
    collect(changed(tiny_config, name="mine"), workspace, RecordingReporter())
    with pytest.raises(UsageError, match=r"--name mine: .*--context 16 -> 8.*--bos True -> False"):
        collect(changed(tiny_config, name="mine", context=8, bos=False), workspace, RecordingReporter())


def test_changed_corpus_content_is_another_configuration(
    tiny_config: CollectConfig, workspace: Workspace, corpus_folder: Path
) -> None:
    collect(changed(tiny_config, name="mine"), workspace, RecordingReporter())
    (corpus_folder / "003.txt").write_text("something else")
    with pytest.raises(UsageError, match="--corpus-sha256"):
        collect(changed(tiny_config, name="mine"), workspace, RecordingReporter())


def stop_after(monkeypatch: pytest.MonkeyPatch, polls: int) -> None:
    """From the given poll on, SIGTERM was received."""
    count = itertools.count(1)
    monkeypatch.setattr(interrupt, "stop_requested", lambda: 15 if next(count) > polls else None)


def store_files(folder: Path) -> dict[str, bytes]:
    names = ["manifest.json", *(path.name for path in folder.glob("shard-*"))]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("packing", [True, False])
def test_interrupted_store_ends_with_the_same_bytes(
    packing: bool, tiny_config: CollectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "MAX_SHARD_ROWS", 8 * 4 * 16)  # shards of eight batches
    config = changed(tiny_config, packing=packing, name="store")
    whole = collect(config, Workspace(tmp_path / "whole"), RecordingReporter())
    expected = store_files(whole.artifact.path)
    resumed_after_shards = set()
    for polls in (125, 180, 230, 290, 340):
        root = tmp_path / f"stopped-{polls}"
        with monkeypatch.context() as patch:
            stop_after(patch, polls)
            with pytest.raises(Interrupted, match="the same command goes on") as stop:
                collect(config, Workspace(root), RecordingReporter())
        assert stop.value.signum == 15
        folder = root / "activations" / "store"
        assert not (folder / "manifest.json").exists()
        resumed_after_shards.add(len(list(folder.glob("shard-*"))))
        result = collect(config, Workspace(root), RecordingReporter())
        assert store_files(result.artifact.path) == expected
    assert len(resumed_after_shards) > 3, "interruptions hit different places"


@pytest.mark.usefixtures("small_shards")
def test_durable_shards_are_not_run_again(
    tiny_config: CollectConfig, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on = {"shard-00003.safetensors"}

    def hook(operation: str, path: Path) -> None:
        if operation == "rename" and path.name in fail_on:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(commit, "fault_hook", hook)
        with pytest.raises(ResourceError, match="disk full"):
            collect(tiny_config, workspace, RecordingReporter())
    forwarded = []
    real_launch = collect_module.Harvester._launch
    monkeypatch.setattr(
        collect_module.Harvester,
        "_launch",
        lambda self, contexts: forwarded.append(len(contexts)) or real_launch(self, contexts),
    )
    reporter = RecordingReporter()
    result = collect(tiny_config, workspace, reporter)
    assert sum(forwarded) == result.manifest.rows // 16 - 3 * 8
    assert any("going on after 384 rows in 3 shards" in note for note in reporter.notes)
    assert reporter.advanced == result.manifest.rows


@pytest.mark.usefixtures("small_shards")
def test_all_shards_durable_but_no_manifest_needs_no_weights(
    tiny_config: CollectConfig, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hook(operation: str, path: Path) -> None:
        if operation == "rename" and path.name == "manifest.json":
            raise OSError(5, "Input/output error")

    # 8 contexts of 16 a shard: 256 rows are two whole shards.
    config = changed(tiny_config, tokens=256)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "fault_hook", hook)
        with pytest.raises(ResourceError):
            collect(config, workspace, RecordingReporter())
    monkeypatch.setattr(collect_module, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    assert collect(config, workspace, RecordingReporter()).manifest.rows == 256


def test_unfinished_store_of_other_options_is_refused(
    tiny_config: CollectConfig, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(tiny_config, name="mine")
    with monkeypatch.context() as patch:
        stop_after(patch, 150)
        with pytest.raises(Interrupted):
            collect(config, workspace, RecordingReporter())
    with pytest.raises(UsageError, match="--batch-size 4 -> 8"):
        collect(changed(config, batch_size=8), workspace, RecordingReporter())


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "load_model", lambda *_: pytest.fail("the weights were loaded"))


@pytest.mark.usefixtures("no_weights")
def test_layer_and_context_are_refused_together_before_the_weights(
    tiny_config: CollectConfig, workspace: Workspace
) -> None:
    with pytest.raises(UsageError) as caught:
        collect(changed(tiny_config, layers="40", context=64, batch_size=5000), workspace, RecordingReporter())
    message = str(caught.value)
    assert "layer 40: tiny-gpt2 has 0-2" in message
    assert "--context 64: tiny-gpt2 reads at most 32 tokens" in message
    assert "--batch-size 5000: expected at most 1024" in message


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("texts", [[], [""], [" \n", "\t"]])
def test_empty_corpus(texts: list[str], tiny_config: CollectConfig, workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in texts))
    with pytest.raises(UsageError, match=r"corpus empty.jsonl is empty"):
        collect(changed(tiny_config, corpus=str(path)), workspace, RecordingReporter())
    assert not (workspace.root / "activations").exists()


@pytest.mark.usefixtures("no_weights")
def test_corpus_shorter_than_a_context(tiny_config: CollectConfig, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    config = changed(tiny_config, corpus=str(tmp_path / "short.txt"))
    with pytest.raises(UsageError, match=r"its 4 tokens do not fill a context of 16; .*--no-packing"):
        collect(config, workspace, RecordingReporter())
    assert not (workspace.root / "activations").exists()


@pytest.mark.usefixtures("no_weights")
def test_store_that_does_not_fit_the_disk(
    tiny_config: CollectConfig, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(ResourceError, match=r"the store needs \d+\.\d kB, 10.0 kB are free in .*; lower --tokens"):
        collect(tiny_config, workspace, RecordingReporter())


def test_overflow_leaves_no_manifest(
    tiny_config: CollectConfig, workspace: Workspace, tmp_path: Path, model_folder: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "large"))
    model = build_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight *= 1e6
    model.save_pretrained(folder)
    config = changed(tiny_config, model=str(folder), name="x")
    with pytest.raises(NumericalError, match=r"layer 1: .*use --dtype bf16"):
        collect(config, workspace, RecordingReporter())
    assert not (workspace.root / "activations" / "x" / "manifest.json").exists()
    assert collect(changed(config, dtype="bf16", name="y"), workspace, RecordingReporter()).manifest.dtype == "bfloat16"


def test_bad_options_are_reported_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        validate_options(
            CollectConfig,
            {"dtype": "fp8", "context": "1", "tokens": "many", "site": "mlp", "name": "a/b", "colour": "red"},
        )
    message = str(caught.value)
    for part in (
        "--dtype fp8",
        "--context 1",
        "--tokens many",
        "--site mlp",
        "--name a/b",
        "--colour is not an option",
    ):
        assert part in message


def test_plan_is_reported_before_the_run(tiny_config: CollectConfig, workspace: Workspace) -> None:
    reporter = RecordingReporter()
    collect(changed(tiny_config, tokens=640), workspace, reporter)
    assert "up to 640 rows, 35.8 kB on disk" in reporter.notes[0]
    assert " free" in reporter.notes[0]
    assert reporter.notes[1].startswith("device cpu: ")
    assert any(note.startswith("expected time ") for note in reporter.notes)


def test_contexts_are_made_while_the_model_runs(
    tiny_config: CollectConfig, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing between the corpus and the shards holds more than a few batches, so memory does not grow with tokens."""
    read, landed, largest_lead = 0, 0, 0

    def documents() -> Iterator[str]:
        nonlocal read
        for _ in range(1500):
            read += 16
            yield "x" * 15

    real_open = collect_module.open_corpus
    monkeypatch.setattr(
        collect_module, "open_corpus", lambda choice: dataclasses.replace(real_open(choice), documents=documents)
    )
    real_land = collect_module.Harvester._land

    def land(self: object, batch: object) -> object:
        nonlocal landed, largest_lead
        harvested = real_land(self, batch)  # type: ignore[arg-type]
        landed += harvested.rows
        largest_lead = max(largest_lead, read - landed)
        return harvested

    monkeypatch.setattr(collect_module.Harvester, "_land", land)
    result = collect(tiny_config, workspace, RecordingReporter())
    assert result.manifest.rows > 20_000
    # The sample of the plan, one batch of documents, and the batches in flight.
    assert largest_lead < 3 * 256 * 16

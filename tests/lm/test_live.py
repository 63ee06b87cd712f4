"""Training while harvesting: the rows and their order, cuts and resuming, memory, refusals."""

from __future__ import annotations

import itertools
import json
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gpt2 import RecordingReporter, build_model, build_tokenizer

from nsae_cli import interrupt
from nsae_cli.errors import Interrupted, NsaeError, UsageError
from nsae_cli.experiment.train import TrainCommandOptions, choose_source
from nsae_cli.lm.collect import collect
from nsae_cli.lm.config import CollectConfig
from nsae_cli.lm.harvest import Harvester
from nsae_cli.lm.live import LiveSource, Window
from nsae_cli.store.batches import stable_seed
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Workspace
from nsae_cli.training.cell import Cell
from nsae_cli.training.loop import TrainResult, train
from nsae_cli.values import validate_options

#: Several windows of 5 batches (4 contexts of 16) and 2.2 epochs of the corpus; the last batch of a window is carried.
SMALL = {"d_sae": "20", "batch_size": "48", "buffer": "330", "lr": "0.003", "tokens": "5k", "device": "cpu"}
HARVEST = {"context": "16", "harvest_batch_size": "4"}
GRID = {"act": "relu,tanh-relu", "layers": "0,2", "sinks": "keep,drop", "seed": "0,1", "noise": "0.1"}


@pytest.fixture(scope="session")
def sink_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose position 0 is far longer than the others, in one coordinate: a sink by all three rules."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sink"
    model = build_model()
    with torch.no_grad():
        model.transformer.wpe.weight[0, 3] += 3000
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of `CONTEXTS` contexts of 16 tokens."""
    folder = tmp_path_factory.mktemp("texts") / "texts"
    folder.mkdir()
    draw = random.Random(1)
    words = ("the", "residual", "naïve", "→ sink", "\n")
    for i in range(24):
        (folder / f"{i:02d}.txt").write_bytes(" ".join(draw.choices(words, k=draw.randrange(30))).encode())
    return folder


CONTEXTS = 148

Run = Callable[..., TrainResult]


@pytest.fixture
def run(sink_model: Path, texts: Path, workspace: Workspace, reporter: RecordingReporter) -> Run:
    """`run(name, option=value, …)` trains from the model."""

    def run(name: str | None = None, model: Path = sink_model, **options: Any) -> TrainResult:
        given = SMALL | HARVEST | {"from_model": str(model), "corpus": str(texts)} | options
        validated = validate_options(TrainCommandOptions, given)
        return train(validated, choose_source(validated, None, workspace), workspace, name, reporter)

    return run


@pytest.fixture
def run_on_store(workspace: Workspace, reporter: RecordingReporter) -> Run:
    def run(name: str, store: str, **options: Any) -> TrainResult:
        validated = validate_options(TrainCommandOptions, SMALL | options)
        [artifact] = workspace.find(store_kind(), store)
        return train(validated, choose_source(validated, artifact, workspace), workspace, name, reporter)

    return run


def store_kind() -> Any:
    from nsae_cli.store.workspace import Kind

    return Kind.ACTIVATIONS


def collected(
    sink_model: Path, texts: Path, workspace: Workspace, reporter: RecordingReporter, **options: Any
) -> ActivationStore:
    """The whole corpus in one shard."""
    given = {"model": str(sink_model), "corpus": str(texts), "context": 16, "batch_size": 4, "tokens": "all"}
    config = validate_options(CollectConfig, given | {"layers": "all", "device": "cpu", "name": "store"} | options)
    result = collect(config, workspace, reporter)
    assert len(result.manifest.shards) == 1
    return open_activations(result.artifact.path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.jsonl"
    }


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, int], None]:
    """`stop("step" or "harvest", n)`: a signal arrives while the n-th step or forward pass of the process runs."""
    asked: dict[str, Any] = {"what": None, "left": 0, "now": False}
    step, launch = Cell.train_step, Harvester._launch

    def count(what: str) -> None:
        if asked["what"] == what:
            asked["left"] -= 1
            asked["now"] = asked["now"] or asked["left"] == 0

    def train_step(self: Cell, *arguments: Any) -> Any:
        count("step")
        return step(self, *arguments)

    def launched(self: Harvester, *arguments: Any) -> Any:
        count("harvest")
        return launch(self, *arguments)

    monkeypatch.setattr(Cell, "train_step", train_step)
    monkeypatch.setattr(Harvester, "_launch", launched)
    monkeypatch.setattr(interrupt, "stop_requested", lambda: 2 if asked["now"] else None)

    def stop(what: str | None, count: int = 0) -> None:
        asked.update(what=what, left=count, now=False)

    return stop


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The first token of each context of every forward pass."""
    seen: list[list[int]] = []
    launch = Harvester._launch

    def launched(self: Harvester, contexts: Any) -> Any:
        seen.append([len(context) for context in contexts])
        return launch(self, contexts)

    monkeypatch.setattr(Harvester, "_launch", launched)
    return seen


# The same rows as a store ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harvest",
    [
        {},
        {"packing": False, "bos": False, "site": "resid_pre"},
        {"dtype": "fp32", "model_dtype": "bf16"},
        {"context": 12, "dtype": "bf16"},
    ],
    ids=["default", "documents", "dtypes", "context"],
)
def test_one_window_equals_a_store_of_one_shard(
    run: Run, run_on_store: Run, sink_model, texts, workspace, reporter, harvest
) -> None:
    """Weights, metrics and logs of a grid, over several epochs, bit by bit; only what names the input differs."""
    collected(sink_model, texts, workspace, reporter, **harvest)
    options = GRID | {"buffer": "100k"}
    run("live", **options, **{key: value for key, value in harvest.items()})
    run_on_store("stored", "store", **options)
    live, stored = (contents(workspace.root / "saes" / name) for name in ("live", "stored"))
    assert len([name for name in live if name.endswith("run.json")]) == 16
    assert live.keys() == stored.keys()
    for name in live:
        if name.endswith(".json"):
            documents = [json.loads(content[name]) for content in (live, stored)]
            keys = ("inputs", "pilot", "model", "corpus", "harvest", "activations", "checksum")
            trimmed = [{k: v for k, v in d.items() if k not in keys} for d in documents]
            assert trimmed[0] == trimmed[1], name
        else:
            assert live[name] == stored[name], name
    document = json.loads(live["L0-relu-keep-seed0/run.json"])
    assert document["metrics"]["all"]["tokens"] > 0
    assert document["sinks"]["overlap"]["position+norm+massive"] > 0
    rows = open_activations(workspace.root / "activations" / "store").manifest.rows
    assert document["pilot"] == {"rows": rows, "held_out_rows": document["metrics"]["all"]["tokens"]}


@pytest.mark.parametrize("drop", [False, True])
def test_order_of_rows_over_windows_and_epochs(run, sink_model, texts, workspace, reporter, drop) -> None:
    """Every row of every batch, from the store's rows and the rule of the order written down once more."""
    store = collected(sink_model, texts, workspace, reporter)
    hook = "blocks.2.hook_resid_post"
    x = store.read(0, [hook])[hook]
    config = CollectConfig(model=str(sink_model), corpus=str(texts), context=16, batch_size=4, layers="2", device="cpu")
    source = LiveSource(config, 330)
    source.prepare(reporter)
    profile = source.profile(hook)
    streams = {seed: source.stream([profile], 48, seed, drop) for seed in (3, 8)}
    batches = {seed: stream.batches(0) for seed, stream in streams.items()}
    found: dict[int, list[torch.Tensor]] = {3: [], 8: []}
    for _ in range(110):
        for seed, stream in batches.items():
            found[seed].append(next(stream)[hook].x)

    total = len(x) // 16
    assert (total, source.profiled_rows) == (CONTEXTS, 320)  # 5 batches of 4 contexts
    expected: dict[int, list[int]] = {3: [], 8: []}
    for seed, rows in expected.items():
        for epoch, window in itertools.product(range(3), range(8)):
            first, last = window * 20, min(total, window * 20 + 20)
            generator = torch.Generator().manual_seed(stable_seed("rows", seed, epoch, window))
            for row in (first * 16 + torch.randperm((last - first) * 16, generator=generator)).tolist():
                if row // 16 % 20 != 19 and not (drop and row % 16 == 0):
                    rows.append(row)
        assert len(rows) > 110 * 48
        assert torch.equal(torch.cat(found[seed]), x[torch.tensor(rows[: 110 * 48])])
    [note] = [note for note in reporter.notes if "the corpus has ended" in note]
    assert "epoch 2 begins" in note


def test_the_profile_and_the_held_out_rows_are_of_the_first_window(run, sink_model, texts, workspace, reporter) -> None:
    store = collected(sink_model, texts, workspace, reporter)
    hook = "blocks.1.hook_resid_post"
    result = run("sae", layers="1")
    document = result.runs[0]
    assert document["pilot"] == {"rows": 320, "held_out_rows": 16}
    assert document["metrics"]["all"]["tokens"] == 16
    assert document["sinks"]["position"] == 20
    norms = store.norms(0, hook)[:320].double()
    at = torch.arange(320)
    ordinary = norms[at % 16 != 0]
    assert document["norm_scale"] == pytest.approx(float(ordinary.log().mean().exp()), rel=1e-9)
    training = norms[(at % 16 != 0) & (at // 16 % 20 != 19)]
    levels = torch.arange(1, 10, dtype=torch.float64) / 10
    assert document["edges"] == pytest.approx(torch.quantile(training, levels).tolist(), rel=1e-9)
    assert any("the first 320 rows of texts" in note and "16 of them are held out" in note for note in reporter.notes)


def test_inputs_say_what_was_read(run, sink_model, texts) -> None:
    document = run("sae").runs[0]
    assert document["inputs"]["model"]["name"] == "tiny-sink"
    assert len(document["inputs"]["model"]["sha256"]) == 64
    assert document["inputs"]["corpus"]["name"] == "texts"
    assert document["inputs"]["harvest"] == {
        "site": "resid_post", "context": 16, "packing": True, "bos": True, "harvest_batch_size": 4,
        "dtype": "fp16", "model_dtype": "fp32",
    }  # fmt: skip
    assert (document["model"], document["context_size"], document["bos"]) == ("tiny-sink", 16, True)
    text = json.dumps(document)
    assert str(texts.parent) not in text
    assert str(sink_model.parent) not in text


# Cuts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, GRID], ids=["one", "grid"])
def test_cut_anywhere_and_going_on_gives_the_same_bits(run, workspace, stop, reporter, options) -> None:
    """In the pilot, before step 1, within windows, while a later window is harvested, across the epoch's border."""
    stop(None)
    run("whole", **options)
    whole = contents(workspace.root / "saes/whole")
    folder = workspace.root / "saes/cut"
    cells = len([name for name in whole if name.endswith("run.json")])
    cuts = [
        ("harvest", 2), ("step", 1), ("step", 2 * cells), ("harvest", 8), ("step", 5 * cells), ("harvest", 13),
        ("step", 9 * cells), ("harvest", 24), ("step", 40 * cells), ("harvest", 17),
    ]  # fmt: skip
    reached = []
    for what, count in cuts:
        stop(what, count)
        with pytest.raises(Interrupted) as stopped:
            run("cut", **options)
        assert stopped.value.signum == 2
        steps = [int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")]
        reached.append(max(steps, default=0))
        assert ("stopped while harvesting" in str(stopped.value)) == (what == "harvest" and count == 2)
    stop(None)
    run("cut", **options)
    assert contents(folder) == whole
    assert reached == sorted(reached)
    assert reached[-1] > 50  # of 104 steps; an epoch is 47
    assert len(set(reached)) >= 7
    assert not reporter.warnings


def test_killed_between_checkpoints(run, workspace, monkeypatch) -> None:
    run("whole", checkpoint_every="1h")
    step = Cell.train_step

    def dies(cell: Cell, rows: Any, number: int) -> Any:
        if number == 57:
            raise KeyboardInterrupt
        return step(cell, rows, number)

    monkeypatch.setattr(Cell, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run("cut", checkpoint_every="10")
    assert (workspace.root / "saes/cut/checkpoints/step-50").is_dir()
    monkeypatch.setattr(Cell, "train_step", step)
    run("cut", checkpoint_every="7")
    assert contents(workspace.root / "saes/cut") == contents(workspace.root / "saes/whole")


def test_going_on_harvests_the_first_window_and_the_current_one_only(run, stop, launches, reporter) -> None:
    stop("step", 24)  # 24 · 48 rows are in window 3 of 304 training rows each
    with pytest.raises(Interrupted):
        run("cut", tokens="1200")
    assert len(launches) == 4 * 5
    launches.clear()
    stop(None)
    run("cut", tokens="1200")
    assert "going on from the checkpoint at step 24" in reporter.notes
    assert len(launches) == 2 * 5


def test_a_corpus_of_one_window_is_harvested_once(run, launches, reporter) -> None:
    run("sae", buffer="100k")
    assert sum(map(len, launches)) == CONTEXTS
    assert any("epoch 2 begins" in note for note in reporter.notes)


def test_seeds_and_layers_share_a_pass_and_a_hook_without_sinks_has_its_own(run, launches, reporter) -> None:
    options = {"tokens": "550", "layers": "all"}  # two windows, with sinks and without
    run("plain", **options)
    alone = len(launches)
    launches.clear()
    run("grid", seed="0,1,2", act="relu,tanh-relu", **options)
    assert len(launches) == alone
    launches.clear()
    run("drop", sinks="keep,drop", **options)
    later = alone - 5
    assert len(launches) == 5 + 4 * later
    assert sum("further pass" in note for note in reporter.notes) == 3


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["2k", "20k"])
def test_one_window_is_in_memory_whatever_the_number_of_tokens(run, monkeypatch, tokens) -> None:
    """When a further window is harvested no other is left, and none is larger than the buffer."""
    windows: list[weakref.ref[Window]] = []
    sizes: list[int] = []
    harvest, run_model = LiveSource.harvest, Harvester.harvest

    def noted(self: LiveSource, *arguments: Any) -> Window:
        window = harvest(self, *arguments)
        windows.append(weakref.ref(window))
        sizes.append(sum(x.nbytes for x in window.x.values()))
        return window

    def watched(self: Harvester, batches: Any) -> Any:
        assert [window() for window in windows] == [None] * len(windows)
        return run_model(self, batches)

    monkeypatch.setattr(LiveSource, "harvest", noted)
    monkeypatch.setattr(Harvester, "harvest", watched)
    run("sae", tokens=tokens, layers="0,2", seed="0,1")
    assert len(sizes) >= (60 if tokens == "20k" else 6)
    assert max(sizes) == 320 * 16 * 2 * 2 <= 330 * 16 * 2 * 2


# Names and refusals ---------------------------------------------------------------------------------------------------


def test_the_same_command_twice_loads_nothing_and_rewrites_nothing(run, workspace, monkeypatch) -> None:
    first = run(None)
    assert first.name.startswith("tiny-sink-live-L1-relu-none-")
    stamps = {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")}
    monkeypatch.setattr("nsae_cli.lm.live.load_model", lambda *_: pytest.fail("the weights were loaded"))
    second = run(None)
    assert second.already_complete
    assert second.name == first.name
    assert {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": "12"}, "--context 16 -> 12"),
        ({"harvest_batch_size": "2"}, "--harvest-batch-size 4 -> 2"),
        ({"bos": False}, "--bos True -> False"),
        ({"dtype": "bf16", "site": "resid_pre"}, "--site resid_post -> resid_pre, --dtype fp16 -> bf16"),
        ({"buffer": "660"}, "--buffer 330 -> 660"),
        ({"layers": "0"}, "--layers 1 -> 0"),
        ({"corpus": "builtin"}, "--corpus texts -> builtin"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_option_under_the_same_name_is_refused(run, workspace, stop, options, said, finished) -> None:
    stop(None if finished else "step", 5)
    try:
        run("sae")
    except Interrupted:
        assert not finished
    stop(None)
    before = contents(workspace.root / "saes")
    with pytest.raises(UsageError) as refused:
        run("sae", **options)
    assert said in str(refused.value)
    assert contents(workspace.root / "saes") == before


def test_another_model_of_the_same_name_is_refused(run, model_folder, sink_model, tmp_path) -> None:
    run("sae")
    with pytest.raises(UsageError, match="--from-model tiny-sink -> tiny-gpt2, --model-sha256"):
        run("sae", model=model_folder)
    same_name = tmp_path / "tiny-sink"
    same_name.symlink_to(model_folder)
    with pytest.raises(UsageError, match="--model-sha256"):
        run("sae", model=same_name)


def test_store_and_model_do_not_share_a_name(run, run_on_store, sink_model, texts, workspace, reporter) -> None:
    collected(sink_model, texts, workspace, reporter)
    run("live")
    with pytest.raises(UsageError, match="another kind of input, now the activations 'store'"):
        run_on_store("live", "store", layers="1")
    run_on_store("stored", "store", layers="1")
    with pytest.raises(UsageError, match="another kind of input, now --from-model tiny-sink"):
        run("stored")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": "9"}, "layer 9: tiny-sink has 0-2"),
        ({"context": "64"}, "--context 64: tiny-sink reads at most 32 tokens"),
        ({"harvest_batch_size": "50"}, "--harvest-batch-size 50: expected at most 20 (--buffer holds 330 rows)"),
        ({"buffer": "10"}, "--context 16: --buffer holds 10 rows, expected a whole context"),
        ({"model": Path("./../nowhere")}, "--from-model ../nowhere: no such folder"),
    ],
)
def test_options_that_do_not_fit(run, workspace, options, said) -> None:
    with pytest.raises(NsaeError) as refused:
        run("sae", **options)
    assert said in str(refused.value)
    assert not workspace.root.exists()


def test_a_corpus_without_a_context(run, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(UsageError, match=r"short.txt is empty, or too short for one context of 16"):
        run("sae", corpus=str(tmp_path / "short.txt"))


def test_default_tokens_are_one_epoch_where_the_corpus_can_be_counted(run, monkeypatch) -> None:
    """148 contexts, 7 held out."""
    monkeypatch.setattr("nsae_cli.training.options.DEFAULT_MIN_STEPS", 3)
    assert run("sae", tokens=None).runs[0]["config"]["tokens"] == (CONTEXTS - 7) * 16
    monkeypatch.setattr("nsae_cli.lm.live.COUNTED_BYTES", 10)
    with pytest.raises(UsageError, match="--tokens is missing"):
        run("sae", tokens=None)


def test_every_row_a_sink_is_refused(run, monkeypatch) -> None:
    """Contexts of one row each that are all at position 0."""
    from nsae_cli.metrics import sinks

    monkeypatch.setattr(sinks, "NORM_FACTOR", 0.0)
    with pytest.raises(NsaeError, match="every row at"):
        run("sae", sinks="drop")


def test_few_contexts_train_without_metrics(run, reporter) -> None:
    result = run("sae", buffer="200")
    assert result.runs[0]["pilot"] == {"rows": 192, "held_out_rows": 0}
    assert result.runs[0]["metrics"]["all"]["tokens"] == 0
    assert any("fewer than 20 contexts" in warning for warning in reporter.warnings)

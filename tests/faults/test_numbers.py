"""Numbers that cannot be computed with: what is refused, what stops a run before its update, what comes out finite.

Every command is the real one. A document with NaN or infinity cannot be written (`commit.to_json`); that none is met on
the way to one is what the chains show.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import Outcome, contents, nsae
from hand_store import HOOK, make_rows
from nsae_cli import interrupt
from nsae_cli.store.shards import open_activations
from nsae_cli.training.cell import Cell

CUTS = (100, 200, 180)
TRAIN = ("--d-sae", "32", "--batch-size", "64", "--tokens", "1280", "--device", "cpu")


@pytest.fixture(autouse=True)
def no_signal() -> Iterator[None]:
    interrupt.clear()
    yield
    interrupt.clear()


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """480 rows, 60 contexts of 8; position 0 is a sink."""
    return make_rows(60, 8).x[HOOK].to(dtype)


def write_store(folder: Path, x: torch.Tensor, cuts: tuple[int, ...] = CUTS, **tensors: torch.Tensor) -> Path:
    """A store from elsewhere, which nobody vouches for: vectors, positions, and other tensors by name."""
    folder.mkdir(parents=True)
    everything = {HOOK: x, "positions": (torch.arange(len(x)) % 8).int(), **tensors}
    parts = {name: tensor.split(cuts) for name, tensor in everything.items()}
    for number in range(len(cuts)):
        save_file(
            {name: part[number].contiguous() for name, part in parts.items()}, folder / f"part{number}.safetensors"
        )
    manifest: dict[str, Any] = {
        "format_version": 1,
        "hooks": [HOOK],
        "d_in": x.shape[1],
        "dtype": str(x.dtype).removeprefix("torch."),
        "rows": len(x),
        "shards": [{"file": f"part{number}.safetensors", "rows": count} for number, count in enumerate(cuts)],
    }
    if "norms" in tensors:
        manifest["norm_hooks"] = [HOOK]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def put(x: torch.Tensor, row: int, value: float, column: int | None = 3) -> torch.Tensor:
    x = x.clone()
    x[row, slice(None) if column is None else column] = value
    return x


def scaled_to(x: torch.Tensor, norm: float) -> torch.Tensor:
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True) * norm


# N1: rows that are not finite ----------------------------------------------------------------------------------------

NOT_FINITE: dict[str, tuple[torch.Tensor, str]] = {
    "a NaN in a training context": (
        put(rows(), 137, math.nan), "1 rows at {hook} are not finite, the first is row 37 of part1"
    ),
    "infinity in fp16": (
        put(rows(), 470, math.inf).half(), "1 rows at {hook} are not finite, the first is row 170 of part2"
    ),
    "a whole shard": (
        torch.cat([rows()[:300], rows()[300:] * math.nan]),
        "180 rows at {hook} are not finite, the first is row 0 of part2",
    ),
    "squares that overflow": (
        put(rows(), 137, 1e38),
        "1 rows at {hook} overflow float32 when squared, the first is row 37 of part1.safetensors with 1e+38",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("command", ["norms", "train"])
def test_rows_that_are_not_finite_are_refused_with_shard_and_row(case: str, command: str, tmp_path: Path) -> None:
    x, expected = NOT_FINITE[case]
    store = write_store(tmp_path / "store", x)
    outcome = nsae("--workspace", tmp_path / "runs", command, store, *(TRAIN if command == "train" else ()))
    assert outcome.code == 5
    assert outcome.message.startswith("store: ")
    assert expected.format(hook=HOOK) in outcome.message
    assert len(outcome.message) <= 200
    assert not list((tmp_path / "runs").rglob("*.tmp"))
    assert not list((tmp_path / "runs").rglob("run.json"))


def test_norms_that_are_stored_do_not_hide_a_row(tmp_path: Path) -> None:
    """Norms beside the vectors are finite, so nothing but the vectors themselves can tell."""
    norms = torch.linalg.vector_norm(rows(), dim=1)[:, None]
    store = write_store(tmp_path / "store", put(rows(), 137, math.nan), norms=norms)
    outcome = nsae("--workspace", tmp_path / "runs", "train", store, *TRAIN)
    assert outcome.code == 5
    assert f"1 rows at {HOOK} are not finite, the first is row 37 of part1.safetensors" in outcome.message


def test_a_manifest_that_admits_such_rows(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", rows())
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"][1]["nonfinite_rows"] = 3
    (store / "manifest.json").write_text(json.dumps(manifest))
    for command in (("norms", store), ("train", store, *TRAIN)):
        outcome = nsae("--workspace", tmp_path / "runs", *command)
        assert outcome.code == 5
        assert "3 rows of part1.safetensors hold NaN or infinity" in outcome.message


# N2: a stop before the update ----------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", rows())


def poison(monkeypatch: pytest.MonkeyPatch, number: int, row: int) -> list[torch.Tensor]:
    """From step `number` on (0-based), one row of the batch holds an infinity; returns that row as it was."""
    step, seen = Cell.train_step, list[torch.Tensor]()

    def poisoned(cell: Cell, batch: Any, at: int) -> Any:
        if at >= number:
            seen.append(batch.x[row].clone())
            batch.x[row, 2] = math.inf
        return step(cell, batch, at)

    monkeypatch.setattr(Cell, "train_step", poisoned)
    return seen


def place(message: str) -> tuple[str, int]:
    """Shard and row of ``row 37 of part1.safetensors``."""
    words = message.split("row ", 1)[1].replace(";", " ").replace(",", "").split()
    return words[2].rstrip(")"), int(words[0])


@pytest.mark.parametrize("every", [(), ("--checkpoint-every", "2")], ids=["no checkpoint", "checkpoints"])
def test_a_bad_row_in_training_is_named(
    every: tuple[str, ...], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "runs"
    seen = poison(monkeypatch, number=9, row=5)
    command = ("--workspace", workspace, "train", good, *TRAIN, "--name", "sae", *every)
    outcome = nsae(*command)
    assert outcome.code == 5
    assert "not finite at step 10 of L2: 1 of its 64 rows is not finite, first row " in outcome.message
    assert len(outcome.message) <= 200
    shard, row = place(outcome.message.split("first ")[1])
    stored = load_file(good / shard)[HOOK][row]
    assert torch.equal(stored, seen[0]), "the row that is named is the row that was bad"
    kept = sorted(path.name for path in (workspace / "saes/sae/checkpoints").glob("step-*"))
    assert kept == (["step-6", "step-8"] if every else [])
    assert ("; checkpoint step-8 is kept" in outcome.message) == bool(every)
    for name in kept:
        state = load_file(workspace / f"saes/sae/checkpoints/{name}/state.safetensors")
        assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in state.values())
    # Once the row is good again the same command goes on, to the same SAE as without the stop.
    monkeypatch.undo()
    resumed = nsae(*command)
    assert resumed.code == 0
    assert ("going on from the checkpoint at step 8" in resumed.err) == bool(every)
    assert nsae("--workspace", tmp_path / "whole", "train", good, *TRAIN, "--name", "sae").code == 0
    assert contents(workspace / "saes/sae") == contents(tmp_path / "whole/saes/sae")


def test_a_bad_row_after_an_epoch_and_in_a_grid(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = poison(monkeypatch, number=17, row=60)  # 464 rows an epoch: step 18 lies in the third
    outcome = nsae("--workspace", tmp_path / "runs", "train", good, *TRAIN, "--act", "topk,relu", "--buffer", "250")
    assert outcome.code == 5
    assert "step 18 of L2-topk" in outcome.message
    shard, row = place(outcome.message.split("first ")[1])
    assert torch.equal(load_file(good / shard)[HOOK][row], seen[0])


def test_a_learning_rate_that_explodes_is_said_to_be_the_reason(good: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    command = (
        "--workspace",
        workspace,
        "train",
        good,
        *TRAIN,
        "--lr-warm-up",
        "0",
        "--name",
        "sae",
        "--act",
        "tanh-relu",
    )
    outcome = nsae(*command, "--lr", "1e30", "--checkpoint-every", "1")
    assert outcome.code == 5
    assert "its 64 rows are (longest: row " in outcome.message
    assert "norm" in outcome.message
    assert "lower --lr or give --clip 1" in outcome.message
    assert len(outcome.message) <= 200
    shard, row = place(outcome.message.split("longest: ")[1].replace(",", " ,", 1))
    assert row < 200
    assert (good / shard).is_file()
    assert not list(workspace.rglob("run.json"))
    # With another --lr: the name belongs to the run that stopped, until it is deleted.
    again = nsae(*command, "--lr", "1e-3")
    assert again.code == 2
    assert "--lr 1e+30 -> 0.001" in again.message
    assert f"choose another --name, or delete {workspace / 'saes/sae'} to begin again" in again.message
    assert nsae(*command[:-4], "--act", "tanh-relu", "--lr", "1e-3").code == 0, "another default name is another run"


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_the_last_update_made_infinite_are_not_saved(steps: int, good: Path, tmp_path: Path) -> None:
    """The last step's gradient is finite, and nothing would look at the weights again."""
    outcome = nsae(
        "--workspace", tmp_path / "runs", "train", good, *TRAIN[:-4], "--tokens", str(64 * steps), "--device", "cpu",
        "--act", "tanh-relu", "--lr", "3e38", "--lr-warm-up", "0", "--input-scale", "1e-3",
    )  # fmt: skip
    assert outcome.code == 5
    assert "not finite" in outcome.message
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


# N4-N6: norms, zero rows, extremes -----------------------------------------------------------------------------------


def test_norms_of_half_precision_rows_whose_squares_overflow_it(tmp_path: Path) -> None:
    x = scaled_to(rows(), 320.0).half()
    assert x[0].pow(2).sum() == math.inf, "what a sum in half precision gives"
    norms = open_activations(write_store(tmp_path / "store", x)).norms(0, HOOK)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.linalg.vector_norm(x[:100].double(), dim=1).float(), rtol=1e-6, atol=0)


GRIDS: dict[str, tuple[str, ...]] = {
    "norms": ("--act", "relu,tanh-relu", "--l2-norm", "none,norm,sq", "--l1-norm", "none,norm"),
    "cosine": ("--act", "topk,batchtopk,jumprelu", "--l2-norm", "cosine"),
    "weights": ("--act", "topk", "--l2-norm", "sq", "--row-weights", "mean-one,permuted", "--sinks", "keep,drop"),
}


def _zeros(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[5:100:7], x[157], x[200:300] = 0, 0, 0
    return x


ROWS: dict[str, tuple[torch.dtype, Callable[[torch.Tensor], torch.Tensor]]] = {
    "zero rows": (torch.float16, _zeros),
    "a zero shard": (torch.float16, lambda x: torch.cat([torch.zeros(100, x.shape[1]), x[100:]])),
    "constant rows": (torch.float16, lambda x: torch.full_like(x, 2.5)),
    "equal rows": (torch.float16, lambda x: x[1].expand_as(x)),
    "one giant": (torch.float32, lambda x: put(x, 37, 1e4 * float(x.norm(dim=1).median()))),
    "one giant in bf16": (torch.bfloat16, lambda x: put(x, 37, 1e4 * float(x.norm(dim=1).median()))),
    "all at the end of fp16": (torch.float16, lambda x: torch.sign(x) * 65504),
    "one row at the end of fp16": (torch.float16, lambda x: put(x, 37, 65504, None)),
    "tiny, but normal": (torch.float32, lambda x: scaled_to(x, 1e-15)),
    "huge": (torch.float32, lambda x: scaled_to(x, 1e15)),
    "norm 320": (torch.float16, lambda x: scaled_to(x, 320)),
    "subnormals of fp16": (torch.float16, lambda x: scaled_to(x, 2e-6)),
}


@pytest.mark.parametrize("case", ROWS)
def test_the_chain_on_rows_that_are_extreme(case: str, tmp_path: Path) -> None:
    """Finite numbers, or null where one is not defined; documents with anything else cannot be written."""
    dtype, make = ROWS[case]
    store = write_store(tmp_path / "store", make(rows()).to(dtype))
    workspace = tmp_path / "runs"

    def run(*command: object) -> Outcome:
        outcome = nsae("--workspace", workspace, *command)
        assert outcome.code == 0, outcome.err
        return outcome

    run("norms", store)
    for name, grid in GRIDS.items():
        trained = run("train", store, *grid, *TRAIN, "--name", name)
        zeros = int((open_activations(store).norms(0, HOOK) == 0).sum())
        assert ("rows are zero; they weigh nothing" in trained.err) == bool(zeros)
    run("analyze-top-norms", "norms/L2-tanh-relu-sq-l1norm", "--activations", store)
    run("audit", workspace / "saes/cosine/L2-topk", "--activations", store)
    for weights in workspace.rglob("sae_weights.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(weights).values()), weights
    for document in workspace.rglob("*.json*"):
        assert not re.search(r"\bNaN\b|\bInfinity\b", document.read_text()), document


@pytest.mark.parametrize("factor", [0.0, 1e-41], ids=["zero", "subnormal"])
def test_rows_that_are_all_zero_end_with_5(factor: float, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", rows() * factor)
    for command in (("norms", store), ("train", store, *TRAIN)):
        outcome = nsae("--workspace", tmp_path / "runs", *command)
        assert outcome.code == 5
        assert f"every row at {HOOK} is zero or a sink" in outcome.message


# N7-N9: dead dictionaries, ties, few rows ----------------------------------------------------------------------------


def train(tmp_path: Path, store: Path, *options: object, name: str = "sae") -> dict[str, Any]:
    outcome = nsae("--workspace", tmp_path / "runs", "--json", "train", store, *TRAIN, "--name", name, *options)
    assert outcome.code == 0, outcome.err
    result = outcome.json["result"]
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("act", ["relu", "tanh-relu", "jumprelu"])
def test_a_dictionary_that_is_dead(act: str, tmp_path: Path) -> None:
    """A penalty beyond all measure; what is a ratio to the acts that are not there is null."""
    store = write_store(tmp_path / "store", make_rows(60, 8, sink=1).x[HOOK])
    options = ("--alpha", "1e9", "--alpha-warm-up", "0", "--lr", "0.3", "--lr-warm-up", "0", "--tokens", "6400")
    run = train(tmp_path, store, "--act", act, *options)
    assert run["metrics"]["all"]["dead_fraction"] == 1
    assert run["metrics"]["ns"]["l0"] == 0
    assert run["metrics"]["ns"]["mre"] is not None
    outcome = nsae("--workspace", tmp_path / "runs", "analyze-top-norms", "sae", "--activations", store)
    assert outcome.code == 0, outcome.err


def test_learning_rates_at_the_ends_of_float32(good: Path, tmp_path: Path) -> None:
    idle = train(tmp_path, good, "--lr", "1e-45", name="idle")
    assert idle["metrics"]["ns"]["mre"] is not None
    for lr in ("1e30", "1e-400", "1e400"):
        outcome = nsae("--workspace", tmp_path / "runs", "train", good, *TRAIN, "--lr", lr, "--name", f"n{lr}")
        assert outcome.code == (5 if lr == "1e30" else 2), (lr, outcome.err)


@pytest.mark.parametrize("act", ["topk", "batchtopk"])
def test_ties_give_the_same_bits_twice(act: str, tmp_path: Path) -> None:
    """Every row eight times: the same acts compete with themselves for the last place."""
    store = write_store(tmp_path / "store", rows()[:60].repeat(8, 1).half())
    for place in ("one", "two"):
        train(tmp_path / place, store, "--act", act, "--k", "3")
    first, second = (contents(tmp_path / place / "runs/saes") for place in ("one", "two"))
    assert first == second
    assert any(name.endswith(".safetensors") for name in first)


def test_fewer_rows_than_a_batch_and_a_last_batch_that_is_not_full(tmp_path: Path) -> None:
    few = write_store(tmp_path / "few", rows()[:8], (8,))
    run = train(tmp_path, few, "--act", "topk", name="few")
    assert run["counts"]["tokens"] == 1280, "rows come again until a batch is full"
    assert run["metrics"]["all"]["tokens"] == 0
    assert run["metrics"]["all"]["mre"] is None
    run = train(tmp_path, write_store(tmp_path / "more", rows()), "--tokens", "159", name="partial")
    assert (run["counts"]["steps"], run["counts"]["tokens"]) == (2, 128), "159 rows are two batches of 64"
    outcome = nsae("--workspace", tmp_path / "runs", "train", few, *TRAIN, "--tokens", "63")
    assert outcome.code == 2
    assert "--tokens 63 is less than one batch of 64 rows" in outcome.message
    empty = write_store(tmp_path / "empty", rows()[:0], (0,))
    outcome = nsae("--workspace", tmp_path / "runs", "train", empty, *TRAIN)
    assert outcome.code == 2
    assert "no rows to train on" in outcome.message

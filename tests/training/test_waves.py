"""A grid that does not fit into memory trains in waves, and comes out the same."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from command import contents
from nsae_cli import interrupt
from nsae_cli.errors import Interrupted
from nsae_cli.kernels.select import choose
from nsae_cli.training import waves
from nsae_cli.training.cell import Cell
from nsae_cli.training.waves import MemoryPlan, cell_bytes, free_bytes, plan_memory

GRID = {"act": "relu,tanh-relu", "l2_norm": "none,sq", "sinks": "keep,drop", "checkpoint_every": "7"}
#: Rows of both streams in float16, and three cells of 2·12·20 + 20 + 12 parameters at 28 to 29 bytes.
ROOM = str(2 * 300 * 12 * 2 + 3 * 29 * 512)


@pytest.fixture
def side_by_side(monkeypatch) -> list[int]:
    """How many cells took each step."""
    counts: dict[tuple[int, int], int] = {}
    step, wave = Cell.train_step, [0]

    def spy(self, rows, number):
        counts[wave[0], number] = counts.get((wave[0], number), 0) + 1
        if number == self.config.steps - 1 and counts[wave[0], number] == counts[wave[0], 0]:
            wave[0] += 1
        return step(self, rows, number)

    monkeypatch.setattr(Cell, "train_step", spy)
    monkeypatch.setattr("nsae_cli.training.loop.one_thread_if_small", lambda *_: contextlib.nullcontext(1))
    return counts


def test_waves_take_turns_and_change_nothing(run, workspace, side_by_side, listener):
    run("whole", **GRID)
    assert set(side_by_side.values()) == {8}
    side_by_side.clear()
    run("waves", max_memory=ROOM, **GRID)
    assert sorted(side_by_side.values()) == [2] * 40 + [3] * 80
    assert contents(workspace.root / "saes/waves") == contents(workspace.root / "saes/whole")
    assert any("3 waves of 3 + 3 + 2 SAEs" in note for note in listener.notes)


@pytest.mark.parametrize("cut", [0, 1, 20, 40, 41, 45, 60, 90, 130])
def test_cut_in_any_wave_the_run_goes_on_with_that_wave(run, workspace, monkeypatch, cut):
    """40 steps a wave, then its evaluation; the memory that is free on resuming does not matter."""
    run("whole", **GRID)
    polls = iter(range(cut))
    monkeypatch.setattr(interrupt, "stop_requested", lambda: None if next(polls, None) is not None else 2)
    with pytest.raises(Interrupted):
        run("cut", max_memory=ROOM, **GRID)
    monkeypatch.setattr(interrupt, "stop_requested", lambda: None)
    run("cut", max_memory="1", **GRID)
    assert contents(workspace.root / "saes/cut") == contents(workspace.root / "saes/whole")


def test_at_least_one_sae_trains_whatever_the_memory(run, workspace):
    run("tiny", max_memory="1", act="relu,tanh-relu")
    run("whole", act="relu,tanh-relu")
    assert contents(workspace.root / "saes/tiny") == contents(workspace.root / "saes/whole")


def test_waves_by_hand():
    plan = MemoryPlan(budget_bytes=100, rows_bytes=30, cell_bytes={"a": 40, "b": 30, "c": 1, "d": 90, "e": 10})
    assert plan.waves("abcde") == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan.next_wave("e") == ["e"]
    assert MemoryPlan(None, 30, plan.cell_bytes).waves("abcde") == [list("abcde")]


def test_a_cells_size_is_what_it_takes(monkeypatch, run):
    """Counted from the tensors that a cell and its kernel hold after a dense step, and those of a checkpoint's copy."""
    seen = []
    step = Cell.train_step

    def spy(self, rows, number):
        log = step(self, rows, number)
        seen.append((self, log))
        return log

    monkeypatch.setattr(Cell, "train_step", spy)
    run("sae", kernel="dense", d_sae="40")
    cell = seen[0][0]
    moments = [tensor for key, tensor in cell._updater.adam.state().items() if key != "step"]
    copied = [*cell.weights.tensors(), *moments]
    held = [*cell.weights.tensors(), *cell._gradients.get().tensors(), *moments, *copied]
    expected = sum(tensor.nbytes for tensor in held)
    assert cell_bytes(cell.config, 12, choose("dense", "auto", torch.device("cpu"))) == expected


def test_the_budget_is_a_share_of_what_is_free(monkeypatch):
    kernel = choose("auto", "fp32", torch.device("cpu"))
    monkeypatch.setattr(waves, "free_bytes", lambda device: 1000)
    assert plan_memory({}, 8, kernel, 5, None).budget_bytes == 800
    assert plan_memory({}, 8, kernel, 5, 77).budget_bytes == 77
    monkeypatch.setattr(waves, "free_bytes", lambda device: None)
    assert plan_memory({}, 8, kernel, 5, None).budget_bytes is None


@pytest.mark.parametrize(
    ("meminfo", "most", "current", "free"),
    [
        ("MemTotal: 9 kB\nMemAvailable:  2048 kB\n", None, None, 2048 * 1024),
        ("MemAvailable: 2048 kB\n", "1000000", "400000", 600_000),
        ("MemAvailable: 2048 kB\n", "max", "400000", 2048 * 1024),
        ("MemAvailable: 2048 kB\n", "1000", "5000", 0),
        (None, None, None, None),
        ("nothing\n", None, None, None),
    ],
)
def test_free_memory_is_the_systems_or_the_containers(monkeypatch, meminfo, most, current, free):
    texts = {
        "/proc/meminfo": meminfo,
        "/sys/fs/cgroup/memory.max": most,
        "/sys/fs/cgroup/memory.current": current,
    }

    def read(path: Path, encoding: str) -> str:
        if texts[str(path)] is None:
            raise FileNotFoundError
        return texts[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert free_bytes(torch.device("cpu")) == free

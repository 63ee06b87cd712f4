"""Several processes and one: the same SAE, the same choice of features, the same checkpoints, and what is sent."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nsae_cli import interrupt
from nsae_cli.errors import Interrupted
from nsae_cli.kernels.selection import BatchTopK, row_top_k
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.batches import BatchStream, Share
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import profile_hook
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Workspace
from nsae_cli.training import cell as cell_module
from nsae_cli.training import steps as steps_module
from nsae_cli.training.cell import Cell
from nsae_cli.training.checkpoint import Checkpoints
from nsae_cli.training.loop import train
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.parallel.mesh import Mesh
from nsae_cli.training.parallel.ranks import ALONE, Ranks
from nsae_cli.training.source import StoreSource
from nsae_cli.values import validate_options
from several_processes import in_processes

D_IN, D_SAE, BATCH, STEPS = 12, 24, 64, 100
COMMON = {
    "d_sae": D_SAE, "tokens": BATCH * STEPS, "batch_size": BATCH, "buffer": 300, "lr": 0.003, "layers": "4",
    "kernel": "dense", "device": "cpu", "dead_window": 640,
}  # fmt: skip
SHORT = {"tokens": BATCH * 60}
#: Trainings that together use every statistic that processes have to share.
RUNS: dict[str, dict[str, Any]] = {
    "relu": {"probe_every": 10},
    "topk": {"act": "topk", "k": 1, "l2_norm": "sq", "probe_every": 25, "dead_window": 128, "d_sae": 160, **SHORT},
    "batchtopk": {"act": "batchtopk", "k": 3, "probe_every": 25, **SHORT},
    "jumprelu": {"act": "jumprelu", "target_l0": 4, **SHORT},
    "tanh": {
        "act": "tanh-relu", "sparsity": "l1-decoder-norm", "noise": 0.1, "clip": 0.5, "row_weights": "mean-one",
        "l2_norm": "norm", "target_l0": 6, "probe_every": 25, **SHORT,
    },
    "resampled": {
        "sinks": "drop", "alpha": 5, "resample_dead": 10, "dead_window": 128, "row_weights": "permuted",
        "l2_norm": "sq", "d_sae": 160, **SHORT,
    },
    "cosine": {"act": "topk", "k": 4, "l2_norm": "cosine", "clip": 1, **SHORT},
}  # fmt: skip
#: Which of them each mesh trains.
BY_MESH = {
    Mesh(2, 1): ["relu", "batchtopk", "tanh", "resampled", "relu"],
    Mesh(1, 2): ["topk", "tanh", "resampled", "cosine"],
    Mesh(4, 1): ["relu", "jumprelu"],
    Mesh(2, 2): ["topk", "batchtopk", "topk"],
}


def trained(store: Path, root: Path, options: dict[str, Any], ranks: Ranks = ALONE, name: str = "sae") -> Path:
    """Trains; the folder of the SAE."""
    given = validate_options(TrainOptions, {key: str(value) for key, value in (COMMON | options).items()})
    source = StoreSource(open_activations(store), given, ranks.share)
    train(given, source, Workspace(root), name, SilentReporter(), ranks=ranks)
    return root / "saes" / name


def everything_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "timings.jsonl"}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def meshes(two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an SAE for every run of every mesh, ``DATAxFEATURES-NUMBER-RUN``."""
    root = tmp_path_factory.mktemp("meshes")
    for world in (2, 4):
        work = []
        for mesh in (one for one in BY_MESH if one.size == world):
            for number, run in enumerate(BY_MESH[mesh]):
                name = f"{mesh.data}x{mesh.features}-{number}-{run}"
                work.append((mesh, lambda ranks, run=run, name=name: _train_one(two_layers, root, run, ranks, name)))
        in_processes(world, work, root)
    return root / "saes"


def _train_one(store: Path, root: Path, run: str, ranks: Ranks, name: str) -> None:
    trained(store, root, RUNS[run], ranks, name)


@pytest.mark.parametrize("run", RUNS)
def test_several_processes_train_what_one_does(meshes: Path, two_layers: Path, tmp_path: Path, run: str) -> None:
    one = trained(two_layers, tmp_path, RUNS[run])
    expected, found = lines_of(one), sorted(meshes.glob(f"*-{run}"))
    assert len(found) >= 1
    result = json.loads((one / "run.json").read_text())
    for folder in found:
        lines = lines_of(folder)
        assert len(lines) == len(expected)
        for line, wanted in zip(lines, expected, strict=True):
            assert line.keys() == wanted.keys()
            assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5), (folder.name, line["step"])
            _assert_near(line, wanted, f"{folder.name} step {line['step']}")
        other = json.loads((folder / "run.json").read_text())
        assert other.pop("processes")["data"] == int(folder.name[0])
        assert other["counts"] == result["counts"]
        _assert_near(other["metrics"], result["metrics"], folder.name)
    if run == "resampled":
        assert result["counts"]["resampled"] > 0
    if run == "topk":
        assert any(line["dead_fraction_window"] > 0 for line in expected), "AuxK has had nothing to do"


def _assert_near(found: Any, wanted: Any, where: str) -> None:
    """Equal but for rounding, in everything that numbers are in."""
    if isinstance(wanted, dict):
        for key in wanted:
            _assert_near(found[key], wanted[key], f"{where} {key}")
    elif isinstance(wanted, list):
        for number, value in enumerate(wanted):
            _assert_near(found[number], value, f"{where} {number}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=2e-3, abs=2e-4), where
    else:
        assert found == wanted, where


def test_the_same_processes_give_the_same_bits(meshes: Path) -> None:
    assert everything_of(meshes / "2x1-0-relu") == everything_of(meshes / "2x1-4-relu")
    assert everything_of(meshes / "2x2-0-topk") == everything_of(meshes / "2x2-2-topk")


def test_parts_of_batches_make_the_batches(store: ActivationStore) -> None:
    contexts, hook = Contexts(store), store.manifest.hooks[0]
    profile = profile_hook(store, hook, contexts)

    def batches(share: Share) -> list[torch.Tensor]:
        stream = BatchStream(store, [profile], contexts, 64, 3, 300, drop_sinks=True, share=share)
        # 25 batches from step 3 on: more than two epochs, in windows that no batch fits into evenly.
        return [next(taken)[hook].x.clone() for taken in [stream.batches(3)] for _ in range(25)]

    whole = batches(Share())
    for of in (2, 4):
        parts = [batches(Share(index, of)) for index in range(of)]
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([part[step] for part in parts]), batch)


def _problem(ties: bool) -> torch.Tensor:
    z = torch.randn(16, 24, generator=torch.Generator().manual_seed(5))
    return (z * 2).round() / 2 if ties else z


def _choices(ranks: Ranks) -> dict[str, Any]:
    """What this process chooses of its part, of rows and of the batch, with and without ties, in two blocks."""
    exchange = ranks.exchange()
    assert exchange is not None
    chosen: dict[str, Any] = {}
    for ties in (False, True):
        z = _problem(ties)[ranks.own_rows(16), ranks.own_features(24)].contiguous()
        for k in (1, 3, 9, 24):
            chosen[f"row {ties} {k}"] = exchange.row_top_k(z, k).tolist()
        for k in (1, 5):
            finder = exchange.batch_top_k(k, len(z))
            blocks = z.split(len(z) // 2)
            for block in blocks:
                finder.offer(block)
            chosen[f"batch {ties} {k}"] = [row for block in blocks for row in finder.choose(block).tolist()]
    return chosen


@pytest.mark.parametrize("mesh", [Mesh(2, 1), Mesh(1, 2), Mesh(2, 2), Mesh(1, 4)], ids=str)
def test_the_largest_are_chosen_as_in_one_process(mesh: Mesh, tmp_path: Path) -> None:
    [answers] = in_processes(mesh.size, [(mesh, _choices)], tmp_path)
    for ties in (False, True):
        z = _problem(ties)
        for key in answers[0]:
            kind, with_ties, k = key.split()
            if with_ties != str(ties):
                continue
            if kind == "row":
                expected = row_top_k(z, int(k))
            else:
                finder = BatchTopK(int(k) * len(z))
                finder.offer(z)
                expected = finder.choose(z)
            found = [torch.tensor(answer[key]) for answer in answers]
            rows = [torch.cat(found[start : start + mesh.features], 1) for start in range(0, mesh.size, mesh.features)]
            assert torch.equal(torch.cat(rows), expected), key


def test_topk_takes_the_features_that_one_process_takes(two_layers: Path, tmp_path: Path) -> None:
    """The acts of one step of an SAE whose features lie on two processes: index by index, on all rows."""
    [answers] = in_processes(2, [(Mesh(1, 2), lambda ranks: _active(two_layers, ranks))], tmp_path)
    expected = torch.tensor(_active(two_layers, ALONE)) > 0
    assert torch.equal(torch.cat([torch.tensor(answer) for answer in answers], 2) > 0, expected)
    assert set(expected.sum(2).flatten().tolist()) == {4}


def _active(store: Path, ranks: Ranks) -> Any:
    """Acts of all rows of the first steps, by way of what the step offers to its activation."""
    seen: list[torch.Tensor] = []
    from nsae_cli.sae.nonlinearity import TopK

    value = TopK.value_

    def noted(self: TopK, pre_acts: torch.Tensor) -> torch.Tensor:
        acts = value(self, pre_acts)
        seen.append(acts.clone())
        return acts

    patch = pytest.MonkeyPatch()
    with patch.context() as inside:
        inside.setattr(TopK, "value_", noted)
        inside.setattr(Cell, "train_step", _only(Cell.train_step, 3))
        options = {"act": "topk", "k": 4, "aux_k": "off", "probe_every": "off"}
        root = store.parent / f"active-{ranks.size}"
        with pytest.raises(_EnoughError):
            trained(store, root, options, ranks)
    return torch.stack([acts for acts in seen if len(acts) == BATCH][:3]).tolist()


class _EnoughError(Exception):
    pass


def _only(step: Any, count: int) -> Any:
    def limited(cell: Cell, rows: Any, number: int) -> Any:
        if number == count:
            raise _EnoughError
        return step(cell, rows, number)

    return limited


def test_a_state_goes_through_other_processes_unchanged(two_layers: Path, tmp_path: Path) -> None:
    """2 → 1 → 4 → 2 x 2 → 1 x 2: what each loads and saves again are the same bits, moments and counters included."""
    options = RUNS["jumprelu"] | {"checkpoint_every": 1000}
    [_] = in_processes(2, [(Mesh(2, 1), lambda ranks: _stop(two_layers, tmp_path, options, ranks, 37))], tmp_path)
    checkpoints = Checkpoints(tmp_path / "saes" / "sae" / "checkpoints")
    assert checkpoints.steps() == [37]
    original = checkpoints.at_step(37)
    for mesh in (Mesh(1, 1), Mesh(4, 1), Mesh(2, 2), Mesh(1, 2)):
        work = [(mesh, lambda ranks: _stop(two_layers, tmp_path, options, ranks, None))]
        copy = tmp_path / "again"
        if mesh.size == 1:
            _stop(two_layers, tmp_path, options, ALONE, None)
        else:
            in_processes(mesh.size, work, tmp_path)
        again = Checkpoints(copy).at_step(37)
        assert again.logs == original.logs
        [name] = original.cells
        assert again.cells[name].keys() == original.cells[name].keys()
        assert "adam/exp_avg_sq/W_dec" in original.cells[name]
        for key, tensor in original.cells[name].items():
            assert torch.equal(again.cells[name][key], tensor), (str(mesh), key)
            assert again.cells[name][key].dtype == tensor.dtype
        Checkpoints(copy).remove()


def _stop(store: Path, root: Path, options: dict[str, Any], ranks: Ranks, at: int | None) -> None:
    """Trains until a signal to the last process at a step; None: stops at once, and saves into ``again`` instead."""
    patch = pytest.MonkeyPatch()
    real_step, real_save = Cell.train_step, Checkpoints.save

    def step(cell: Cell, rows: Any, number: int) -> Any:
        if at is not None and number == at - 1 and ranks.world.rank == ranks.size - 1:
            patch.setattr(interrupt, "_signum", 15)
        return real_step(cell, rows, number)

    def save(self: Checkpoints, *arguments: Any) -> None:
        real_save(self if at is not None else Checkpoints(root / "again"), *arguments)

    patch.setattr(Cell, "train_step", step)
    patch.setattr(Checkpoints, "save", save)
    if at is None:
        begin = steps_module.StepLoop.run

        def stopped(loop: steps_module.StepLoop, first_step: int) -> None:
            patch.setattr(interrupt, "_signum", 15)
            begin(loop, first_step)

        patch.setattr(steps_module.StepLoop, "run", stopped)
    with pytest.raises(Interrupted):
        trained(store, root, options, ranks)
    patch.undo()


#: What one step sends for itself, in bytes, beside what is added up: whether to stop and to save.
AGREED = 16


def _sent_in_a_step(ranks: Ranks, store: Path, options: dict[str, Any]) -> dict[str, int]:
    """Bytes that this process gives into each kind of collective in step 50, at whose border nothing is logged."""
    sent: Counter[str] = Counter()
    counting = [False]
    patch = pytest.MonkeyPatch()

    def counted(name: str, place: int) -> None:
        real = getattr(dist, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if counting[0]:
                sent[name] += arguments[place].numel() * arguments[place].element_size()
            return real(*arguments, **named)

        patch.setattr(dist, name, call)

    for name, place in (("all_reduce", 0), ("all_gather", 1), ("broadcast", 0), ("gather", 0)):
        counted(name, place)
    take = steps_module.StepLoop._take

    def taken(*arguments: Any) -> Any:
        taken.count += 1
        # From the taking of one batch to that of the next: a step and a border.
        counting[0] = taken.count == 51
        return take(*arguments)

    taken.count = 0
    patch.setattr(steps_module.StepLoop, "_take", taken)
    for module in (steps_module, cell_module):
        patch.setattr(module, "is_logged", lambda *_: False)
    trained(store, store.parent / f"sent-{ranks.mesh.data}-{ranks.mesh.features}", options, ranks)
    patch.undo()
    return dict(sent)


def test_what_a_step_sends_is_what_the_documentation_says(two_layers: Path, tmp_path: Path) -> None:
    """The formulas of docs/scaling-training.md, in bytes that a process gives into collectives."""
    options = {"probe_every": "off"}
    topk = options | {"act": "topk", "k": 2, "dead_window": 10**6}
    work = [
        (Mesh(2, 1), lambda ranks: _sent_in_a_step(ranks, two_layers, options)),
        (Mesh(1, 2), lambda ranks: _sent_in_a_step(ranks, two_layers, topk)),
    ]
    data, features = in_processes(2, work, tmp_path)
    parameters = 2 * D_IN * D_SAE + D_SAE + D_IN
    assert data == [{"all_reduce": 4 * (parameters + D_SAE + 2) + AGREED}] * 2
    reconstruction, sums, loss, dead = 4 * BATCH * D_IN, 4 * 3 * BATCH, 4, 8
    assert (
        features
        == [
            {"all_reduce": reconstruction + sums + loss + dead + AGREED, "all_gather": 4 * BATCH * 2},
        ]
        * 2
    )

"""topk, batchtopk and jumprelu through whole runs."""

from __future__ import annotations

import json

import pytest
import torch

from command import contents
from hand_store import HOOKS, make_rows, write_full
from nsae_cli import interrupt, load_sae
from nsae_cli.errors import Interrupted
from nsae_cli.kernels import auxk
from nsae_cli.store.shards import open_activations
from nsae_cli.training.cell import Cell
from nsae_cli.training.threshold import BatchThreshold

ACTS = ("topk", "batchtopk", "jumprelu")
GRID = {"act": "relu,tanh-relu,topk,batchtopk,jumprelu", "k": "3", "bandwidth": "0.3", "dead_window": "128"}


@pytest.fixture
def modelled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many dead features each auxiliary loss had."""
    counts: list[int] = []
    add = auxk.with_auxiliary_loss

    def spy(gradients, x, weights, dead, **arguments):
        counts.append(int(dead.sum()))
        return add(gradients, x, weights, dead, **arguments)

    monkeypatch.setattr("nsae_cli.training.cell.with_auxiliary_loss", spy)
    return counts


def test_a_grid_of_all_activations(run, workspace):
    result = run("grid", **GRID)
    runs = {document["config"]["act"]: document for document in result.runs}
    assert list(runs) == ["relu", "tanh-relu", *ACTS]
    for act, document in runs.items():
        folder = workspace.root / "saes/grid" / f"L4-{act}"
        saved = load_sae(folder)
        assert saved.act == ("jumprelu" if act == "batchtopk" else act)
        assert json.loads((folder / "cfg.json").read_text())["metadata"]["training_architecture"] == act
        assert set(document["weights_sha256"]) == set(saved.named())
        assert 0 < document["metrics"]["ns"]["fvu_p0"] < (10 if act == "tanh-relu" else 0.9)
        assert document["metrics"]["all"]["dead_fraction"] is not None
        sums = [scope["G"] for scope in (document["metrics"]["sinks"], *document["metrics"]["bins"])]
        assert sum(share for share in sums if share is not None) == pytest.approx(1, abs=1e-4)
        assert (document["metrics"]["all"]["alpha_eff"] is None) == (act in ("topk", "batchtopk"))
    assert runs["topk"]["metrics"]["all"]["l0"] <= 3
    assert runs["topk"]["beta"] == runs["batchtopk"]["beta"] == 0
    norm_scale = runs["jumprelu"]["norm_scale"]
    assert runs["jumprelu"]["beta"] == pytest.approx(0.003 * norm_scale**2)  # h = 0


@pytest.mark.parametrize("act", ACTS)
def test_a_cell_equals_the_same_sae_trained_alone(run, workspace, act):
    run("grid", **GRID)
    options = {key: value for key, value in GRID.items() if key != "bandwidth" or act == "jumprelu"}
    if act == "jumprelu":
        del options["k"]
    run("alone", **(options | {"act": act}))
    cell, alone = (contents(workspace.root / "saes" / name) for name in (f"grid/L4-{act}", "alone"))
    assert cell == alone


@pytest.mark.parametrize("decoder", ["unit", "free", "bounded"])
@pytest.mark.parametrize("act", ACTS)
def test_norm_ratio_is_right_at_step_0(run, tmp_path, monkeypatch, act, decoder):
    store = open_activations(write_full(tmp_path / "store", make_rows(65, 8, hooks=HOOKS, sink=4), [520]))
    ratios: list[float] = []
    step = Cell.train_step

    def spy(cell: Cell, rows, number):
        log = step(cell, rows, number)
        if number == 0:
            lengths = [torch.linalg.vector_norm(t, dim=1).sum() for t in (log.x + log.result.error, log.x)]
            ratios.append(float(lengths[0] / lengths[1]))
        return log

    monkeypatch.setattr(Cell, "train_step", spy)
    run("sae", store=store, act=act, decoder=decoder, tokens="784", batch_size="392", d_sae="96")
    assert 0.8 <= ratios[0] <= 1.25


def test_cut_anywhere_and_going_on_gives_the_same_bits(run, workspace, monkeypatch, modelled):
    """θ's average, the thresholds and their moments, and which features are dead are all in the checkpoint."""
    options = GRID | {"k": "1", "d_sae": "40", "dead_window": "64"}
    run("whole", **options)
    assert max(modelled) > 0
    polls = iter([0, 1, 3, 9, 14])
    for limit in polls:
        left = iter(range(limit))
        monkeypatch.setattr(interrupt, "stop_requested", lambda left=left: None if next(left, None) is not None else 2)
        with pytest.raises(Interrupted):
            run("cut", **options)
    monkeypatch.setattr(interrupt, "stop_requested", lambda: None)
    run("cut", **options)
    assert contents(workspace.root / "saes/cut") == contents(workspace.root / "saes/whole")


def test_dead_features_come_back_to_life_with_auxk_alone(run, modelled):
    """Ten features start nearly deaf; without the auxiliary loss they get no gradient at all."""
    step = Cell.train_step
    fired = {}
    for aux_k in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            cells: list[Cell] = []

            def spy(cell: Cell, rows, number, cells: list[Cell] = cells):
                if number == 0:
                    cell.weights.b_enc[:10] = 0.0
                    cell.weights.W_enc[:, :10] *= 1e-4
                    cells.append(cell)
                return step(cell, rows, number)

            patch.setattr(Cell, "train_step", spy)
            run(f"aux-{aux_k}", act="topk", k="2", d_sae="60", aux_k=aux_k, dead_window="128", tokens="12800")
        [cell] = cells
        fired[aux_k] = int((cell.window.state()["last_fired"][:10] > 0).sum())
    assert fired["auto"] > fired["off"] == 0
    assert max(modelled) >= 10


@pytest.mark.parametrize("l2_norm", ["none", "norm", "sq"])
def test_topk_is_trained_by_the_error_alone_whatever_its_weight(run, workspace, l2_norm):
    [document] = run("sae", act="topk", k="3", l2_norm=l2_norm, tokens="25600").runs
    lines = [json.loads(line) for line in (workspace.root / "saes/sae/metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_sparsity"] == 0 for line in lines)
    assert all(line["alpha"] == 0 for line in lines)
    first, last = (sum(line["loss"] for line in part) for part in (lines[:20], lines[-20:]))
    assert last < 0.8 * first
    assert document["warnings"] == []


def test_batchtopk_is_saved_with_the_average_of_the_least_acts(run, workspace, monkeypatch):
    least: list[float] = []
    update = BatchThreshold.update

    def spy(self, least_act):
        least.append(float(least_act))
        update(self, least_act)

    monkeypatch.setattr(BatchThreshold, "update", spy)
    [document] = run("sae", act="batchtopk", k="3").runs
    assert len(least) == 40
    theta = least[0]
    for value in least[1:]:
        theta += 0.01 * (value - theta)
    sae = load_sae(workspace.root / "saes/sae")
    expected = torch.full((20,), theta / document["input_scale"])
    torch.testing.assert_close(sae.threshold, expected, rtol=1e-5, atol=0)
    assert 1.5 < document["metrics"]["all"]["l0"] < 6


def test_a_batch_without_acts_leaves_the_threshold_alone():
    threshold = BatchThreshold()
    assert threshold.value == 0
    threshold.update(torch.tensor(torch.inf))
    assert threshold.value == 0
    threshold.update(torch.tensor(2.0))
    threshold.update(torch.tensor(torch.inf))
    assert threshold.value == 2
    threshold.update(torch.tensor(3.0))
    assert threshold.value == pytest.approx(2.01)
    again = BatchThreshold()
    again.load_state(threshold.state())
    assert again.value == threshold.value


def test_jumprelu_thresholds_learn_and_alpha_makes_it_sparser(run, workspace):
    sparse = {}
    for alpha in ("0.0001", "0.1"):
        [document] = run(f"a{alpha}", act="jumprelu", alpha=alpha, bandwidth="0.5", alpha_warm_up="0").runs
        sae = load_sae(workspace.root / f"saes/a{alpha}")
        scaled = sae.threshold * document["input_scale"]
        assert float(scaled.min()) > 0
        assert len(scaled.unique()) > 10
        sparse[alpha] = document["metrics"]["ns"]["l0"]
    assert sparse["0.1"] < sparse["0.0001"]


@pytest.mark.parametrize("act", ACTS)
def test_scaled_and_raw_training_see_the_same_loss_at_mapped_weights(run, workspace, act):
    """Before the first step topk and batchtopk are the same at any input scale; jumprelu's θ and ε are in scaled
    units, so it is another SAE."""
    first = {}
    for name, scale in (("raw", "1"), ("scaled", "auto")):
        run(name, act=act, input_scale=scale, l2_norm="norm", alpha_warm_up="0")
        first[name] = json.loads((workspace.root / f"saes/{name}/metrics.jsonl").read_text().splitlines()[0])
    if act != "jumprelu":
        for key in ("loss", "loss_l2", "l1_all", "mre_ns"):
            assert first["raw"][key] == pytest.approx(first["scaled"][key], rel=1e-4)
    assert first["raw"]["mre_ns"] == pytest.approx(first["scaled"]["mre_ns"], rel=0.5)

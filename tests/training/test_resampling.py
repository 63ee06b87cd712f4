"""`--resample-dead`: what dead features become, that they live, and that a run stays the same run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from command import contents
from nsae_cli import interrupt, load_sae
from nsae_cli.errors import Interrupted, UsageError
from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.distance import COSINE_DISTANCE, SQUARED_ERROR
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.types import StepResult, Weights
from nsae_cli.metrics.deadness import FiredWindow
from nsae_cli.metrics.groups import SINKS
from nsae_cli.sae.init import INITIAL_THRESHOLD
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows
from nsae_cli.training.cell import Cell
from nsae_cli.training.resample import Resampler, first_resampling, last_step

D_IN, D_SAE, ROWS = 8, 30, 24
DEAD = [3, 4, 11, 29]
SINK_ROW, ZERO_ROW = 5, 9


class Case:
    """An SAE whose features DEAD are off on every row, after a few steps of Adam and a window without them."""

    def __init__(self, act: str = "relu", decoder: str = "unit", p: int = 0, cosine: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        sparsity, bandwidth = ("l0", 0.1) if act == "jumprelu" else ("l1", None)
        distance = COSINE_DISTANCE if cosine else SQUARED_ERROR
        self.objective = Objective(act, p, 0, sparsity, 0.3, 1.0, None, bandwidth, distance)
        x = randn(ROWS, D_IN)
        x[SINK_ROW] *= 40
        x[ZERO_ROW] = 0
        group = torch.arange(ROWS) % 10
        group[SINK_ROW] = SINKS
        zero = torch.zeros(ROWS, dtype=torch.bool)
        zero[ZERO_ROW] = True
        self.rows = HookRows(x, x.norm(dim=1), group, zero)
        W_dec = randn(D_SAE, D_IN)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        if decoder != "unit":
            W_dec *= torch.linspace(0.2, 1 if decoder == "bounded" else 3, D_SAE)[:, None]
        threshold = torch.full((D_SAE,), -0.3) if act == "jumprelu" else None
        b_enc = 0.2 * randn(D_SAE)
        b_enc[DEAD] = -1e4
        self.weights = Weights(0.7 * randn(D_IN, D_SAE), b_enc, W_dec, 0.1 * randn(D_IN), threshold).by_feature()
        self.adam = Adam(self.weights)
        gradients = Weights(*(0.1 + randn(*tensor.shape).abs() for tensor in self.weights.tensors()))
        self.adam.step(gradients, 1e-3)
        self.window = FiredWindow(D_SAE, window_tokens=ROWS)
        alive = torch.ones(D_SAE, dtype=torch.bool)
        alive[DEAD] = False
        self.window.update(alive, ROWS)
        self.error_weight, _ = self.objective.row_weights(self.rows.norm, zero)
        self.resampler = Resampler(self.objective, self.weights, decoder, self.adam, self.window, seed=0)

    def step(self) -> StepResult:
        """The forward pass at the present weights."""
        return step_gradients(
            self.rows.x,
            self.weights,
            self.weights.zeros_like(),
            activation=self.objective.nonlinearity,
            penalty=self.objective.penalty,
            error_weight=self.error_weight,
            sparsity_weight=torch.zeros(ROWS),
            distance=self.objective.distance,
        )

    def resample(self, step: int = 99) -> tuple[StepResult, Weights]:
        """Resamples; → the forward pass and the weights before."""
        result, before = self.step(), self.weights.to(torch.float32)
        self.resampler.resample(self.rows, self.rows.x, result, self.error_weight, step)
        return result, before


KINDS = [("relu", "unit"), ("relu", "bounded"), ("tanh-relu", "free"), ("tanh-relu", "bounded"), ("jumprelu", "unit"),
         ("jumprelu", "free")]  # fmt: skip


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("act", "decoder"), KINDS)
def test_what_a_dead_feature_becomes(act, decoder, cosine):
    case = Case(act, decoder, p=2 if cosine else 0, cosine=cosine)
    result, before = case.resample()
    x, error = case.rows.x, result.error
    assert case.resampler.count == 4
    living = torch.ones(D_SAE, dtype=torch.bool)
    living[DEAD] = False
    mean_column, mean_row = before.W_enc[:, living].norm(dim=0).mean(), before.W_dec[living].norm(dim=1).mean()
    if cosine:
        x_hat = x + error
        unit, unit_hat = x / x.norm(dim=1, keepdim=True), x_hat / x_hat.norm(dim=1, keepdim=True)
        wanted = unit - (unit * unit_hat).sum(1, keepdim=True) * unit_hat
    else:
        wanted = -error
    directions = wanted / wanted.norm(dim=1, keepdim=True)
    sources = []
    for feature in DEAD:
        row, column = case.weights.W_dec[feature], case.weights.W_enc[:, feature]
        likeness = torch.nan_to_num(directions @ row) / row.norm()
        source = int(likeness.argmax())
        sources.append(source)
        assert likeness[source] == pytest.approx(1, abs=1e-5)
        gap, along = error[source].norm(), directions[source] @ -error[source]
        length = 1.0 if decoder == "unit" else min(mean_row, gap) if act == "tanh-relu" else mean_row
        torch.testing.assert_close(row, length * directions[source], rtol=1e-4, atol=1e-5)
        length = min(0.2 * mean_column, 0.5 / along) if act == "tanh-relu" else 0.2 * mean_column
        torch.testing.assert_close(column, length * directions[source], rtol=1e-4, atol=1e-5)
        # On for the row that it was made from, by what its x̂ lacks.
        threshold = INITIAL_THRESHOLD if act == "jumprelu" else 0.0
        pre_act = x[source] @ column + case.weights.b_enc[feature]
        assert float(pre_act) - threshold == pytest.approx(float(length * along), rel=1e-3)
        if act == "jumprelu":
            assert float(case.weights.log_threshold[feature].exp()) == pytest.approx(INITIAL_THRESHOLD)
        if act == "tanh-relu":
            assert 0 < pre_act <= 0.5 + 1e-4
            assert pre_act.tanh() * row.norm() < gap
    assert len(set(sources)) == 4
    assert not {SINK_ROW, ZERO_ROW} & set(sources)
    if decoder == "bounded":
        assert case.weights.W_dec.norm(dim=1).max() <= 1
    after = case.step()
    assert after.fired[DEAD].all()
    assert not result.fired[DEAD].any()


@pytest.mark.parametrize("act", ["relu", "jumprelu"])
def test_nothing_else_changes_and_adam_forgets(act):
    case = Case(act)
    moments = [moment.to(torch.float32) for moment in case.adam.moments()]
    version = case.weights.W_enc._version
    _, before = case.resample()
    assert case.weights.W_enc._version > version  # by which a bf16 copy of the encoder notices
    others = [feature for feature in range(D_SAE) if feature not in DEAD]
    for old, new in ((before, case.weights), *zip(moments, case.adam.moments(), strict=True)):
        assert torch.equal(old.b_dec, new.b_dec)
        assert torch.equal(old.W_enc[:, others], new.W_enc[:, others])
        assert torch.equal(old.W_dec[others], new.W_dec[others])
        assert torch.equal(old.b_enc[others], new.b_enc[others])
    for old, new in zip(moments, case.adam.moments(), strict=True):
        assert old.W_enc[:, DEAD].any()
        parts = [new.W_enc[:, DEAD], new.W_dec[DEAD], new.b_enc[DEAD]]
        parts += [] if new.log_threshold is None else [new.log_threshold[DEAD]]
        assert not any(part.any() for part in parts)


def test_a_resampled_feature_has_a_whole_window_to_fire():
    case = Case()
    case.resample()
    assert not case.window.silent().any()
    case.window.update(torch.zeros(D_SAE, dtype=torch.bool), ROWS - 1)
    assert not case.window.silent()[DEAD].any()
    case.window.update(torch.zeros(D_SAE, dtype=torch.bool), 1)
    assert case.window.silent()[DEAD].all()


def test_draws_depend_on_seed_and_step_alone():
    first, again, later = Case(), Case(), Case()
    first.resample(), again.resample(), later.resample(step=100)
    assert torch.equal(first.weights.W_dec, again.weights.W_dec)
    assert not torch.equal(first.weights.W_dec, later.weights.W_dec)


def test_rows_are_drawn_by_the_square_of_their_loss():
    case = Case()
    case.rows.group[:] = 0
    case.rows.zero[:] = False
    weight, distance = torch.zeros(ROWS), torch.ones(ROWS)
    weight[:3] = torch.tensor([1.0, 2.0, 0.5])
    distance[:3] = torch.tensor([1.0, 1.0, 6.0])  # w·D = 1, 2, 3
    draws = [case.resampler._draw(30, case.rows, distance, weight, step).tolist() for step in range(3000)]
    assert all(sorted(draw) == [0, 1, 2] for draw in draws)  # each once, and none without a loss
    frequency = torch.tensor([sum(draw[0] == row for draw in draws) / 3000 for row in range(3)])
    expected = torch.tensor([1, 4, 9]) / 14
    assert (frequency - expected).abs().max() < 4 * math.sqrt(0.25 / 3000)


def test_sinks_are_drawn_only_where_there_is_nothing_else():
    """At p = 0 the sink's part of Σ(w‖e‖²)² is nearly all: it would be the source of every feature."""
    case = Case()
    result = case.step()
    chance = (case.error_weight * result.sq_error) ** 2
    assert chance[SINK_ROW] / chance.sum() > 0.999
    drawn = case.resampler._draw(ROWS, case.rows, result.distance, case.error_weight, 0).tolist()
    assert sorted(drawn) == [row for row in range(ROWS) if row not in (SINK_ROW, ZERO_ROW)]
    case.rows.group[:] = SINKS
    drawn = case.resampler._draw(1, case.rows, result.distance, case.error_weight, 0).tolist()
    assert drawn == [SINK_ROW]


def test_more_dead_features_than_rows_wait():
    case = Case()
    case.window = case.resampler.window = FiredWindow(D_SAE, ROWS)
    case.window.update(torch.zeros(D_SAE, dtype=torch.bool), ROWS)
    case.resample()
    assert case.resampler.count == ROWS - 2
    assert case.window.silent().sum() == D_SAE - (ROWS - 2)
    assert torch.isfinite(case.weights.W_enc).all()


PLANTED = {"resample_dead": "10", "dead_window": "640", "alpha": "0.1", "tokens": "6400", "d_sae": "96", "lr": "0.01"}


@pytest.fixture
def plant(monkeypatch):
    """Switches the first 12 features off for good at step 0; → the steps after which something was resampled."""
    step, resample, steps = Cell.train_step, Resampler.resample, []

    def planted(cell: Cell, rows, number, *more):
        if number == 0:
            cell.weights.b_enc[:12] = -1e4
        return step(cell, rows, number, *more)

    def spy(self, *arguments):
        before = self.count
        resample(self, *arguments)
        if self.count > before:
            steps.append(arguments[-1] + 1)

    monkeypatch.setattr(Cell, "train_step", planted)
    monkeypatch.setattr(Resampler, "resample", spy)
    return steps


@pytest.mark.parametrize("act", ["relu", "tanh-relu", "jumprelu"])
def test_planted_dead_features_come_alive(run, workspace, plant, act):
    options = PLANTED | {"act": act, "alpha": "0.001" if act == "jumprelu" else "0.01"}
    [without] = run("without", **(options | {"resample_dead": "off"})).runs
    assert without["counts"]["resampled"] == 0
    assert plant == []
    [document] = run("with", **options).runs
    assert document["config"]["resample_dead"] == 10
    assert document["counts"]["resampled"] >= 12
    assert plant[0] == 10
    assert max(plant) <= 80  # of 100 steps
    density = [load_features(workspace.root / "saes" / name)[:12] for name in ("without", "with")]
    assert not density[0].any()
    assert (density[1] > 0).sum() >= 8
    assert document["metrics"]["all"]["dead_fraction"] < without["metrics"]["all"]["dead_fraction"]
    lines = [json.loads(line) for line in (workspace.root / "saes/with/metrics.jsonl").read_text().splitlines()]
    counts = [line["resampled"] for line in lines]
    assert counts == sorted(counts)
    assert (counts[8], counts[9]) == (0, counts[-1] if plant == [10] else counts[9])
    assert counts[9] >= 12
    assert counts[-1] == document["counts"]["resampled"]


def load_features(folder) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "features.safetensors")["density"]


@pytest.mark.parametrize("options", [{}, {"l2_norm": "norm", "act": "tanh-relu", "alpha": "0.01"}])
def test_every_kernel_resamples_alike(run, workspace, plant, options):
    options = PLANTED | options
    run("dense", kernel="dense", **options)
    expected, weights = losses(workspace.root / "saes/dense"), load_sae(workspace.root / "saes/dense").weights
    in_dense = list(plant)
    assert in_dense
    for precision in ("fp32", "certified"):
        plant.clear()
        run(precision, kernel="sparse", precision=precision, **options)
        assert plant == in_dense
        assert losses(workspace.root / "saes" / precision) == pytest.approx(expected, rel=1e-4)
        for name, tensor in load_sae(workspace.root / "saes" / precision).weights.named().items():
            of_dense = weights.named()[name]
            assert (tensor - of_dense).norm() <= 0.01 * of_dense.norm(), name


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("act", ["relu", "jumprelu"])
def test_cut_around_a_resampling_a_run_goes_on_with_the_same_bits(run, workspace, plant, monkeypatch, act):
    options = PLANTED | {"act": act, "alpha": "3" if act == "relu" else "0.01", "dead_window": "64"}
    run("whole", **options)
    assert len(plant) > 1
    whole = contents(workspace.root / "saes/whole")
    for cut in (9, 10, 11, plant[1], 99):
        polls = iter(range(cut))
        monkeypatch.setattr(
            interrupt, "stop_requested", lambda polls=polls: None if next(polls, None) is not None else 2
        )
        with pytest.raises(Interrupted):
            run(f"cut-{cut}", **options)
        monkeypatch.setattr(interrupt, "stop_requested", lambda: None)
        run(f"cut-{cut}", **options)
        assert contents(workspace.root / "saes" / f"cut-{cut}") == whole


def test_the_cells_of_a_grid_that_select_go_without(run):
    runs = run("grid", act="relu,topk", k="2", resample_dead="25%", dead_window="64").runs
    assert [document["config"]["resample_dead"] for document in runs] == [10, None]  # a quarter of 40 steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act": "topk"}, "--resample-dead 5 does not go with --act topk.*learn through --aux-k"),
        ({"dead_window": "3k"}, "--resample-dead 5 would never resample: of 40 steps .* 3,000 tokens is 47 steps"),
        ({"resample_dead": "90%"}, "--resample-dead 90% would never resample"),
        ({"resample_dead": "33"}, "--resample-dead 33 would never resample"),
        ({"resample_dead": "0"}, "--resample-dead 0: expected off, a number of steps"),
        ({"resample_dead": "-5%"}, "--resample-dead -5%: expected off"),
        ({"resample_dead": "often"}, "--resample-dead often: expected off"),
        ({"resample_dead": "2.5"}, "--resample-dead 2.5: expected off"),
    ],
)
def test_what_is_refused(run, options, message):
    with pytest.raises(UsageError, match=message):
        run("sae", **({"resample_dead": "5", "dead_window": "64"} | options))


def test_when_it_is_done():
    assert (last_step(100, 0.2), last_step(2000, 0.2), last_step(7, 0.2)) == (80, 1600, 5)
    assert first_resampling(100, 0.2, every=10, batch_size=64, dead_window=640) == 10
    assert first_resampling(100, 0.2, every=10, batch_size=64, dead_window=641) == 20
    assert first_resampling(100, 0.2, every=80, batch_size=64, dead_window=1) == 80
    assert first_resampling(100, 0.2, every=81, batch_size=64, dead_window=1) is None

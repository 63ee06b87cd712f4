"""`--target-l0`: the control on a simulated plant, and whole runs that meet, miss, or are cut."""

from __future__ import annotations

import json
import math

import pytest
import torch

from command import contents
from hand_store import HOOKS, Rows, write_full
from nsae_cli import interrupt, load_sae
from nsae_cli.errors import Interrupted, UsageError
from nsae_cli.kernels.types import Weights
from nsae_cli.store.batches import HookRows
from nsae_cli.store.shards import open_activations
from nsae_cli.training.l0_control import (
    ALPHA_RANGE,
    L0Control,
    gains_of,
    is_compared,
    mean_l0,
    noise_free_l0,
    rows_to_compare,
    sample_rows,
)

STEPS = 1600


def simulate(control: L0Control, *, slope: float, start_l0: float, noise: float, drift: float, offset: float) -> float:
    """Runs the control against log L0 = c − slope·log α, reached with a lag of 10 steps of full learning rate; over the
    last quarter the learning rate falls to 0. Held-out rows have exp(offset) times the L0. → held-out L0 at the end.

    Args:
        drift: what c moves by per step of full learning rate.
        noise: relative standard error of a batch's mean.
    """
    generator = torch.Generator().manual_seed(1)
    level, log_l0 = math.log(start_l0), math.log(start_l0)
    alpha0 = control.alpha
    for step in range(STEPS):
        lr = min(1.0, (STEPS - step) / (STEPS / 4))
        error = noise * float(torch.randn((), generator=generator))
        l0 = math.exp(log_l0 + error)
        if is_compared(step, STEPS):
            control.compare(l0, math.exp(log_l0 + offset))
        control.update(l0, lr)
        level += drift * lr
        log_l0 += lr / 10 * (level - slope * math.log(control.alpha / alpha0) - log_l0)
    return math.exp(log_l0 + offset)


@pytest.mark.parametrize("slope", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("start_l0", [2.0, 8.0, 200.0])
@pytest.mark.parametrize("offset", [0.0, -0.04])
def test_it_meets_its_target_on_held_out_rows_of_a_known_plant(slope, start_l0, offset):
    for target in (4.0, 16.0):
        control = L0Control(target, 0.2, gains_of("relu"))
        reached = simulate(control, slope=slope, start_l0=start_l0, noise=0.03, drift=-2e-4, offset=offset)
        assert reached == pytest.approx(target, rel=0.01)
        expected = 0.2 * (start_l0 * math.exp(-2e-4 * STEPS * 7 / 8 + offset) / target) ** (1 / slope)
        assert control.found == pytest.approx(expected, rel=0.05)


def test_a_step_by_hand():
    """5 % too many: log 1.05 = .04879 is below the limit of .1."""
    control = L0Control(10.0, 0.5, gains_of("relu"))
    assert control.alpha == control.found == pytest.approx(0.5)
    control.update(10.5, 0.5)
    first = 0.5 * math.exp(0.5 * math.log(1.05) / 10)
    assert control.found == pytest.approx(first)
    assert control.alpha == pytest.approx(first * 1.05)
    # The averages of log L0 rise from log 10.5 by 1/10 and 1/40 of log(10.6/10.5), and lag 30 steps apart.
    control.update(10.6, 1.0)
    slope = (1 / 10 - 1 / 40) * math.log(10.6 / 10.5) / 30
    second = first * math.exp((math.log(1.06) + 30 * slope) / 10)
    assert control.found == pytest.approx(second)
    control.update(1e9, 1.0)  # counts as e^.1 times too many
    assert control.found == pytest.approx(second * math.exp(0.1 / 10))
    assert control.alpha == pytest.approx(control.found * math.exp(0.1))


def test_it_stops_before_an_l0_that_is_coming_down_by_itself_is_there():
    """L0 halves every 100 steps; 30 steps ahead it is e^(−.208) times as high, so from e^.208 times the target on α is
    not raised any more."""
    control = L0Control(4.0, 0.2, gains_of("tanh-relu"))
    turned = None
    for step in range(700):
        before, l0 = control.found, 400.0 * 0.5 ** (step / 100)
        control.update(l0, 1.0)
        if control.found < before and turned is None:
            turned = l0
    assert turned == pytest.approx(4.0 * math.exp(0.3 * math.log(2)), rel=0.01)


@pytest.mark.parametrize(("l0", "bound"), [(0.0, "low"), (1e6, "high")])
def test_alpha_is_bounded_and_comes_back(l0, bound):
    control = L0Control(10.0, 0.5, gains_of("relu"))
    for _ in range(3000):
        control.update(l0, 1.0)
    factor = ALPHA_RANGE if bound == "high" else 1 / ALPHA_RANGE
    assert control.alpha == control.found == pytest.approx(0.5 * factor)
    control.update(10.0 / l0 if l0 else 1e6, 1.0)
    assert control.alpha != pytest.approx(0.5 * factor)


def test_held_out_rows_move_the_set_point_after_a_few_comparisons():
    control = L0Control(10.0, 1.0, gains_of("relu"))
    for _ in range(7):
        control.compare(10.0, 9.0)
    control.update(10.0, 1.0)
    assert control.alpha == 1.0
    control.compare(10.0, 9.0)
    control.compare(math.nan, 9.0)
    control.update(10.0 / 0.9, 1.0)  # held-out L0 is 10 then
    assert control.alpha == pytest.approx(control.found)
    control.update(10.0, 1.0)
    assert control.alpha == pytest.approx(control.found * 0.9, rel=0.06)  # log .9 is clipped at −.1


def test_state_is_all_there_is():
    a, b = (L0Control(7.0, 0.3, gains_of("jumprelu")) for _ in range(2))
    values = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    for number, value in enumerate(values.tolist()):
        a.update(value, 0.7)
        if number % 3 == 0:
            a.compare(value, value * 1.1)
        if number == 100:
            b.load_state(a.state())
        elif number > 100:
            b.update(value, 0.7)
            if number % 3 == 0:
                b.compare(value, value * 1.1)
    assert torch.equal(a.state()["l0_control"], b.state()["l0_control"])
    assert a.alpha == b.alpha


def rows(count: int, group: list[int] | None = None, zero: list[bool] | None = None) -> HookRows:
    groups = torch.tensor(group if group is not None else [0] * count)
    zeros = torch.tensor(zero) if zero is not None else torch.zeros(count, dtype=torch.bool)
    return HookRows(torch.arange(float(count))[:, None], torch.ones(count), groups, zeros)


def test_l0_of_pre_activations_by_hand():
    weights = Weights(
        torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([0.0, 2.0, 0.5]), torch.zeros(3, 1), torch.zeros(1)
    )
    x = torch.tensor([[1.0], [3.0], [-1.0], [0.0]])
    assert noise_free_l0(x, weights).tolist() == [3, 2, 2, 2]
    weights.log_threshold = torch.tensor([1.5, 1.0, 0.1]).log()
    assert noise_free_l0(x, weights).tolist() == [1, 2, 2, 2]
    assert mean_l0(torch.tensor([3, 2, 7, 9]), rows(4, [0, 9, 10, 1], [False, False, False, True])) == 2.5
    assert math.isnan(mean_l0(torch.tensor([3]), rows(1, [10])))


def test_held_out_rows_are_spread_evenly_and_taken_in_turn():
    parts = [rows(10).select(slice(0, 4)), rows(10).select(slice(4, 5)), rows(10).select(slice(5, 10))]
    found = sample_rows(parts, 10, 4)
    assert found is not None
    assert found.x.flatten().tolist() == [0, 3, 6, 9]
    assert sample_rows([], 0, 4) is None
    many = rows(12_000)
    compared = [rows_to_compare(many, step, 1000).x.flatten().tolist() for step in (500, 510, 520, 530)]
    assert compared[0] == compared[3]
    assert sorted(compared[0] + compared[1] + compared[2]) == list(range(12_000))
    assert [step for step in range(40) if is_compared(step, 40)] == list(range(20, 40))
    assert sum(is_compared(step, 1000) for step in range(1000)) == 50


CONTEXTS, CONTEXT, D_IN, DIRECTIONS, ACTIVE = 2000, 8, 16, 32, 3


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Rows are sums of 3 of 32 directions; position 0 is a sink. 100 of 2000 contexts are held out."""
    generator = torch.Generator().manual_seed(0)
    count = CONTEXTS * CONTEXT
    directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, D_IN, generator=generator), dim=1)
    chosen = torch.rand(count, DIRECTIONS, generator=generator).topk(ACTIVE, dim=1).indices
    strengths = torch.rand(count, ACTIVE, generator=generator) + 0.5
    x = torch.zeros(count, DIRECTIONS).scatter_(1, chosen, strengths) @ directions
    positions = torch.arange(count) % CONTEXT
    x[positions == 0] = 30 * directions[0]
    folder = tmp_path_factory.mktemp("activations") / "planted"
    return open_activations(write_full(folder, Rows({HOOKS[1]: x.half()}, positions), [count]))


#: Fast enough to get there, slow enough to hold still.
LONG = {"d_sae": "48", "batch_size": "256", "tokens": "256000", "lr": "0.003", "buffer": "20000"}


@pytest.mark.parametrize(
    "options",
    [
        {"act": "relu,tanh-relu", "l2_norm": "sq", "target_l0": "4,6"},
        {"act": "relu", "l2_norm": "norm", "target_l0": "4", "noise": "0.1", "sinks": "drop"},
        {"act": "tanh-relu", "sparsity": "l1-decoder-norm,tanh", "target_l0": "4"},
    ],
    ids=["grid", "noise", "penalties"],
)
def test_saved_saes_meet_their_target_on_held_out_rows(run, workspace, planted, listener, options):
    result = run("sae", store=planted, **(LONG | options))
    for artifact, document in zip(result.artifacts, result.runs, strict=True):
        target, config = document["l0_target"], document["config"]
        assert target["target"] == config["target_l0"]
        assert target["reached"] == document["metrics"]["ns"]["l0"]
        assert abs(target["relative_error"]) <= 0.02, (artifact.name, target)
        assert target["within"] is True
        start = {"relu": 0.2, "tanh-relu": 0.03}[config["act"]]
        assert config["alpha"] == start
        assert document["alpha"] != start
        assert document["beta"] == pytest.approx(document["alpha"] * beta_of_one(document))
        last = json.loads((artifact.path / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["alpha"] == pytest.approx(document["alpha"], rel=0.25)
    assert listener.warnings == []


def beta_of_one(document):
    config, n = document["config"], document["norm_scale"]
    degree = 1 if config["act"] == "relu" or config["sparsity"] == "l1-decoder-norm" else 0
    return n ** (2 - {"none": 0, "norm": 1, "sq": 2}[config["l2_norm"]] - degree)


def test_held_out_l0_is_counted_from_the_saved_weights(run, workspace, planted):
    [document] = run("sae", store=planted, **(LONG | {"target_l0": "5", "tokens": "51200"})).runs
    sae = load_sae(workspace.root / "saes/sae")
    x = planted.read_rows(0, HOOKS[1], torch.ones(CONTEXTS * CONTEXT, dtype=torch.bool)).float()
    held_out = torch.arange(len(x)) // CONTEXT % 20 == 19
    ns = torch.arange(len(x)) % CONTEXT != 0
    counts = (x @ sae.weights.W_enc + sae.weights.b_enc > 0).sum(dim=1)
    assert document["l0_target"]["reached"] == pytest.approx(float(counts[held_out & ns].double().mean()), rel=1e-6)


@pytest.mark.parametrize("noise", ["0", "0.1"])
def test_cut_anywhere_and_going_on_gives_the_same_bits(run, workspace, monkeypatch, noise):
    options = {"act": "relu,tanh-relu,jumprelu", "target_l0": "3", "noise": noise, "layers": "all", "sinks": "drop"}
    run("whole", **options)
    for limit in (0, 9, 6, 7, 1, 12):
        left = iter(range(limit))
        monkeypatch.setattr(interrupt, "stop_requested", lambda left=left: None if next(left, None) is not None else 2)
        with pytest.raises(Interrupted):
            run("cut", **options)
    monkeypatch.setattr(interrupt, "stop_requested", lambda: None)
    run("cut", **options)
    assert contents(workspace.root / "saes/cut") == contents(workspace.root / "saes/whole")


def test_a_cell_that_misses_says_so_and_the_others_are_kept(run, workspace, planted, listener):
    result = run("sae", store=planted, **(LONG | {"target_l0": "4,47"}))
    met, missed = result.runs
    assert met["l0_target"]["within"] is True
    assert met["warnings"] == []
    assert missed["l0_target"]["within"] is False
    assert missed["l0_target"]["relative_error"] < -0.02
    [warning] = missed["warnings"]
    assert listener.warnings == [f"L4-l0_47: {warning}"]
    assert "misses --target-l0 47 by -" in warning
    assert "no more features are active; lower --target-l0" in warning
    assert math.isfinite(missed["alpha"])
    assert missed["alpha"] >= 0.2 / ALPHA_RANGE * 0.999
    assert load_sae(workspace.root / "saes/sae/L4-l0_47").d_sae == 48


def test_without_a_target_nothing_is_said(run):
    assert run("sae").runs[0]["l0_target"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"act": "topk", "target_l0": "4"}, "--target-l0 4.0 does not go with --act topk"),
        ({"target_l0": "0"}, "--target-l0 0"),
        ({"target_l0": "-3"}, "--target-l0 -3"),
        ({"target_l0": "many"}, "--target-l0 many"),
        ({"target_l0": "20"}, "--target-l0 20: expected less than the 20 features"),
        ({"target_l0": "4", "alpha": "0"}, "--alpha 0 with --target-l0"),
        ({"target_l0": "4", "alpha_warm_up": "0.8"}, "--alpha-warm-up 0.8 with --target-l0"),
    ],
)
def test_refused(run, options, said):
    with pytest.raises(UsageError, match=said):
        run("sae", **options)


def test_in_a_grid_the_target_is_for_penalised_activations(run):
    names = [artifact.name for artifact in run("g", act="relu,topk", target_l0="3,4.5").artifacts]
    assert names == ["g/L4-relu-l0_3", "g/L4-relu-l0_4.5", "g/L4-topk"]

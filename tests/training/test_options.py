"""From options to cells: defaults, names, refusals; and the schedules."""

from __future__ import annotations

import pytest

from hand_store import make_rows, write_foreign
from nsae_cli.errors import UsageError
from nsae_cli.store.shards import open_activations
from nsae_cli.training.options import TrainOptions, default_lr, expand_cells
from nsae_cli.training.schedule import learning_rate, ramp
from nsae_cli.training.source import select_hooks
from nsae_cli.values import validate_options

HOOK = "blocks.6.hook_resid_post"


def cells(hooks: list[str] | None = None, d_in: int = 64, epoch_rows: int = 10**6, **options: object):
    return expand_cells(validate_options(TrainOptions, options), hooks or [HOOK], d_in, epoch_rows)


def test_defaults():
    [(name, cell)] = cells().items()
    assert name == "L6"
    assert (cell.act, cell.l2_norm, cell.l1_norm, cell.decoder, cell.sparsity) == ("relu", "none", "none", "unit", "l1")
    assert (cell.alpha, cell.alpha_scale, cell.alpha_warm_up, cell.noise) == (0.2, "layer-norm", 0.2, 0)
    assert (cell.sinks, cell.clip, cell.seed, cell.input_scale) == ("keep", None, 0, "auto")
    assert (cell.d_sae, cell.batch_size, cell.lr_warm_up, cell.lr_decay) == (512, 2048, 0.05, 0.2)
    assert cell.lr == pytest.approx(2e-4 * 32**0.5)
    [other] = cells(act="tanh-relu").values()
    assert (other.decoder, other.alpha) == ("free", 0.03)


def test_defaults_of_selecting_activations():
    of = {name: cell for name, cell in cells(act="relu,topk,batchtopk,jumprelu", d_in=96).items()}
    assert list(of) == ["L6-relu", "L6-topk", "L6-batchtopk", "L6-jumprelu"]
    for name in ("topk", "batchtopk"):
        cell = of[f"L6-{name}"]
        assert (cell.decoder, cell.sparsity, cell.alpha, cell.k, cell.aux_k) == ("unit", "l1", 0.0, 32, 64)
        assert cell.bandwidth is None
    jump = of["L6-jumprelu"]
    assert (jump.decoder, jump.sparsity, jump.alpha, jump.bandwidth) == ("unit", "l0", 0.003, 0.05)
    for cell in (jump, of["L6-relu"]):
        assert (cell.k, cell.aux_k) == (None, None)
    [small] = cells(act="topk", d_sae="20").values()
    assert small.k == 2
    [off] = cells(act="topk", aux_k="off").values()
    assert off.aux_k is None
    [four] = cells(act="topk", aux_k="4").values()
    assert four.aux_k == 4


def test_in_a_grid_an_option_is_for_the_activations_that_it_belongs_to():
    assert list(cells(act="relu,topk,jumprelu", k="16,64", alpha="0.1,0.2", bandwidth="0.1,1")) == [
        "L6-relu-alpha0.1", "L6-relu-alpha0.2", "L6-topk-k16", "L6-topk-k64",
        "L6-jumprelu-alpha0.1-bandwidth0.1", "L6-jumprelu-alpha0.1-bandwidth1",
        "L6-jumprelu-alpha0.2-bandwidth0.1", "L6-jumprelu-alpha0.2-bandwidth1",
    ]  # fmt: skip
    [relu, topk] = cells(act="relu,topk", alpha="0.1", sparsity="tanh", l1_norm="norm", alpha_scale="none").values()
    assert (relu.alpha, relu.sparsity, relu.l1_norm, relu.alpha_scale) == (0.1, "tanh", "norm", "none")
    assert (topk.alpha, topk.sparsity, topk.l1_norm, topk.alpha_scale) == (0.0, "l1", "none", "layer-norm")


def test_learning_rate_follows_the_width():
    assert default_lr(16384) == pytest.approx(2e-4)
    [narrow, wide] = cells(d_sae="4096,16384").values()
    assert (narrow.lr, wide.lr) == (pytest.approx(4e-4), pytest.approx(2e-4))


@pytest.mark.parametrize(
    ("options", "epoch_rows", "tokens", "steps"),
    [
        ({}, 1000, 2000 * 2048, 2000),
        ({}, 10**7, 10**7, 4882),
        ({"batch_size": "100"}, 1000, 200_000, 2000),
        ({"tokens": "1M"}, 10, 10**6, 488),
    ],
)
def test_length(options, epoch_rows, tokens, steps):
    [cell] = cells(epoch_rows=epoch_rows, **options).values()
    assert (cell.tokens, cell.steps) == (tokens, steps)


def test_names_of_a_grid():
    assert list(cells(act="relu,tanh-relu", l2_norm="none,sq", seed="0,1")) == [
        "L6-relu-none-seed0", "L6-relu-none-seed1", "L6-relu-sq-seed0", "L6-relu-sq-seed1",
        "L6-tanh-relu-none-seed0", "L6-tanh-relu-none-seed1", "L6-tanh-relu-sq-seed0", "L6-tanh-relu-sq-seed1",
    ]  # fmt: skip
    assert list(cells(["blocks.0.hook_resid_post", HOOK], alpha="0.1,1e-7")) == [
        "L0-alpha0.1", "L0-alpha1e-07", "L6-alpha0.1", "L6-alpha1e-07",
    ]  # fmt: skip
    assert list(cells(expansion_factor="2,4")) == ["L6-f128", "L6-f256"]
    assert list(cells(l1_norm="none,norm", noise="0,0.1", sinks="keep,drop"))[-1] == "L6-l1norm-noise0.1-drop"


def test_values_that_print_alike_keep_names_of_their_own():
    assert list(cells(alpha="0.12345678,0.12345679")) == ["L6-alpha0.12345678", "L6-alpha0.12345679"]


def test_hooks_without_a_number_of_their_own():
    names = list(cells(["blocks.6.hook_resid_pre", HOOK]))
    assert names == ["blocks.6.hook_resid_pre", "blocks.6.hook_resid_post"]
    assert list(cells(["../evil"])) == ["_evil"]
    assert list(cells([".."])) == ["hook"]


def test_two_hooks_that_become_one_name_are_refused():
    with pytest.raises(UsageError, match="a_b"):
        cells(["a/b", "a_b"])


def test_equal_widths_are_one_cell():
    assert list(cells(expansion_factor="8,8.001")) == ["L6-f512"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"act": "tanh-relu", "decoder": "unit"}, "--decoder free or bounded"),
        ({"act": "relu", "decoder": "free"}, "no minimum"),
        ({"d_sae": "64", "expansion_factor": "2"}, "give one of them"),
        ({"d_sae": "0"}, "--d-sae 0"),
        ({"tokens": "100"}, "less than one batch"),
        ({"lr": "0"}, "--lr 0"),
        ({"lr": "nan"}, "--lr nan"),
        ({"alpha": "-1"}, "--alpha -1"),
        ({"alpha": "inf"}, "--alpha inf"),
        ({"batch_size": "0"}, "--batch-size 0"),
        ({"batch_size": "1.5"}, "--batch-size 1.5"),
        ({"act": "gelu"}, "--act gelu"),
        ({"act": "relu,relu"}, "--act relu,relu"),
        ({"act": "relu,,tanh-relu"}, "--act relu,,tanh-relu"),
        ({"l2_norm": "max"}, "--l2-norm max"),
        ({"alpha_warm_up": "1.5"}, "--alpha-warm-up"),
        ({"clip": "0"}, "--clip 0"),
        ({"input_scale": "-2"}, "--input-scale -2"),
        ({"checkpoint_every": "0"}, "--checkpoint-every 0"),
        ({"checkpoint_every": "5x"}, "--checkpoint-every 5x"),
        ({"seed": "-1"}, "--seed -1"),
        ({"learning_rate": "1"}, "--learning-rate is not an option"),
    ],
)
def test_refusals_name_option_and_value(options, said):
    with pytest.raises(UsageError, match=said):
        cells(**options)


def test_all_problems_are_reported_at_once():
    with pytest.raises(UsageError) as raised:
        cells(act="gelu", lr="0", batch_size="x")
    assert all(option in str(raised.value) for option in ("--act", "--lr", "--batch-size"))
    with pytest.raises(UsageError) as raised:
        cells(act="relu,tanh-relu", decoder="unit,free")
    assert "tanh-relu with --decoder unit" in str(raised.value)
    assert "relu with --decoder free" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"), [("5m", "300s"), ("90s", "90s"), ("1h", "3600s"), ("0.5s", "0.5s"), ("100", 100), (7, 7)]
)
def test_checkpoint_interval(text, value):
    assert validate_options(TrainOptions, {"checkpoint_every": text}).checkpoint_every == value


def test_clip_can_be_switched_off():
    assert validate_options(TrainOptions, {"clip": "off"}).clip is None
    assert validate_options(TrainOptions, {"clip": "1.5"}).clip == 1.5


@pytest.fixture
def three_layers(tmp_path):
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in (0, 3, 5))
    return open_activations(write_foreign(tmp_path / "three", make_rows(4, hooks=hooks), [32]))


@pytest.mark.parametrize(
    ("layers", "found"),
    [(None, [0, 3, 5]), ("all", [0, 3, 5]), ("3", [3]), (3, [3]), ("5,0", [5, 0]), ([0, 3], [0, 3]), ("0,0-0", [0])],
)
def test_layers(three_layers, layers, found):
    assert select_hooks(layers, three_layers) == [f"blocks.{layer}.hook_resid_post" for layer in found]


@pytest.mark.parametrize("layers", ["1", "0-3", "-1", "x", "", "3,", "²", "3-0", "0-1000000000", "1e3"])
def test_layers_that_are_not_there(three_layers, layers):
    with pytest.raises(UsageError, match="--layers"):
        select_hooks(layers, three_layers)


def test_learning_rate_schedule():
    """100 steps, 10 % warm-up, 20 % decay, peak .5."""
    rates = [learning_rate(step, 100, 0.5, 0.1, 0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[4] == pytest.approx(0.25)
    assert rates[9] == rates[50] == rates[80] == pytest.approx(0.5)
    assert rates[90] == pytest.approx(0.25)
    assert rates[99] == pytest.approx(0.025)


def test_alpha_ramp():
    assert [ramp(step, 10, 0.4) for step in (0, 1, 3, 4, 9)] == pytest.approx([0.25, 0.5, 1, 1, 1])
    assert ramp(0, 10, 0.0) == 1.0
    assert ramp(0, 1, 1.0) == 1.0

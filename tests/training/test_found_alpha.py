"""`--alpha-from`: α found at one layer, used at others."""

from __future__ import annotations

import pytest

from nsae_cli.errors import UsageError


def test_each_cell_takes_the_alpha_of_the_one_that_is_trained_alike(run):
    found = run("found", layers="4", act="relu,tanh-relu", l2_norm="none,sq", target_l0="9", tokens="12800")
    alphas = {(one["config"]["act"], one["config"]["l2_norm"]): one["alpha"] for one in found.runs}
    assert len(set(alphas.values())) == 4
    used = run("used", layers="all", act="relu,tanh-relu", l2_norm="sq,none", alpha_from="found")
    assert len(used.runs) == 8
    for one in used.runs:
        assert one["config"]["alpha"] == one["alpha"] == alphas[one["config"]["act"], one["config"]["l2_norm"]]
        assert one["config"]["target_l0"] is None
    again = run("used", layers="all", act="relu,tanh-relu", l2_norm="sq,none", alpha_from="found")
    assert again.already_complete


def test_the_cells_own_seed_counts_and_topk_is_left_alone(run):
    first = run("group", layers="4", seed="0,1", target_l0="9", tokens="12800")
    by_seed = {one["config"]["seed"]: one["alpha"] for one in first.runs}
    assert by_seed[0] != by_seed[1]
    used = run("used", layers="4", seed="1,0", act="relu,topk", alpha_from="group")
    for one in used.runs:
        expected = 0.0 if one["config"]["act"] == "topk" else by_seed[one["config"]["seed"]]
        assert one["alpha"] == expected
    with pytest.raises(UsageError, match=r"α of L4 could be .*, .*; name one SAE as group/CELL"):
        run("other", layers="4", seed="7", alpha_from="group")
    assert run("one", layers="4", seed="7", alpha_from="group/L4-seed1").runs[0]["alpha"] == by_seed[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_from": "group", "l2_norm": "norm"}, "no SAE there is trained like L4"),
        ({"alpha_from": "nothing"}, "no saes named 'nothing'"),
        ({"alpha_from": "group", "alpha": "0.1"}, "--alpha and --alpha-from both set α"),
        ({"alpha_from": "group", "act": "topk"}, "--alpha-from: --act topk has no α"),
    ],
)
def test_what_is_refused(run, options, message):
    run("group", layers="4")
    with pytest.raises(UsageError, match=message):
        run("other", **options)

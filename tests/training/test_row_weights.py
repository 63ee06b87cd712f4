"""`--row-weights`: worked numbers, and whole runs."""

from __future__ import annotations

import json

import pytest
import torch

from command import contents
from nsae_cli import interrupt
from nsae_cli.errors import Interrupted, UsageError
from nsae_cli.training.options import CellConfig
from nsae_cli.training.row_weights import batch_weights

#: p = 2, q = 1 at norms 1, 2, zero, 4; a typical row has norm 2.
W, V = torch.tensor([1.0, 0.25, 0.0, 0.0625]), torch.tensor([1.0, 0.5, 0.0, 0.25])
ZERO = torch.tensor([False, False, True, False])
TYPICAL = (0.25, 0.5)


def test_mean_one_by_hand():
    w, v = batch_weights("mean-one", (W, V), ZERO, (1.0, 1.0), 0, 0)
    torch.testing.assert_close(w, torch.tensor([16 / 7, 4 / 7, 0.0, 1 / 7]))  # Σw = 1.3125 over 3 live rows
    torch.testing.assert_close(v, torch.tensor([12 / 7, 6 / 7, 0.0, 3 / 7]))
    typical, _ = batch_weights("mean-one", (W, V), ZERO, TYPICAL, 0, 0)
    torch.testing.assert_close(typical, w / 4)
    nothing, _ = batch_weights("mean-one", (W * 0, V * 0), torch.ones(4, dtype=torch.bool), TYPICAL, 0, 0)
    assert nothing.tolist() == [0.0] * 4


def test_permuted_gives_every_live_row_the_weights_of_another():
    seen = set()
    for step in range(20):
        w, v = batch_weights("permuted", (W, V), ZERO, TYPICAL, 0, step)
        assert w[2] == v[2] == 0
        assert sorted(w.tolist()) == sorted(W.tolist())
        torch.testing.assert_close(w, v**2)  # w and v go together
        assert not bool((w == W)[~ZERO].any())
        assert torch.equal(w, batch_weights("permuted", (W, V), ZERO, TYPICAL, 0, step)[0])
        seen.add(tuple(w.tolist()))
    assert len(seen) == 2  # the two cycles through three rows
    w, _ = batch_weights("permuted", (W[:1], V[:1]), ZERO[:1], TYPICAL, 0, 0)
    assert w.tolist() == [1.0]


def test_a_run_of_each_kind_is_another_sae_unless_nothing_is_weighted(run, workspace):
    documents = {}
    for l2_norm in ("none", "sq"):
        result = run(l2_norm, l2_norm=l2_norm, row_weights="plain,mean-one,permuted")
        assert [artifact.name for artifact in result.artifacts] == [
            f"{l2_norm}/L4-{kind}" for kind in ("plain", "mean-one", "permuted")
        ]
        documents[l2_norm] = [(r["config"]["row_weights"], json.dumps(r["weights_sha256"])) for r in result.runs]
    assert [kind for kind, _ in documents["sq"]] == ["plain", "mean-one", "permuted"]
    assert len({digest for _, digest in documents["sq"]}) == 3
    assert documents["none"][0][1] == documents["none"][2][1]
    first = {
        kind: json.loads((workspace.root / f"saes/sq/L4-{kind}/metrics.jsonl").read_text().splitlines()[0])
        for kind in ("plain", "mean-one", "permuted")
    }
    for kind in ("mean-one", "permuted"):  # the same weights of step 0: the loss differs, who holds its share does not
        assert first[kind]["loss_share"] == first["plain"]["loss_share"]
        assert first[kind]["loss_l2"] != first["plain"]["loss_l2"]
    assert first["mean-one"]["loss_l2"] == pytest.approx(first["plain"]["loss_l2"], rel=0.5)  # in the same units


def test_cut_and_going_on_gives_the_same_bits(run, workspace, monkeypatch):
    options = {"l2_norm": "sq", "row_weights": "mean-one,permuted"}
    run("whole", **options)
    left = iter(range(9))
    monkeypatch.setattr(interrupt, "stop_requested", lambda: None if next(left, None) is not None else 2)
    with pytest.raises(Interrupted):
        run("cut", **options)
    monkeypatch.setattr(interrupt, "stop_requested", lambda: None)
    run("cut", **options)
    assert contents(workspace.root / "saes/cut") == contents(workspace.root / "saes/whole")


def test_a_configuration_from_before_is_plain(run):
    config = run("sae").runs[0]["config"]
    del config["row_weights"], config["target_l0"]
    old = CellConfig.model_validate(config)
    assert (old.row_weights, old.target_l0) == ("plain", None)


def test_an_unknown_kind_is_refused(run):
    with pytest.raises(UsageError, match="--row-weights shuffled"):
        run("sae", row_weights="shuffled")

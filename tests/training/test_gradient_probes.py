"""Probes of the gradient on a fixed batch: whose it is, and what sinks leave in Adam's memory."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from hand_store import HOOKS
from nsae_cli.kernels.decoder import normalise_rows_, remove_parallel_component_
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.groups import N_GROUPS, SINKS
from nsae_cli.metrics.norm_bias import AdamSinkShare
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows, held_out_rows
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import profile_hook
from nsae_cli.training.probe import ProbedGradient, probe_gradient
from nsae_cli.training.schedule import is_logged, is_probed, probe_interval


def make_problem(unit: bool) -> tuple[HookRows, Weights]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g)
    group = torch.arange(60) % 8
    group[::9] = SINKS
    x[::9] = 30 + x[::9]
    rows = HookRows(x, x.norm(dim=1), group, torch.zeros(60, dtype=torch.bool))
    weights = Weights(*(torch.randn(shape, generator=g) for shape in ((5, 12), (12,), (12, 5), (5,))))
    if unit:
        normalise_rows_(weights.W_dec)
    return rows, weights


def by_autograd(rows: HookRows, weights: Weights, objective: Objective, beta: float, unit: bool) -> ProbedGradient:
    """The same from one float64 gradient per group, flattened."""
    exact = weights.to(torch.float64)
    flat: list[torch.Tensor] = []
    for group in range(N_GROUPS):
        part = rows.select(rows.group == group)
        error_weight, sparsity_weight = objective.row_weights(part.norm.double(), part.zero)
        gradients = exact.zeros_like()
        step_gradients(
            part.x.double() * objective.input_scale,
            exact,
            gradients,
            activation=objective.nonlinearity,
            penalty=objective.penalty,
            error_weight=error_weight / 60,
            sparsity_weight=sparsity_weight * beta / 60,
        )
        if unit:
            remove_parallel_component_(gradients.W_dec, exact.W_dec)
        flat.append(torch.cat([tensor.flatten() for tensor in gradients.tensors()]))
    total = torch.stack(flat).sum(0)
    shares = [float(g @ total / (total @ total)) if bool((rows.group == b).any()) else None for b, g in enumerate(flat)]
    return ProbedGradient(shares, float(total @ total), float(flat[SINKS] @ flat[SINKS]))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(
    ("act", "sparsity", "p", "q"),
    [("relu", "l1", 0, 0), ("relu", "l1-decoder-norm", 2, 1), ("tanh-relu", "tanh", 1, 0), ("jumprelu", "l0", 1, 0)],
)
def test_the_parts_are_those_of_autograd(act: str, sparsity: str, p: int, q: int, unit: bool) -> None:
    rows, weights = make_problem(unit)
    objective = Objective(act, p, q, sparsity, 0.4, 0.8, bandwidth=0.5)
    if act == "jumprelu":
        weights = dataclasses.replace(weights, log_threshold=torch.full((12,), -0.5))
    found = probe_gradient(rows, weights, objective, objective.nonlinearity, 0.3, unit)
    expected = by_autograd(rows, weights, objective, 0.3, unit)
    assert found.projections[9] is None
    assert found.projections == pytest.approx(expected.projections, abs=1e-5)
    assert sum(share for share in found.projections if share is not None) == pytest.approx(1.0, abs=1e-5)
    assert found.total_sq == pytest.approx(expected.total_sq, rel=1e-4)
    assert found.sinks_sq == pytest.approx(expected.sinks_sq, rel=1e-4)


def test_the_parts_of_a_batch_that_is_selected_from_as_a_whole_add_up_too() -> None:
    rows, weights = make_problem(unit=True)
    objective = Objective("batchtopk", 0, 0, "l1", 0.0, 1.0, k=3)
    found = probe_gradient(rows, weights, objective, objective.nonlinearity, 0.0, True)
    assert sum(share for share in found.projections if share is not None) == pytest.approx(1.0, abs=1e-5)
    assert found.sinks_sq is not None


def test_adams_share_of_sinks_in_worked_numbers() -> None:
    share = AdamSinkShare(beta2=0.5)
    assert share.compute() is None
    share.update(3.0, 4.0, steps=1)  # v_S = 1.5, v = 2
    assert share.compute() == pytest.approx(0.75)
    share.update(1.0, 10.0, steps=2)  # a quarter is left: .375 + .75, .5 + 7.5
    assert share.compute() == pytest.approx(1.125 / 8)
    again = AdamSinkShare(beta2=0.5)
    again.load_state(share.state())
    for each in (share, again):
        each.update(2.0, 2.0, steps=1)
    assert again.compute() == share.compute() == pytest.approx(1.5625 / 5)


def test_adams_average_of_a_steady_gradient_does_not_depend_on_how_often_it_is_probed() -> None:
    often, seldom = AdamSinkShare(), AdamSinkShare()
    for each, count in ((often, 40), (seldom, 4)):
        each.update(8.0, 9.0, steps=1)
        for _ in range(count):
            each.update(1.0, 5.0, steps=400 // count)
    assert often.compute() == pytest.approx(seldom.compute())


def test_when_the_gradient_is_probed() -> None:
    assert [step for step in range(10) if is_probed(step, 10, 4)] == [0, 3, 7, 9]
    assert [step for step in range(10) if is_probed(step, 10, None)] == []
    for steps in (1, 40, 399, 2000, 12_345, 1_000_000):
        every = probe_interval(steps)
        probed = [step for step in range(steps) if is_probed(step, steps, every)]
        assert len(probed) <= 22
        assert every >= 100
        # But for the first step they fall on lines that are there anyway.
        assert all(is_logged(step, steps, None) for step in probed[1:])
    assert is_logged(0, 2000, 100)
    assert not is_logged(0, 2000, None)


def lines_of(workspace: Any, name: str) -> list[dict[str, Any]]:
    text = (workspace.root / f"saes/{name}/metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_writes_its_probes_and_ends_with_adams_share(run, workspace, store):
    result = run("sae", layers="1", probe_every="15", alpha_warm_up="50%")
    probed = {line["step"]: line["probe"] for line in lines_of(workspace, "sae") if line["probe"] is not None}
    assert list(probed) == [1, 15, 30, 40]
    assert result.runs[0]["config"]["probe_every"] == 15
    assert result.runs[0]["metrics"]["sinks"]["adam_sink_share"] == probed[40]["adam_sink_share"]
    assert probed[1]["adam_sink_share"] > 0
    contexts = Contexts(store)
    held_out = list(held_out_rows(store, profile_hook(store, HOOKS[0], contexts), contexts, 256))
    assert probed[15]["rows"] == sum(len(rows.norm) for rows, _ in held_out)  # of all shards
    for probe in probed.values():
        assert sum(share for share in probe["G"].values() if share is not None) == pytest.approx(1.0, abs=1e-5)


def test_a_probe_changes_nothing_of_the_training(run, workspace):
    names = {"with": "1", "seldom": "auto", "never": "off"}
    runs = {name: run(name, layers="1", probe_every=every).runs[0] for name, every in names.items()}
    assert runs["with"]["weights_sha256"] == runs["seldom"]["weights_sha256"] == runs["never"]["weights_sha256"]
    assert runs["never"]["metrics"]["sinks"]["adam_sink_share"] is None
    assert all(line["probe"] is None for line in lines_of(workspace, "never"))
    assert len([line for line in lines_of(workspace, "with") if line["probe"]]) == 40


def test_without_sinks_to_train_on_the_probe_has_none(run, workspace):
    result = run("drop", layers="1", sinks="drop")
    probe = lines_of(workspace, "drop")[0]["probe"]
    assert probe["G"]["sinks"] is None
    assert probe["adam_sink_share"] is None
    assert result.runs[0]["metrics"]["sinks"]["adam_sink_share"] is None


@pytest.mark.parametrize("act", ["tanh-relu", "topk", "batchtopk", "jumprelu"])
def test_every_activation_is_probed(run, workspace, act):
    run(act, layers="1", act=act, probe_every="20")
    for line in lines_of(workspace, act):
        shares = [line["grad_share"]["W_dec"]] + ([line["probe"]["G"]] if line["probe"] else [])
        for share in shares:
            assert sum(value for value in share.values() if value is not None) == pytest.approx(1.0, abs=1e-4)

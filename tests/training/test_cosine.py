"""`--l2-norm cosine` in training, in the log and in the evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity

from nsae_cli.errors import UsageError
from nsae_cli.kernels.distance import COSINE_DISTANCE
from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.groups import SINKS
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows
from nsae_cli.training import cell as cell_module
from nsae_cli.training.cell import Cell
from nsae_cli.training.evaluate import evaluate

OFFERED = {"tanh-relu": {}, "topk": {"k": "3"}, "batchtopk": {"k": "3"}, "jumprelu": {}}


@pytest.mark.parametrize("act", OFFERED)
def test_the_logged_loss_is_that_of_the_cosine(run, workspace, monkeypatch, act):
    """The first line's terms, from the weights of step 0 folded to raw units and the batch of step 0."""
    seen: list[tuple] = []
    step = Cell.train_step

    def spy(cell: Cell, rows, number, *more):
        if number == 0:
            seen.append((cell.saved_sae(), rows.copy(), cell.objective))
        return step(cell, rows, number, *more)

    monkeypatch.setattr(Cell, "train_step", spy)
    run("sae", act=act, l2_norm="cosine", alpha_warm_up="0", **OFFERED[act])
    sae, rows, objective = seen.pop()
    lines = [json.loads(line) for line in (workspace.root / "saes/sae/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_l2"] < 0.95 * lines[0]["loss_l2"]
    if act == "batchtopk":
        return  # its saved SAE has a threshold, which step 0 has not
    x = rows.x.float()
    acts = sae.encode(x)
    error_terms = 2 * (1 - cosine_similarity(x.double(), sae.decode(acts).double()))
    assert lines[0]["loss_l2"] == pytest.approx(float(error_terms.mean()), rel=1e-4)
    share = float(error_terms[rows.group == SINKS].sum() / error_terms.sum())
    assert lines[0]["loss_share"]["sinks"] == pytest.approx(share, rel=1e-4)
    if act == "tanh-relu":
        assert objective.beta == 0.03
        assert lines[0]["loss_sparsity"] == pytest.approx(0.03 * float(acts.sum(1).mean()), rel=1e-4)


def projected(gradient: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
    return gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec


@pytest.mark.parametrize("act", ["tanh-relu", "topk", "jumprelu"])
@pytest.mark.parametrize("unit", [True, False])
def test_an_evaluation_takes_shares_of_the_loss_as_trained(act, unit):
    """loss_share, bias_ratio, esf, grad_share and G against autograd on each row's own loss, in raw units."""
    if act == "tanh-relu" and unit:
        return  # refused
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    count, d, F, scale, beta = 110, 6, 14, 0.25, 0.3
    x = randn(count, d) * randn(count, 1).exp()
    group = torch.arange(count) % (SINKS + 1)
    rows = HookRows(x, x.norm(dim=1), group, torch.zeros(count, dtype=torch.bool))
    W_dec = randn(F, d)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) if unit else W_dec
    weights = Weights(randn(d, F), 0.3 * randn(F), W_dec, 0.3 * randn(d))
    k, threshold = (3 if act == "topk" else None), (0.5 + randn(F).abs() if act == "jumprelu" else None)
    sae = SparseAutoencoder(act, weights, k, threshold)
    sparsity, bandwidth = ("l0", 0.1) if act == "jumprelu" else ("l1", None)
    beta = beta if act == "tanh-relu" else 0.0
    objective = Objective(act, 2, 0, sparsity, beta, scale, k, bandwidth, COSINE_DISTANCE)
    metrics = evaluate(sae, objective, unit, lambda _: iter([(rows, torch.arange(count) // 11)])).metrics

    leaves = Weights(*(tensor.double().requires_grad_() for tensor in weights.tensors()))
    with torch.enable_grad():
        x64 = x.double()
        z = x64 @ leaves.W_enc + leaves.b_enc
        acts = torch.where(sae.encode(x) > 0, z, 0)
        acts = acts.tanh() if act == "tanh-relu" else acts
        errors = 2 * (1 - cosine_similarity(x64, acts @ leaves.W_dec + leaves.b_dec))
        losses = errors + beta * acts.sum(1)
        by_row = [torch.autograd.grad(loss, list(leaves.tensors()), retain_graph=True) for loss in losses]
    if unit:
        by_row = [(a, b, projected(dec, W_dec.double()), c) for a, b, dec, c in by_row]
    errors = errors.detach()
    norms = {"W_enc": torch.stack([g[0].norm() for g in by_row]), "W_dec": torch.stack([g[2].norm() for g in by_row])}
    scopes = {SINKS: metrics["sinks"]} | dict(enumerate(metrics["bins"]))
    for number, scope in scopes.items():
        inside = group == number
        share = float(errors[inside].sum() / errors.sum())
        assert scope["loss_share"] == pytest.approx(share, rel=1e-4)
        assert scope["bias_ratio"] == pytest.approx(share * count / int(inside.sum()), rel=1e-4)
        for name, norm in norms.items():
            assert scope["grad_share"][name] == pytest.approx(float(norm[inside].sum() / norm.sum()), rel=1e-3)
    assert metrics["all"]["esf"] == pytest.approx(float(errors.sum() ** 2 / (count * errors.square().sum())), rel=1e-4)
    assert metrics["all"]["esf_before_training"] == pytest.approx(1)
    assert sum(scope["G"] for scope in scopes.values()) == pytest.approx(1)
    # And they are not those of ‖e‖²/n².
    assert metrics["sinks"]["loss_share"] != pytest.approx(float(rho_share(x, sae(x), group == SINKS)), rel=1e-2)


def rho_share(x: torch.Tensor, x_hat: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    rho = (x_hat - x).square().sum(1) / x.square().sum(1)
    return rho[inside].sum() / rho.sum()


def test_auxk_keeps_its_squared_error_relative_to_the_row(run, monkeypatch):
    seen = []
    original = cell_module.with_auxiliary_loss

    def spy(gradients, x, *arguments, **options):
        seen.append((x, options["error_weight"]))
        return original(gradients, x, *arguments, **options)

    monkeypatch.setattr(cell_module, "with_auxiliary_loss", spy)
    run("sae", act="topk", k="2", l2_norm="cosine", dead_window="64", tokens="640")
    for x, weight in seen:
        torch.testing.assert_close(weight, 1 / (64 * x.square().sum(1)), rtol=2e-3, atol=0)  # norms of float16 rows


def test_the_kernel_is_dense_and_the_run_says_so_once(run, listener):
    result = run("sae", act="topk", l2_norm="cosine", k="3")
    assert result.runs[0]["kernel"] == {"dense": "dense", "sparse": None, "crossover_density": None}
    assert sum("sparse steps have the squared error only" in note for note in listener.notes) == 1
    with pytest.raises(UsageError, match="--kernel sparse: sparse steps have the squared error only"):
        run("other", act="topk", l2_norm="cosine,sq", k="3", kernel="sparse")


def test_acts_that_shrink_are_warned_of_whatever_the_rows_do(run, listener):
    [run_json] = run("sae", act="tanh-relu", l2_norm="cosine", alpha="0.3", tokens="25600", lr="0.01").runs
    assert run_json["metrics"]["ns"]["l0"] > 0
    assert run_json["metrics"]["ns"]["l1"] / run_json["metrics"]["ns"]["l0"] < 0.1
    assert any("cosine distance does not mind; use --noise 0.1" in warning for warning in listener.warnings)

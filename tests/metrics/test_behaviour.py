"""Next-token metrics: against torch's own losses in a loop, on worked numbers, and the bootstrap against a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from nsae_cli.metrics.behaviour import BehaviourAccumulator, CleanPass
from nsae_cli.metrics.bootstrap import intervals
from nsae_cli.metrics.context_sums import ContextSums
from nsae_cli.metrics.groups import N_GROUPS, SINKS
from nsae_cli.metrics.norm_bias import NormBiasIndex
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator
from nsae_cli.metrics.sae_lens_names import sae_lens_names

LENGTHS = [9, 5, 1]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean logits, other logits [3, 9, 11], token ids [3, 9]; contexts of 9, 5 and 1 tokens."""
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(4))
    return draw(1, 3, 9, 11) * 2, draw(2, 3, 9, 11) * 2, ids


def test_cross_entropy_and_kl_against_a_plain_loop(batch: tuple[torch.Tensor, ...]) -> None:
    clean, other, ids = batch
    losses = CleanPass(clean, ids, LENGTHS)
    ce, kl = losses.compare(other)
    for context, length in enumerate(LENGTHS):
        expected_clean = expected_ce = expected_kl = 0.0
        for position in range(length - 1):
            target = ids[context, position + 1]
            expected_clean += float(functional.cross_entropy(clean[context, position].double(), target))
            expected_ce += float(functional.cross_entropy(other[context, position].double(), target))
            p = clean[context, position].double().softmax(0)
            q = other[context, position].double().softmax(0)
            expected_kl += float((p * (p / q).log()).sum())
        assert losses.predicted[context] == length - 1
        assert float(losses.ce[context]) == pytest.approx(expected_clean, abs=1e-5)
        assert float(ce[context]) == pytest.approx(expected_ce, abs=1e-5)
        assert float(kl[context]) == pytest.approx(expected_kl, abs=1e-5)
    assert torch.equal(losses.cross_entropy(other), ce)


def test_the_same_logits_change_nothing_exactly(batch: tuple[torch.Tensor, ...]) -> None:
    clean, other, ids = batch
    losses = CleanPass(clean, ids, LENGTHS)
    ce, kl = losses.compare(clean.clone())
    assert torch.equal(ce, losses.ce)
    assert kl.tolist() == [0, 0, 0]
    accumulator = BehaviourAccumulator(3, bins=False)
    ablated = losses.cross_entropy(other)
    accumulator.update(
        slice(0, 3),
        {"predicted": losses.predicted, "ce_clean": losses.ce, "ce_with_sae": ce, "ce_ns": ce, "kl": kl,
         "ce_zero": ablated, "ce_mean": ablated},
    )  # fmt: skip
    result = accumulator.compute()
    for name in ("delta_ce", "delta_ce_all", "delta_ce_ns", "kl"):
        assert result[name] == {"value": 0, "low": 0, "high": 0}
    assert result["ce_recovered_zero"] == {"value": 1, "low": 1, "high": 1}


def worked(bins: bool) -> BehaviourAccumulator:
    """Two contexts of 4 and 2 predicted tokens."""
    accumulator = BehaviourAccumulator(2, bins=bins)
    columns = {
        "predicted": [4, 2], "ce_clean": [8, 5], "ce_with_sae": [10, 6], "ce_ns": [9, 5.5], "ce_zero": [20, 11],
        "ce_mean": [17, 8], "kl": [1.5, 0.9],
    }  # fmt: skip
    accumulator.update(slice(0, 2), {name: torch.tensor(v, dtype=torch.float64) for name, v in columns.items()})
    return accumulator


def test_worked_numbers() -> None:
    result = worked(bins=False).compute()
    values = {name: part["value"] for name, part in result.items() if part is not None}
    assert values == pytest.approx(
        {
            "ce_clean": 13 / 6, "ce_with_sae": 16 / 6, "ce_zero": 31 / 6, "ce_mean": 25 / 6, "kl": 0.4,
            "delta_ce_all": 0.5, "delta_ce": 0.5, "delta_ce_ns": 0.25,
            "ce_recovered_zero": (31 - 16) / (31 - 13), "ce_recovered_mean": (25 - 16) / (25 - 13),
        }
    )  # fmt: skip
    assert result["bins"] is None
    assert result["sinks"] is None
    # Two contexts are drawn alike in every resample, or as they are: the bounds are the statistics of one alone.
    assert result["delta_ce_all"]["low"] == pytest.approx(2 / 4)
    assert result["ce_recovered_mean"]["low"] == pytest.approx((8 - 6) / (8 - 5))
    assert result["ce_recovered_mean"]["high"] == pytest.approx((17 - 10) / (17 - 8))


def test_a_group_is_charged_by_the_row() -> None:
    accumulator = worked(bins=True)
    clean = torch.tensor([8.0, 5.0], dtype=torch.float64)
    for group in range(N_GROUPS):
        accumulator.update_group(slice(0, 2), group, clean, torch.tensor([0, 0]))
    accumulator.update_group(slice(0, 2), 3, torch.tensor([8.6, 5.0]).double(), torch.tensor([2, 1]))
    accumulator.update_group(slice(0, 2), SINKS, torch.tensor([12.0, 7.0]).double(), torch.tensor([1, 1]))
    result = accumulator.compute()
    assert result["bins"][3]["rows"] == 3
    assert result["bins"][3]["delta_ce"]["value"] == pytest.approx(0.6 / 3)
    assert result["sinks"] == {"rows": 2, "delta_ce": {"value": 3.0, "low": 2.0, "high": 4.0}}
    assert result["bins"][0] == {"rows": 0, "delta_ce": {"value": None, "low": None, "high": None}}


def test_one_context_has_no_interval_and_none_predicts_nothing() -> None:
    accumulator = BehaviourAccumulator(1, bins=False)
    accumulator.update(
        slice(0, 1), {"predicted": torch.tensor([2.0]).double(), "ce_clean": torch.tensor([3.0]).double()}
    )
    assert accumulator.compute()["ce_clean"] == {"value": 1.5, "low": None, "high": None}
    assert BehaviourAccumulator(2, bins=False).compute()["ce_clean"] == {"value": None, "low": None, "high": None}


def test_bootstrap_against_a_loop() -> None:
    numerator, denominator = draw(1, 23).double() + 2, draw(2, 23).double().abs() + 1
    found = intervals(
        {"a": numerator, "b": denominator}, lambda sums: {"ratio": sums["a"] / sums["b"]}, resamples=300, seed=5
    )["ratio"]
    generator = torch.Generator().manual_seed(5)
    draws = torch.randint(23, (300, 23), generator=generator)
    ratios = [float(sum(numerator[i] for i in one) / sum(denominator[i] for i in one)) for one in draws.tolist()]
    assert found["value"] == pytest.approx(float(numerator.sum() / denominator.sum()))
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])))


def test_context_sums_give_the_metrics_back() -> None:
    x, contexts = draw(3, 40, 6).double() * 3, torch.arange(40) // 8
    x_hat = 0.8 * x + 0.1 * draw(4, 40, 6)
    group = torch.arange(40) % 10
    group[::8] = SINKS
    ns = group != SINKS
    norm, l0 = x.norm(dim=1), torch.arange(40) % 5
    sums = ContextSums(5, x[ns].mean(dim=0))
    for part in (slice(0, 17), slice(17, 40)):
        sums.update(contexts[part], x[part], x_hat[part], l0[part], ns[part])
    tensors = sums.tensors()
    metrics = ReconstructionAccumulator(6)
    metrics.update(x, x_hat, norm, group, l0, l0, l0)
    expected = metrics.compute(0, 0)["ns"]
    assert tensors["rows_ns"].tolist() == [7] * 5
    assert float(tensors["l0_ns"].sum() / 35) == pytest.approx(expected["l0"])
    assert float(tensors["rho_ns"].sum() / 35) == pytest.approx(expected["mre"])
    assert float(tensors["error_sq_ns"].sum() / tensors["variance_ns"].sum()) == pytest.approx(expected["fvu_p0"])
    index = NormBiasIndex()
    error = x_hat - x
    index.update(contexts, norm, error.square().sum(1) / x.square().sum(1), ns)
    n, log_n, log_rho, log_n_sq, cross = tensors["nbi_moments"].sum(0).tolist()
    slope = (n * cross - log_n * log_rho) / (n * log_n_sq - log_n**2)
    assert slope == pytest.approx(index.compute()["nbi"])


def test_sae_lens_names_against_sae_lens_formulas() -> None:
    """Its formulas, written down again from their definitions: (batch, position) tensors, means over all of them."""
    x, x_hat, acts = draw(5, 30, 6) * 2, draw(6, 30, 6), draw(7, 30, 9).clamp(min=0)
    sums = ReconstructionAccumulator(6)
    group = torch.arange(30) % N_GROUPS
    sums.update(x, x_hat, x.norm(dim=1), group, (acts > 0).sum(1), acts.sum(1), acts.sum(1))
    metrics: dict[str, Any] = dict(sums.compute(0, 0))
    clean, with_sae, ablated = draw(8, 2, 7).abs(), draw(9, 2, 7).abs(), draw(10, 2, 7).abs() + 1
    accumulator = BehaviourAccumulator(2, bins=False)
    columns = {"ce_clean": clean, "ce_with_sae": with_sae, "ce_zero": ablated}
    accumulator.update(
        slice(0, 2),
        {name: values.double().sum(1) for name, values in columns.items()}
        | {"predicted": torch.tensor([7.0, 7.0]).double()},
    )
    found = sae_lens_names(metrics, accumulator.compute())
    residual = (x - x_hat).pow(2).sum(-1)
    variance = x.pow(2).sum(-1).mean() - x.mean(0).pow(2).sum()
    expected = {
        "reconstruction_quality/explained_variance": 1 - residual.mean() / variance,
        "reconstruction_quality/mse": residual.mean(),
        "reconstruction_quality/cossim": functional.cosine_similarity(x, x_hat).mean(),
        "sparsity/l0": (acts != 0).sum(-1).float().mean(),
        "sparsity/l1": acts.abs().sum(-1).mean(),
        "model_performance_preservation/ce_loss_without_sae": clean.mean(),
        "model_performance_preservation/ce_loss_with_sae": with_sae.mean(),
        "model_performance_preservation/ce_loss_with_ablation": ablated.mean(),
        "model_performance_preservation/ce_loss_score": (
            (ablated.mean() - with_sae.mean()) / (ablated.mean() - clean.mean())
        ),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)

import numpy as np
import pytest
import torch
from torch import Tensor

from nsae_cli.metrics import features
from nsae_cli.metrics.features import FeatureAccumulator
from nsae_cli.metrics.groups import SINKS

# Five rows, four features. Feature 0 fires at the two largest ns norms, 1 mostly on the sink, 2 never, 3 on the sink.
ACTS = torch.tensor(
    [
        [0.0, 0.5, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [2.0, 0.5, 0.0, 0.0],
        [9.0, 9.5, 0.0, 0.1],
    ]
)
NORM = torch.tensor([1.0, 2.0, 3.0, 4.0, 3000.0])
GROUP = torch.tensor([0, 2, 5, 9, SINKS])


def accumulate(*batches: tuple[Tensor, Tensor, Tensor]) -> FeatureAccumulator:
    accumulator = FeatureAccumulator(batches[0][0].shape[1])
    for batch in batches:
        accumulator.update(*batch)
    return accumulator


def test_worked_counts() -> None:
    assert accumulate((ACTS, NORM, GROUP)).compute() == {
        "tokens": 5,
        "dead_fraction": 0.25,
        "dead_fraction_ns": 0.5,
        # Shares of mass on the sink: 9/12, 9.5/10.5 = .905, –, 1.
        "n_sink_features": 2,
        # Over ns norms 1, 2, 3, 4 (mean 2.5, variance 1.25): feature 0 fires on 3, 4: cov = 7/4 − 1.25 = .5, corr
        # .5/√(.25·1.25) = .894; feature 1 on 1, 4: cov = 5/4 − 1.25 = 0.
        "n_norm_detectors": 1,
    }


def test_worked_tensors() -> None:
    accumulator = accumulate((ACTS, NORM, GROUP))
    assert accumulator.density().tolist() == pytest.approx([0.6, 0.6, 0.0, 0.2])
    assert accumulator.sink_features().tolist() == [False, True, False, True]
    assert accumulator.exclusive_features().tolist() == [False, False, False, True]
    assert accumulator.exclusive_features([SINKS, 5, 9]).tolist() == [True, False, False, True]
    assert accumulator.norm_correlation().tolist() == pytest.approx([0.5 / (0.25 * 1.25) ** 0.5, 0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unequal_chunks_agree_with_numpy(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(features, "_CHUNK_ENTRIES", 50)  # several searches per update
    g = torch.Generator().manual_seed(3)
    norm = 50 + 5 * torch.randn(200, generator=g)
    group = torch.randint(0, 11, (200,), generator=g)
    drift = torch.linspace(-1.5, 1.5, 12) * (norm[:, None] - 50) / 5
    acts = (torch.randn(200, 12, generator=g) + drift).relu().to(dtype)
    accumulator = accumulate(*zip(*(t.split([1, 150, 49]) for t in (acts, norm, group)), strict=True))

    ns = group.numpy() != SINKS
    fired = acts.float().numpy() > 0
    mass = acts.double().numpy()
    correlation = [np.corrcoef(fired[ns, i], norm.double().numpy()[ns])[0, 1] for i in range(12)]
    assert accumulator.norm_correlation().tolist() == pytest.approx(correlation)
    assert accumulator.density().tolist() == pytest.approx(fired.mean(0))
    sink_share = mass[~ns].sum(0) / mass.sum(0)
    assert accumulator.sink_features().tolist() == (sink_share > 0.9).tolist()
    detectors = sum(abs(c) > 0.3 for c in correlation)
    assert 0 < detectors < 12
    assert accumulator.compute()["n_norm_detectors"] == detectors


def test_equal_norms_detect_nothing() -> None:
    acts = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0)).relu()
    group = torch.zeros(3000, dtype=torch.int64)
    for norm in torch.linspace(51, 63, 25).tolist():
        correlation = accumulate((acts, torch.full((3000,), norm), group)).norm_correlation()
        assert correlation.abs().max() < 1e-6


def test_without_rows_fractions_are_none() -> None:
    accumulator = FeatureAccumulator(4)
    assert accumulator.compute() == {
        "tokens": 0,
        "dead_fraction": None,
        "dead_fraction_ns": None,
        "n_sink_features": 0,
        "n_norm_detectors": 0,
    }
    assert accumulator.density().tolist() == [0.0] * 4

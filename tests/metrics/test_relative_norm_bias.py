"""nbi_rel: the difference of two slopes on the same rows, and its paired interval."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nsae_cli.metrics.norm_bias import NormBiasIndex, paired_difference

CONTEXTS, PER_CONTEXT = 200, 16


def index_of(context: Tensor, norm: Tensor, rho: Tensor) -> NormBiasIndex:
    index = NormBiasIndex()
    index.update(context, norm, rho, torch.ones(len(norm), dtype=torch.bool))
    return index


def difference(a: NormBiasIndex, b: NormBiasIndex, **options: int) -> dict[str, float | None]:
    (ids_a, moments_a), (ids_b, moments_b) = a.context_moments(), b.context_moments()
    return paired_difference(moments_a, ids_a, moments_b, ids_b, **options)


def error_laws(a: float, b: float, seed: int = 0) -> tuple[NormBiasIndex, NormBiasIndex]:
    """Two SAEs with ρ = C·n^k·noise, k = a and b: what a context and a row do to ρ is common, the rest their own."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    context = torch.arange(CONTEXTS).repeat_interleave(PER_CONTEXT)
    log_norm = 4 + 0.3 * random(CONTEXTS)[context] + 0.2 * random(len(context))
    common = random(CONTEXTS)[context] * log_norm + random(len(context))
    both = [(k * log_norm + common + 0.1 * random(len(context)) - 5).exp() for k in (a, b)]
    return index_of(context, log_norm.exp(), both[0]), index_of(context, log_norm.exp(), both[1])


def test_the_sums_of_each_context() -> None:
    index = NormBiasIndex()
    norm = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    rho = torch.tensor([0.5, 0.0, 0.25, 0.125], dtype=torch.float64)
    index.update(torch.tensor([7, 7, 3, 7]), norm, rho, torch.tensor([True] * 4))
    ids, moments = index.context_moments()
    log2 = np.log(2)
    assert ids.tolist() == [3, 7]
    assert ids.dtype == torch.int64
    assert moments.tolist() == [
        pytest.approx([1, 2 * log2, -2 * log2, 4 * log2**2, -4 * log2**2]),
        pytest.approx([2, 3 * log2, -4 * log2, 9 * log2**2, -9 * log2**2]),
    ]


def test_a_constructed_difference_lies_in_its_interval_about_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(100):
        a, b = error_laws(0.4, 1.1, seed)
        found = difference(a, b, resamples=400)
        assert found["nbi_rel"] == pytest.approx(a.compute(10)["nbi"] - b.compute(10)["nbi"])  # type: ignore[operator]
        inside += found["low"] < -0.7 < found["high"]  # type: ignore[operator]
    # With a coverage of 95 %, fewer than 90 come once in 100 times. (60 contexts are few: 92.5 %.)
    assert 90 <= inside < 100
    a, b = error_laws(0.4, 1.1)
    assert difference(a, b)["high"] - difference(a, b)["low"] < 0.04  # type: ignore[operator]


def test_pairing_cancels_what_the_contexts_have_in_common() -> None:
    a, b = error_laws(0.4, 1.1)
    paired = difference(a, b)
    alone = a.compute()
    assert paired["high"] - paired["low"] < 0.2 * (alone["high"] - alone["low"])  # type: ignore[operator]


def test_an_sae_differs_from_itself_by_exactly_nothing() -> None:
    a, b = error_laws(0.4, 0.4)
    assert difference(a, a) == {"nbi_rel": 0.0, "low": 0.0, "high": 0.0}
    assert difference(a, b)["nbi_rel"] != 0


def test_the_interval_is_that_of_a_loop_over_resampled_rows() -> None:
    """The same draws, each slope from the drawn rows themselves by numpy."""
    g = torch.Generator().manual_seed(1)
    context = torch.arange(9).repeat_interleave(5)
    norm, rho_a, rho_b = (torch.rand(45, generator=g, dtype=torch.float64) + 0.1 for _ in range(3))
    draws = torch.randint(9, (40, 9), generator=torch.Generator().manual_seed(3)).numpy()
    differences = []
    for drawn in draws:
        rows = np.concatenate([np.flatnonzero(context.numpy() == c) for c in drawn])
        slopes = [np.polyfit(np.log(norm.numpy()[rows]), np.log(rho.numpy()[rows]), 1)[0] for rho in (rho_a, rho_b)]
        differences.append(slopes[0] - slopes[1])
    found = difference(index_of(context, norm, rho_a), index_of(context, norm, rho_b), resamples=40, seed=3)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(differences, [0.025, 0.975]))


def test_a_context_that_only_one_of_them_uses_is_empty_for_the_other() -> None:
    context = torch.arange(6).repeat_interleave(2)
    norm = torch.linspace(1, 9, 12, dtype=torch.float64)
    a, b = norm**0.5, norm**2
    b[4:6] = 0  # perfect rows have no logarithm
    found = difference(index_of(context, norm, a), index_of(context, norm, b))
    assert found == pytest.approx({"nbi_rel": -1.5, "low": -1.5, "high": -1.5})


def test_what_is_undefined_and_what_is_a_mistake() -> None:
    flat = index_of(torch.arange(4), torch.full((4,), 2.0), torch.rand(4))
    steep = index_of(torch.arange(4), torch.linspace(1, 2, 4), torch.rand(4))
    assert difference(steep, flat) == {"nbi_rel": None, "low": None, "high": None}
    one = index_of(torch.zeros(2, dtype=torch.int64), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert difference(one, one) == {"nbi_rel": 0.0, "low": None, "high": None}
    elsewhere = index_of(torch.arange(4) + 100, torch.linspace(1, 2, 4), torch.rand(4))
    with pytest.raises(ValueError, match="not measured on the same rows"):
        difference(steep, elsewhere)

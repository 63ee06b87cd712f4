"""topk, batchtopk and jumprelu: what a token's length does to its code."""

from __future__ import annotations

import pytest
import torch
from small_saes import D_SAE, Pass, map_weights, random_rows, random_weights

from nsae_cli.kernels.types import Weights
from nsae_cli.sae.nonlinearity import BatchTopK, JumpRelu, Nonlinearity, TopK
from nsae_cli.sae.objective import penalty_degree
from nsae_cli.sae.penalty import PENALTIES

SELECTING = [TopK(3), BatchTopK(3), JumpRelu(0.1)]


def weights_of(nonlinearity: Nonlinearity) -> Weights:
    weights = random_weights()
    if nonlinearity.name == "jumprelu":
        weights.log_threshold = torch.linspace(-2, 0.5, D_SAE, dtype=torch.float64)
    return weights


def forward(x: torch.Tensor, weights: Weights, nonlinearity: Nonlinearity, penalty: str = "l1") -> Pass:
    one = torch.ones(len(x), dtype=torch.float64)
    return Pass(x, weights, nonlinearity, PENALTIES[penalty], one, one)


@pytest.mark.parametrize("nonlinearity", SELECTING, ids=lambda act: act.name)
def test_selecting_saes_can_be_rescaled_along_with_their_inputs(nonlinearity: Nonlinearity) -> None:
    x, weights, k = random_rows(), weights_of(nonlinearity), 3.7
    scaled = map_weights(Weights(weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec), 1, k, 1, k)
    if weights.log_threshold is not None:
        scaled.log_threshold = (weights.log_threshold.exp() * k).log()
    for penalty in ("l1", "l1-decoder-norm", "l0"):
        before, after = forward(x, weights, nonlinearity, penalty), forward(k * x, scaled, nonlinearity, penalty)
        torch.testing.assert_close(after.result.error, k * before.result.error)
        assert torch.equal(after.result.l0, before.result.l0)
        degree = penalty_degree(nonlinearity.name, penalty)
        assert degree == (0 if penalty == "l0" else 1)
        torch.testing.assert_close(after.result.penalty, k**degree * before.result.penalty)


def direction_at(lengths: torch.Tensor) -> torch.Tensor:
    u = random_rows(1)[0]
    return lengths[:, None] * u / u.norm()


def without_bias() -> Weights:
    weights = random_weights()
    return Weights(weights.W_enc, 0 * weights.b_enc, weights.W_dec, 0 * weights.b_dec)


def test_a_topk_code_is_that_of_the_direction() -> None:
    n = torch.tensor([0.1, 1.0, 40.0], dtype=torch.float64)
    result = forward(direction_at(n), without_bias(), TopK(4)).result
    assert torch.equal(result.l0, torch.full((3,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(result.error / n[:, None], result.error[1:2].expand(3, -1))


def test_batchtopk_gives_long_tokens_more_features() -> None:
    n = torch.tensor([0.5, 1.0, 2.0, 4.0, 100.0], dtype=torch.float64)
    weights = without_bias()
    result = forward(direction_at(n), weights, BatchTopK(3)).result
    assert float(result.l0.sum()) == 15
    assert torch.all(result.l0.diff() >= 0)
    assert result.l0[0] < 3 < result.l0[-1]
    # The longest takes all that are positive; the features of a token are those with u·w_j > θ/n.
    along = direction_at(torch.ones(1, dtype=torch.float64)) @ weights.W_enc
    assert result.l0[-1] == (along > 0).sum()
    assert result.least_act is not None
    counts = [(along >= result.least_act * (1 - 1e-12) / length).sum() for length in n]
    assert result.l0.tolist() == [float(count) for count in counts]


def cost(n: float, f: torch.Tensor, p: int, q: int, beta: float) -> torch.Tensor:
    """Loss of x = n·d under one unit feature and a count."""
    return n**-p * (f - n).square() + beta * n**-q * PENALTIES["l0"].value(f, None)


@pytest.mark.parametrize(("p", "q"), [(p, q) for p in (0, 1, 2) for q in (0, 1)])
def test_a_count_keeps_a_feature_whole_or_drops_it(p: int, q: int) -> None:
    beta = 0.3
    for n in (0.05, 0.2, 0.9, 3.0, 25.0):
        f = torch.linspace(0, 2 * n, 20_001, dtype=torch.float64)
        best = float(f[cost(n, f, p, q, beta).argmin()])
        assert best == pytest.approx(n if beta * n ** (p - q - 2) < 1 else 0.0, rel=1e-9)


@pytest.mark.parametrize(("p", "q"), [(p, q) for p in (0, 1, 2) for q in (0, 1)])
def test_a_count_is_neutral_where_p_minus_q_is_2(p: int, q: int) -> None:
    """Costs of the codes of u, at lengths 1 and 5, put the same code first for every β iff they are proportional."""
    g = torch.linspace(0.05, 2, 40, dtype=torch.float64)
    ratios = cost(5.0, 5 * g, p, q, 0.3) / (5.0 ** (2 - p) * cost(1.0, g, p, q, 0.3 * 5.0 ** (p - q - 2)))
    torch.testing.assert_close(ratios, torch.ones(40, dtype=torch.float64))  # the effective weight β·n^(p−q−2)
    neutral = torch.allclose(cost(5.0, 5 * g, p, q, 0.3), 5.0 ** (2 - p) * cost(1.0, g, p, q, 0.3))
    assert neutral == (p - q == 2)

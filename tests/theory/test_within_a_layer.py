"""One decoder, tokens of different norm: what n^(−p) and n^(−q) do to a token's code."""

import math

import pytest
import torch
from small_saes import (
    D_IN,
    L1_POWERS,
    L2_POWERS,
    generator,
    make,
    map_weights,
    random_rows,
    random_weights,
    run,
    unit_rows,
)
from torch import Tensor

from nsae_cli.kernels.types import Weights
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.sae.objective import DEFAULT_ALPHA, Objective, beta_from_alpha

every_pq = [pytest.param(p, q, id=f"p{p}-q{q}") for p in L2_POWERS for q in L1_POWERS]


def free_code(objective: Objective, x: Tensor, W_dec: Tensor, ceiling: float = math.inf, steps: int = 500) -> Tensor:
    """argmin over 0 ≤ f ≤ ceiling of n^(−p)‖f @ W_dec − x‖² + β n^(−q) Σf, row by row (accelerated projected gradient).

    The ceiling 1 is what tanh-relu can give: any f in [0, 1) is a value of it.
    """
    w, v = objective.row_weights(x.norm(dim=1), torch.zeros(len(x), dtype=torch.bool))
    step = 1 / (2 * float(torch.linalg.matrix_norm(W_dec, 2)) ** 2)
    price = (objective.beta * v / w)[:, None]
    code = ahead = torch.zeros(len(x), len(W_dec), dtype=torch.float64)
    momentum = 1.0
    for _ in range(steps):
        slope = 2 * (ahead @ W_dec - x) @ W_dec.T + price
        following = (ahead - step * slope).clamp(0, ceiling)
        following_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / following_momentum * (following - code)
        code, momentum = following, following_momentum
    return code


def one_token(n: float, seed: int = 3) -> Tensor:
    """A row [1, D_IN] of norm n in one fixed direction."""
    x = random_rows(1, seed=seed)
    return n * x / x.norm()


def dictionary(d_sae: int = 20) -> Tensor:
    return unit_rows(torch.randn(d_sae, D_IN, generator=generator(4), dtype=torch.float64))


@pytest.mark.parametrize(("p", "q"), every_pq)
def test_a_longer_token_feels_the_sparsity_weight_n_to_the_p_minus_q_minus_1(p: int, q: int) -> None:
    n, beta, W_dec = 3.0, 0.4, dictionary()
    long = free_code(make(p=p, q=q, beta=beta), one_token(n), W_dec)
    effective = beta * n ** (p - q - 1)
    short = free_code(make(p=p, q=q, beta=effective), one_token(1.0), W_dec)
    assert long.count_nonzero() > 0
    torch.testing.assert_close(long, n * short, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("p", "q"), every_pq)
def test_sparsity_is_neutral_exactly_where_p_minus_q_is_1(p: int, q: int) -> None:
    W_dec = dictionary()
    codes = [free_code(make(p=p, q=q, beta=0.4), one_token(n), W_dec)[0] for n in (0.5, 1.0, 4.0)]
    gain = [float((code @ W_dec).norm()) / n for code, n in zip(codes, (0.5, 1.0, 4.0), strict=True)]
    if p - q == 1:
        assert gain == pytest.approx([gain[0]] * 3, rel=1e-6)
        assert len({int((code > 1e-6).sum()) for code in codes}) == 1
    else:  # long tokens are favoured below 1, and punished above
        order = gain if p - q < 1 else gain[::-1]
        assert order[0] < 0.9 * order[1]
        assert order[1] < 0.98 * order[2]


def test_p2_q1_sees_directions_only() -> None:
    x, weights = random_rows(), map_weights(random_weights(), 1, 0, 1, 0)
    lengths = (2 * torch.randn(len(x), 1, generator=generator(9), dtype=torch.float64)).exp()
    before, after = (run(make(p=2, q=1), rows, weights).loss for rows in (x, lengths * x))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=0)
    other = run(make(p=1, q=0), lengths * x, weights).loss
    torch.testing.assert_close(other, lengths[:, 0] * run(make(p=1, q=0), x, weights).loss, rtol=1e-9, atol=0)
    assert (lengths - 1).abs().min() > 0.01


def test_a_constant_b_enc_is_a_threshold_that_long_tokens_pass() -> None:
    weights = map_weights(random_weights(d_sae=200), 1, 0, 1, 0)
    weights.b_enc -= 1.0

    def l0(n: float) -> int:
        return int((SparseAutoencoder("relu", weights).encode(one_token(n)) > 0).sum())

    assert l0(0.3) < l0(1.0) < l0(10.0)
    weights.b_enc += 1.0
    assert l0(0.3) == l0(1.0) == l0(10.0)


def test_tanh_relu_codes_like_relu_until_it_saturates() -> None:
    W_dec = 3 * dictionary()
    objective = make("tanh-relu", p=1)
    counts = {}
    for n in (1.0, 2.0, 6.0, 12.0):
        unbounded, bounded = (free_code(objective, one_token(n), W_dec, ceiling) for ceiling in (math.inf, 1.0))
        counts[n] = int((unbounded > 1e-6).sum()), int((bounded > 1e-6).sum())
        if n <= 2:
            assert unbounded.max() < 1
            torch.testing.assert_close(bounded, unbounded, rtol=1e-9, atol=1e-12)
        else:
            assert unbounded.max() > 1
    # relu's L0 does not know n (p − q = 1); tanh-relu needs more features for a longer token.
    assert len({relu for relu, _ in counts.values()}) == 1
    assert counts[2.0][1] < counts[6.0][1] < counts[12.0][1]


@pytest.mark.parametrize(("p", "q"), every_pq)
def test_rows_k_times_longer_pay_a_kth_of_the_price(p: int, q: int) -> None:
    """What a free decoder can do: rows as long as their tokens, κ ∝ n, take one power of n from the L1 term."""
    n, kappa, W_dec = 3.0, 5.0, dictionary()
    long = free_code(make(p=p, q=q, beta=0.4), one_token(n), kappa * W_dec)
    unit = free_code(make(p=p, q=q, beta=0.4 / kappa), one_token(n), W_dec)
    assert unit.count_nonzero() > 0
    torch.testing.assert_close(kappa * long, unit, rtol=1e-5, atol=1e-7)


class OneDirection:
    """A token x = n·u and unit features, tied along u: W_enc,i = g_i·u, and the g_i (gains) are what is learnt."""

    def __init__(self, n: float, features: int = 1) -> None:
        self.W_dec = torch.eye(features, max(features, 2), dtype=torch.float64)
        self.u = self.W_dec.sum(0) / math.sqrt(features)
        self.x = n * self.u[None]
        self.gains = torch.full((features,), 1 / math.sqrt(features), dtype=torch.float64)

    def weights(self, gains: Tensor) -> Weights:
        d_sae, d_in = self.W_dec.shape
        zeros = torch.zeros(d_sae, dtype=torch.float64), torch.zeros(d_in, dtype=torch.float64)
        return Weights(self.u[:, None] * gains, zeros[0], self.W_dec, zeros[1])

    def descend(self, objective: Objective, steps: int = 40) -> Tensor:
        """Gradient descent on the gains, through the reference kernel; returns f / n at the end."""
        n = float(self.x.norm())
        rate = 0.25 * n ** (objective.l2_power - 2)  # half a Newton step: the error's curvature is 2·n^(2−p)
        gains = self.gains
        for _ in range(steps):
            slope = run(objective, self.x, self.weights(gains)).gradients.W_enc
            gains = gains - rate * self.u @ slope
        return torch.relu(gains)


@pytest.mark.parametrize(("p", "q"), every_pq)
@pytest.mark.parametrize("n", [0.7, 3.0])
def test_the_scalar_model(p: int, q: int, n: float) -> None:
    """f/n = 1 − (β/2)·n^(p−q−1), clipped at 0."""
    for beta in (0.1, 0.5, 2.5):
        expected = max(0.0, 1 - beta / 2 * n ** (p - q - 1))
        assert OneDirection(n).descend(make(p=p, q=q, beta=beta)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [0.8, 1.2, 1.9, 1.999, 2.0, 2.5])
def test_sq_shrinks_a_token_to_1_minus_half_beta_n_and_drops_it_from_beta_n_2(n: float) -> None:
    beta = 1.0
    token, objective = OneDirection(n), make(p=2, beta=beta)
    gain = token.descend(objective).item()
    assert gain == pytest.approx(max(0.0, 1 - beta * n / 2), abs=1e-9)
    assert (gain < 1e-9) == (beta * n >= 2)

    def cost(at: float) -> float:
        return float(run(objective, token.x, token.weights(torch.tensor([at], dtype=torch.float64))).loss)

    assert cost(1.0) == pytest.approx(beta * n)
    assert cost(0.0) == pytest.approx(1.0)
    if beta * n < 2:
        # Between 1 and 2 a full reconstruction costs more than none, and yet the best one costs less than none.
        assert cost(gain) < cost(0.0)
        assert (cost(1.0) > cost(0.0)) == (beta * n > 1)
        rho = float(run(objective, token.x, token.weights(torch.tensor([gain]).double())).result.sq_error) / n**2
        assert rho == pytest.approx((beta * n / 2) ** 2)


@pytest.mark.parametrize("features", [1, 4, 9])
def test_a_code_spread_over_m_features_is_dropped_earlier(features: int) -> None:
    """All off from βn ≥ 2/√m: a token for which no single feature exists yet is lost below βn = 2."""
    limit = 2 / math.sqrt(features)
    for n, kept in ((0.95 * limit, True), (1.05 * limit, False)):
        gains = OneDirection(n, features).descend(make(p=2, beta=1.0))
        assert bool((gains > 1e-6).any()) is kept


@pytest.mark.parametrize(("p", "q"), every_pq)
def test_a_token_is_dropped_where_no_decoder_row_is_close_enough(p: int, q: int) -> None:
    """The best code is all zero exactly where β·n^(p−q−1) ≥ 2·max_i cos(x, d_i)."""
    n, W_dec = 3.0, dictionary()
    x = one_token(n)
    closest = float((x @ W_dec.T).max()) / n
    limit = 2 * closest / n ** (p - q - 1)
    assert 0.3 < closest < 0.99
    assert free_code(make(p=p, q=q, beta=1.01 * limit), x, W_dec).max() == 0
    assert free_code(make(p=p, q=q, beta=0.99 * limit), x, W_dec).max() > 1e-4 * n


def test_a_token_that_is_off_teaches_no_feature() -> None:
    weights = random_weights()
    weights.b_enc -= 1e3
    gradients = run(make(p=2), random_rows(), weights).gradients
    assert [float(tensor.norm()) for tensor in (gradients.W_enc, gradients.b_enc, gradients.W_dec)] == [0, 0, 0]
    assert gradients.b_dec.norm() > 0


@pytest.mark.parametrize(("p", "q"), every_pq)
def test_with_the_default_beta_the_gain_depends_on_n_over_the_typical_norm(p: int, q: int) -> None:
    """relu, one feature: 1 − (α/2)·(n/ñ)^(p−q−1); at (2, 0) dropped from n/ñ = 2/α, 10 at the default α."""
    alpha, typical = DEFAULT_ALPHA["relu"], 60.0
    objective = make(p=p, q=q, beta=beta_from_alpha(alpha, "layer-norm", (p, q, 1), typical, math.nan))
    for ratio in (1.0, 5.0, 9.9, 10.1):
        gain = OneDirection(ratio * typical).descend(objective).item()
        assert gain == pytest.approx(max(0.0, 1 - alpha / 2 * ratio ** (p - q - 1)), abs=1e-9)
        assert (gain == 0) == (p - q == 2 and ratio > 2 / alpha)
    assert 2 / alpha == pytest.approx(10)

"""Every loss term and every rule for β on worked numbers, and the objective in raw and in scaled coordinates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.autoencoder import SparseAutoencoder, fold_input_scale, unfold_input_scale
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.sae.objective import Objective, beta_from_alpha, penalty_degree, refused_combination
from nsae_cli.sae.penalty import PENALTIES


@pytest.mark.parametrize(("act", "value", "slope"), [("relu", 0.5, 1.0), ("tanh-relu", 0.46211716, 0.78644773)])
def test_activations_at_one_half(act, value, slope):
    nonlinearity = NONLINEARITIES[act]
    z = torch.tensor([-2.0, 0.0, 0.5])
    acts = nonlinearity.value(z)
    torch.testing.assert_close(acts, torch.tensor([0.0, 0.0, value]))
    torch.testing.assert_close(nonlinearity.value_(z.clone()), acts)
    torch.testing.assert_close(nonlinearity.derivative(acts), torch.tensor([0.0, 0.0, slope]))
    gradient = torch.tensor([3.0, 3.0, 3.0])
    nonlinearity.scale_by_derivative_(gradient, acts)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 3 * slope]))


ACTS = torch.tensor([[0.5, 0.0, 0.2], [0.1, 0.3, 0.0]], dtype=torch.float64)
NORMS = torch.tensor([2.0, 0.5, 0.25], dtype=torch.float64)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ("l1", [0.7, 0.4]),
        ("l1-decoder-norm", [1.0 + 0.05, 0.2 + 0.15]),
        ("tanh", [math.tanh(4.0) + math.tanh(0.2), math.tanh(0.8) + math.tanh(0.6)]),
        ("l0", [2.0, 2.0]),
    ],
)
def test_penalties(penalty, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(PENALTIES[penalty].value(ACTS, NORMS).sum(1), expected)
    torch.testing.assert_close(PENALTIES[penalty].row_sums(ACTS, NORMS), expected)


@pytest.mark.parametrize("penalty", sorted(PENALTIES.keys() - {"l0"}))
def test_slopes_are_the_derivatives_of_the_value(penalty):
    acts, norms = ACTS.clone().requires_grad_(), NORMS.expand(2, 3).clone().requires_grad_()
    PENALTIES[penalty].value(acts, norms).sum().backward()
    by_act, by_norm = PENALTIES[penalty].slopes(ACTS, NORMS)
    torch.testing.assert_close(torch.as_tensor(by_act, dtype=torch.float64).expand(2, 3), acts.grad)
    found = torch.zeros(2, 3, dtype=torch.float64) if norms.grad is None else norms.grad
    torch.testing.assert_close(torch.as_tensor(by_norm, dtype=torch.float64).expand(2, 3), found)


def test_a_count_has_no_slope_but_a_jump():
    assert PENALTIES["l0"].slopes(ACTS, None) == (0.0, 0.0)
    for name, penalty in PENALTIES.items():
        just_on = torch.full((1, 1), 1e-9, dtype=torch.float64)
        jump = float(penalty.value(just_on, torch.ones(1, dtype=torch.float64)))
        assert jump == pytest.approx(penalty.jump, abs=1e-8), name


# α = .3, ñ = 4, mean n^(2−p) over the training rows 50. (p, q, h) of each case.
@pytest.mark.parametrize(
    ("rule", "powers", "expected"),
    [
        ("none", (1, 0, 1), 0.3),
        ("note", (1, 0, 1), 15.0),
        ("layer-norm", (0, 0, 1), 0.3 * 4),
        ("layer-norm", (0, 0, 0), 0.3 * 16),
        ("layer-norm", (0, 1, 1), 0.3 * 16),
        ("layer-norm", (1, 0, 1), 0.3),
        ("layer-norm", (2, 0, 1), 0.3 / 4),
        ("layer-norm", (2, 1, 1), 0.3),
        ("layer-norm", (2, 0, 0), 0.3),
    ],
)
def test_beta(rule, powers, expected):
    assert beta_from_alpha(0.3, rule, powers, norm_scale=4.0, mean_power=50.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("act", "sparsity", "degree"),
    [
        ("relu", "l1", 1),
        ("tanh-relu", "l1", 0),
        ("relu", "l1-decoder-norm", 1),
        ("tanh-relu", "l1-decoder-norm", 1),
        ("relu", "tanh", 0),
        ("tanh-relu", "tanh", 0),
    ],
)
def test_degree(act, sparsity, degree):
    assert penalty_degree(act, sparsity) == degree


def test_row_weights_and_zero_rows():
    objective = Objective("relu", 2, 1, "l1", beta=0.3, input_scale=0.5)
    norm = torch.tensor([4.0, 10.0, 0.0])
    error, sparsity = objective.row_weights(norm, torch.tensor([False, False, True]))
    torch.testing.assert_close(error, torch.tensor([0.25, 0.04, 0.0]))
    torch.testing.assert_close(sparsity, torch.tensor([0.5, 0.2, 0.0]))


def test_worked_objective():
    """x = (3, 4), n = 5; f = (.75, 0), x̂ = (1.5, 0), e = (−1.5, −4): ‖e‖² = 18.25, S = .75.

    p = 1, q = 1, β = .8: L = 18.25/5 + .8·.75/5 = 3.77.
    """
    sae = SparseAutoencoder(
        "relu",
        Weights(
            torch.tensor([[0.25, -1.0], [0.0, 0.0]]),
            torch.zeros(2),
            torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
            torch.zeros(2),
        ),
    )
    loss = raw_loss(sae, torch.tensor([[3.0, 4.0]]), "l1", 1, 1, 0.8, 1.0)
    assert loss == pytest.approx(3.77)


def raw_loss(sae: SparseAutoencoder, x, sparsity: str, p: int, q: int, beta: float, s: float) -> float:
    """The objective as DESIGN writes it, on raw x with raw weights; the tanh penalty's slope refers to s·x."""
    W = sae.weights
    f = (x @ W.W_enc + W.b_enc).clamp(min=0)
    f = f if sae.act == "relu" else f.tanh()
    error = f @ W.W_dec + W.b_dec - x
    n = (x**2).sum(1).sqrt()
    contribution = f * (W.W_dec**2).sum(1).sqrt()
    terms = {"l1": f, "l1-decoder-norm": contribution, "tanh": (4 * contribution * s).tanh(), "l0": (f > 0).double()}
    return float((n**-p * (error**2).sum(1) + beta * n**-q * terms[sparsity].sum(1)).mean())


@pytest.mark.parametrize("s", [1.0, 0.037, 12.0])
@pytest.mark.parametrize(("p", "q"), list(itertools.product((0, 1, 2), (0, 1))))
@pytest.mark.parametrize(("act", "sparsity"), list(itertools.product(NONLINEARITIES, PENALTIES)))
def test_training_in_scaled_coordinates_is_the_same_objective(act, sparsity, p, q, s):
    """L'(scaled weights, s·x) = s^(2−p)·L(folded weights, x), for the loss that the kernel minimises."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64) * 3 / s
    scaled = Weights(
        *(torch.randn(size, generator=generator) * 0.5 for size in ((6, 15), (15,), (15, 6), (6,)))
    )  # float32, as in training
    objective = Objective(act, p, q, sparsity, beta=0.7, input_scale=s)
    n = torch.linalg.vector_norm(x, dim=1)
    error_weight, sparsity_weight = objective.row_weights(n, torch.zeros(40, dtype=torch.bool))
    weights = scaled.to(torch.float64)
    result = DenseStep()(
        x * s,
        weights,
        weights.zeros_like(),
        activation=objective.nonlinearity,
        penalty=objective.penalty,
        error_weight=error_weight / 40,
        sparsity_weight=sparsity_weight * objective.beta_scaled / 40,
    )
    trained = error_weight @ result.sq_error / 40 + objective.beta_scaled * sparsity_weight @ result.penalty / 40
    folded = SparseAutoencoder(act, fold_input_scale(act, scaled, s).to(torch.float64))
    expected = raw_loss(folded, x, sparsity, p, q, 0.7, s)
    assert float(trained) / objective.loss_scale == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_folding_is_exact(act):
    """SAE(x) of the folded weights is SAE'(s·x)/s; relu's unit rows stay bit for bit; unfolding undoes it."""
    generator = torch.Generator().manual_seed(6)
    scaled = Weights(*(torch.randn(size, generator=generator) for size in ((6, 15), (15,), (15, 6), (6,))))
    s, x = 0.31, torch.randn(50, 6, generator=generator, dtype=torch.float64) * 4
    folded = fold_input_scale(act, scaled, s)
    assert all(tensor.dtype == torch.float32 for tensor in folded.tensors())
    inside = SparseAutoencoder(act, scaled.to(torch.float64))(s * x) / s
    outside = SparseAutoencoder(act, folded.to(torch.float64))(x)
    torch.testing.assert_close(outside, inside, rtol=1e-6, atol=1e-6)
    if act == "relu":
        assert torch.equal(folded.W_dec, scaled.W_dec)
        acts = SparseAutoencoder(act, folded.to(torch.float64)).encode(x)
        torch.testing.assert_close(
            acts, SparseAutoencoder(act, scaled.to(torch.float64)).encode(s * x) / s, rtol=1e-6, atol=1e-6
        )
    for before, after in zip(scaled.tensors(), unfold_input_scale(act, folded, s).tensors(), strict=True):
        torch.testing.assert_close(after, before, rtol=2e-7, atol=0)


def test_folding_by_a_power_of_two_changes_no_bit():
    generator = torch.Generator().manual_seed(7)
    scaled = Weights(*(torch.randn(size, generator=generator) for size in ((6, 15), (15,), (15, 6), (6,))))
    for act in NONLINEARITIES:
        back = unfold_input_scale(act, fold_input_scale(act, scaled, 0.125), 0.125)
        assert all(torch.equal(a, b) for a, b in zip(back.tensors(), scaled.tensors(), strict=True))


@pytest.mark.parametrize(
    ("act", "decoder", "sparsity", "refused"),
    [
        ("tanh-relu", "unit", "l1", True),
        ("tanh-relu", "unit", "tanh", True),
        ("tanh-relu", "free", "l1", False),
        ("tanh-relu", "bounded", "l1", False),
        ("relu", "free", "l1", True),
        ("relu", "free", "l1-decoder-norm", False),
        ("relu", "bounded", "l1", False),
        ("relu", "unit", "l1", False),
    ],
)
def test_refused_combinations_give_a_reason_and_a_remedy(act, decoder, sparsity, refused):
    reason = refused_combination(act, decoder, sparsity)
    assert (reason is not None) == refused
    if reason is not None:
        assert "use --decoder" in reason


def test_the_reason_for_refusing_relu_free_l1_is_true():
    """Halving acts and doubling decoder rows leaves x̂ alone and halves the penalty: there is no minimum."""
    generator = torch.Generator().manual_seed(8)
    weights = Weights(*(torch.randn(size, generator=generator) for size in ((6, 15), (15,), (15, 6), (6,))))
    x = torch.randn(9, 6, generator=generator)
    gamed = Weights(weights.W_enc / 2, weights.b_enc / 2, weights.W_dec * 2, weights.b_dec)
    plain, other = SparseAutoencoder("relu", weights), SparseAutoencoder("relu", gamed)
    torch.testing.assert_close(other(x), plain(x))
    torch.testing.assert_close(other.encode(x).sum(), plain.encode(x).sum() / 2)

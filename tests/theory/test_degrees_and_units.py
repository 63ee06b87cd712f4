"""What happens to the objective when inputs are rescaled: degrees, β across layers, training in scaled units."""

import math

import pytest
import torch
from small_saes import (
    ACTS,
    D_IN,
    L1_POWERS,
    L2_POWERS,
    SPARSITIES,
    Pass,
    geometric_mean,
    make,
    map_weights,
    random_rows,
    random_weights,
    run,
)

from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.norm_bias import measured_exponent, per_token_gradient_norms
from nsae_cli.sae import penalty as penalties
from nsae_cli.sae.autoencoder import SparseAutoencoder, fold_input_scale, unfold_input_scale
from nsae_cli.sae.objective import L1_POWER, L2_POWER, beta_from_alpha, penalty_degree

K = 3.7  # by how much the inputs grow

every_loss = [
    pytest.param(act, p, q, sparsity, id=f"{act}-p{p}-q{q}-{sparsity}")
    for act in ACTS
    for p in L2_POWERS
    for q in L1_POWERS
    for sparsity in SPARSITIES
]


def carried_along(act: str, weights: Weights, k: float) -> Weights:
    """The SAE that does on k·x what `weights` do on x, in float64."""
    ones = Weights(*(torch.ones_like(tensor) for tensor in weights.tensors()))
    factors = (float(tensor.flatten()[0]) for tensor in fold_input_scale(act, ones, 1 / k).tensors())
    return map_weights(weights, *factors)


@pytest.mark.parametrize("act", ACTS)
def test_an_sae_can_be_rescaled_along_with_its_inputs(act: str) -> None:
    x, weights = random_rows(), random_weights()
    before = SparseAutoencoder(act, weights)
    after = SparseAutoencoder(act, carried_along(act, weights, K))
    torch.testing.assert_close(after(K * x), K * before(x), rtol=1e-6, atol=1e-6)
    # relu's acts grow with x, tanh-relu's stay and its decoder grows.
    grown = K if act == "relu" else 1.0
    torch.testing.assert_close(after.encode(K * x), grown * before.encode(x), rtol=1e-6, atol=1e-6)


def test_tanh_relu_is_not_homogeneous() -> None:
    """relu's way to grow along (biases times k, matrices as they are) does not serve tanh-relu."""
    x, weights = random_rows(), random_weights()
    before = SparseAutoencoder("tanh-relu", weights)(x)
    wrong = SparseAutoencoder("tanh-relu", carried_along("relu", weights, K))
    assert (wrong(K * x) - K * before).norm() > 0.1 * (K * before).norm()


@pytest.mark.parametrize("constant", ["b_enc", "b_dec"])
def test_a_constant_bias_breaks_homogeneity(constant: str) -> None:
    x, weights = random_rows(), random_weights()
    before = SparseAutoencoder("relu", weights)
    moved = map_weights(weights, 1, 1 if constant == "b_enc" else K, 1, 1 if constant == "b_dec" else K)
    assert (SparseAutoencoder("relu", moved)(K * x) - K * before(x)).norm() > 0.01 * (K * before(x)).norm()
    bare = SparseAutoencoder("relu", map_weights(weights, 1, 0, 1, 0))
    torch.testing.assert_close(bare(K * x), K * bare(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("sparsity", ["l1", "l1-decoder-norm"])
def test_the_penalty_has_degree_h(act: str, sparsity: str) -> None:
    x, weights = random_rows(), random_weights()
    objective = make(act, sparsity=sparsity)
    before = run(objective, x, weights).result.penalty
    after = run(objective, K * x, carried_along(act, weights, K)).result.penalty
    assert objective.degree == penalty_degree(act, sparsity) == (0 if (act, sparsity) == ("tanh-relu", "l1") else 1)
    torch.testing.assert_close(after, K**objective.degree * before, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("act", ACTS)
def test_the_tanh_penalty_has_degree_0_only_with_its_slope_in_scaled_units(
    act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights = random_rows(), random_weights()
    objective = make(act, sparsity="tanh")
    assert objective.degree == 0
    before = run(objective, x, weights).result.penalty
    larger = carried_along(act, weights, K)
    assert (run(objective, K * x, larger).result.penalty / before - 1).abs().max() > 0.02
    monkeypatch.setattr(penalties, "TANH_SLOPE", penalties.TANH_SLOPE / K)
    torch.testing.assert_close(run(objective, K * x, larger).result.penalty, before, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("act", "p", "q", "sparsity"), every_loss)
def test_a_tokens_error_term_has_degree_2_minus_p_and_its_sparsity_term_h_minus_q(
    act: str, p: int, q: int, sparsity: str
) -> None:
    x, weights = random_rows(), random_weights()
    before = run(make(act, p, q, sparsity), x, weights)
    # Seen in units in which the penalty of the longer inputs is the same function: s = 1/K.
    after = run(make(act, p, q, sparsity, scale=1 / K), K * x, weights)
    error_term = after.error_term / (1 / K) ** (2 - p)  # back to raw units
    sparsity_term = after.sparsity_term / (1 / K) ** (2 - p)
    torch.testing.assert_close(error_term, K ** (2 - p) * before.error_term, rtol=1e-9, atol=1e-12)
    h = penalty_degree(act, sparsity)
    torch.testing.assert_close(sparsity_term, K ** (h - q) * before.sparsity_term, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", L2_POWERS)
def test_gradient_norms_grow_like_n_to_the_2_minus_p(p: int) -> None:
    weights = map_weights(random_weights(), 1, 0, 1, 0)
    direction = random_rows(1)[0]
    norm = torch.logspace(0, 3, 20, dtype=torch.float64)
    x = norm[:, None] * direction / direction.norm()
    acts = SparseAutoencoder("relu", weights).encode(x)
    norms = per_token_gradient_norms(
        encoder_input=x,
        acts=acts,
        act_slope=(acts > 0).double(),
        error=acts @ weights.W_dec - x,
        W_dec=weights.W_dec,
        error_weight=norm**-p,
        sparsity_weight=torch.zeros_like(norm),
        penalty_slope=torch.tensor(1.0),
        unit_decoder=False,
    )
    for measured in norms:
        assert measured_exponent(norm, measured, torch.ones(20, dtype=torch.bool)) == pytest.approx(2 - p, abs=1e-9)


@pytest.mark.parametrize(("act", "p", "q", "sparsity"), every_loss)
@pytest.mark.parametrize("scale", ["auto", 0.25])
def test_scaled_and_raw_units_give_the_same_objective(
    act: str, p: int, q: int, sparsity: str, scale: float | str
) -> None:
    x, scaled = random_rows(), random_weights()
    s = math.sqrt(D_IN) / geometric_mean(x.norm(dim=1)) if scale == "auto" else float(scale)
    raw = Weights(*(tensor.double() for tensor in fold_input_scale(act, scaled, s).tensors()))
    in_scaled = run(make(act, p, q, sparsity, scale=s), x, scaled)
    # The objective as it is defined: raw units, with the tanh penalty's slope c·s. Nothing of `Objective` is used.
    n = x.norm(dim=1)
    sae = SparseAutoencoder(act, raw)
    acts, nu = sae.encode(x), raw.W_dec.norm(dim=1)
    phi = {"l1": acts, "l1-decoder-norm": acts * nu, "tanh": (4 * s * acts * nu).tanh()}[sparsity]
    expected = n**-p * (sae(x) - x).square().sum(1) + 0.3 * n**-q * phi.sum(1)
    objective = make(act, p, q, sparsity, scale=s)
    tolerance = 1e-5 if scale == "auto" else 1e-12  # folding rounds to float32, but for powers of two
    torch.testing.assert_close(in_scaled.loss / objective.loss_scale, expected, rtol=tolerance, atol=0)
    assert objective.loss_scale == pytest.approx(s ** (2 - p))
    # β' is what makes it so.
    assert objective.beta_scaled == pytest.approx(0.3 * s ** (2 - p + q - objective.degree))


@pytest.mark.parametrize(("act", "p", "q", "sparsity"), every_loss)
def test_scaled_and_raw_units_have_the_same_stationary_points(
    act: str, p: int, q: int, sparsity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = 0.25
    x, scaled = random_rows(), random_weights()
    raw = Weights(*(tensor.double() for tensor in fold_input_scale(act, scaled, s).tensors()))
    in_scaled = run(make(act, p, q, sparsity, scale=s), x, scaled).gradients
    monkeypatch.setattr(penalties, "TANH_SLOPE", penalties.TANH_SLOPE * s)
    in_raw = run(make(act, p, q, sparsity), x, raw).gradients
    # Chain rule: raw = factor·scaled and L' = s^(2−p)·L.
    ones = Weights(*(torch.ones_like(tensor) for tensor in scaled.tensors()))
    factors = fold_input_scale(act, ones, s)
    for g_raw, g_scaled, factor in zip(in_raw.tensors(), in_scaled.tensors(), factors.tensors(), strict=True):
        assert g_raw.norm() > 1e-3
        torch.testing.assert_close(g_raw, g_scaled / factor / s ** (2 - p), rtol=1e-9, atol=1e-10)


def test_the_tanh_penalty_means_something_else_at_another_input_scale() -> None:
    x, scaled = random_rows(), random_weights()
    s = 0.25
    raw = Weights(*(tensor.double() for tensor in fold_input_scale("relu", scaled, s).tensors()))
    here = run(make("relu", sparsity="tanh", scale=s), x, scaled).sparsity_term / s**2
    there = run(make("relu", sparsity="tanh", scale=1.0), x, raw).sparsity_term
    assert (there / here - 1).abs().max() > 0.05


def test_folding_is_undone_by_unfolding() -> None:
    for act in ACTS:
        weights = random_weights()
        back = unfold_input_scale(act, fold_input_scale(act, weights, 0.31), 0.31)
        for tensor, original in zip(back.tensors(), weights.tensors(), strict=True):
            torch.testing.assert_close(tensor.double(), original, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("act", "p", "q", "sparsity"), every_loss)
def test_layer_norm_makes_layers_of_any_norm_the_same_problem(act: str, p: int, q: int, sparsity: str) -> None:
    x, scaled = random_rows(), random_weights()
    losses, betas = [], []
    for k in (1.0, K, 30.0):
        layer = k * x
        scale = geometric_mean(layer.norm(dim=1))
        beta = beta_from_alpha(0.2, "layer-norm", (p, q, penalty_degree(act, sparsity)), scale, math.nan)
        objective = make(act, p, q, sparsity, beta, math.sqrt(D_IN) / scale)
        betas.append(objective.beta_scaled)
        losses.append(run(objective, layer, scaled).loss)
    for loss, beta_scaled in zip(losses[1:], betas[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=0)
        assert beta_scaled == pytest.approx(betas[0])
    # ñ has dropped out: β' = α·d^((2−p+q−h)/2).
    assert betas[0] == pytest.approx(0.2 * D_IN ** ((2 - p + q - penalty_degree(act, sparsity)) / 2))


@pytest.mark.parametrize(("act", "p", "q", "sparsity"), every_loss)
def test_the_notes_rule_has_the_right_power_where_h_equals_q_and_only_there(
    act: str, p: int, q: int, sparsity: str
) -> None:
    norm = random_rows(500).norm(dim=1)
    h = penalty_degree(act, sparsity)

    def rule(name: str, k: float) -> float:
        mean_power = float((k * norm).pow(2 - p).mean())
        return beta_from_alpha(0.2, name, (p, q, h), k * geometric_mean(norm), mean_power)

    exponent = {name: math.log(rule(name, K) / rule(name, 1.0), K) for name in ("layer-norm", "note", "none")}
    assert exponent == pytest.approx({"layer-norm": 2 - p - h + q, "note": 2 - p, "none": 0}, abs=1e-9)
    assert (exponent["note"] == pytest.approx(exponent["layer-norm"])) == (h == q)


@pytest.mark.parametrize(("act", "p", "q", "sparsity"), every_loss)
def test_alpha_weighs_sparsity_against_the_relative_error(act: str, p: int, q: int, sparsity: str) -> None:
    """At n = ñ every loss with the same α is ñ^(2−p)·(ρ + α·S/ñ^h)."""
    x, weights = random_rows(), random_weights()
    n = 4.2
    x = n * x / x.norm(dim=1, keepdim=True)
    h = penalty_degree(act, sparsity)
    beta = beta_from_alpha(0.2, "layer-norm", (p, q, h), n, math.nan)
    step: Pass = run(make(act, p, q, sparsity, beta), x, weights)
    rho = step.result.sq_error / n**2
    expected = n ** (2 - p) * (rho + 0.2 * step.result.penalty / n**h)
    torch.testing.assert_close(step.loss, expected, rtol=1e-9, atol=0)


def test_the_names_of_the_options_stand_for_these_powers() -> None:
    assert L2_POWER == {"none": 0, "norm": 1, "sq": 2}
    assert L1_POWER == {"none": 0, "norm": 1}

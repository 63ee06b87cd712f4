"""Closed forms against autograd, one row at a time, in float64."""

import pytest
import torch
from torch import Tensor

from nsae_cli.metrics.groups import SINKS
from nsae_cli.metrics.norm_bias import GradShare, group_gradient_projection, per_token_gradient_norms

D_IN, D_SAE, ROWS = 4, 7, 6


def act(kind: str, z: Tensor) -> Tensor:
    return z.relu().tanh() if kind == "tanh-relu" else z.relu()


def penalty(kind: str, f: Tensor, row_norm: Tensor) -> Tensor:
    if kind == "l1":
        return f.sum()
    return (f * row_norm).sum() if kind == "l1-decoder-norm" else (4 * f * row_norm).tanh().sum()


@pytest.mark.parametrize("activation", ["relu", "tanh-relu"])
@pytest.mark.parametrize("sparsity", ["l1", "l1-decoder-norm", "tanh"])
@pytest.mark.parametrize("unit_decoder", [True, False])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_gradient_norms_are_those_of_autograd(
    activation: str, sparsity: str, unit_decoder: bool, subtract_b_dec: bool
) -> None:
    g = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, w, b = random(ROWS, D_IN) * 2, random(ROWS).abs(), 0.3 * random(ROWS).abs()
    W_enc, b_enc, W_dec, b_dec = random(D_IN, D_SAE), 0.1 * random(D_SAE), random(D_SAE, D_IN), 0.1 * random(D_IN)
    if unit_decoder:
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    encoder_input = x - b_dec if subtract_b_dec else x

    expected = []
    for t in range(ROWS):
        enc, dec = W_enc.clone().requires_grad_(), W_dec.clone().requires_grad_()
        f = act(activation, encoder_input[t] @ enc + b_enc)
        error = f @ dec + b_dec - x[t]
        (w[t] * error.square().sum() + b[t] * penalty(sparsity, f, dec.norm(dim=1))).backward()
        assert enc.grad is not None
        assert dec.grad is not None
        step = dec.grad
        if unit_decoder:
            step = step - (step * W_dec).sum(1, keepdim=True) * W_dec
        expected.append([enc.grad.norm().item(), step.norm().item()])

    z = encoder_input @ W_enc + b_enc
    f = act(activation, z).detach().requires_grad_()
    row_norm = W_dec.norm(dim=1).clone().requires_grad_()
    penalty_slope = torch.autograd.grad(penalty(sparsity, f, row_norm), f)[0]
    f = f.detach()
    s = {"l1": None, "l1-decoder-norm": f, "tanh": 4 * f * (1 - (4 * f * W_dec.norm(dim=1)).tanh() ** 2)}[sparsity]
    encoder, decoder = per_token_gradient_norms(
        encoder_input=encoder_input,
        acts=f,
        act_slope=(z > 0) * (1 - f**2 if activation == "tanh-relu" else 1.0),
        error=f @ W_dec + b_dec - x,
        W_dec=W_dec,
        error_weight=w,
        sparsity_weight=b,
        penalty_slope=penalty_slope,
        penalty_norm_slope=s,
        unit_decoder=unit_decoder,
    )
    assert encoder.tolist() == pytest.approx([e for e, _ in expected])
    assert decoder.tolist() == pytest.approx([d for _, d in expected])
    assert min(encoder.min(), decoder.min()) > 1e-3


def worked_norms(W_dec: Tensor, norm_slope: Tensor | None, unit_decoder: bool) -> tuple[float, float]:
    encoder, decoder = per_token_gradient_norms(
        encoder_input=torch.tensor([[0.0, 5.0]]),
        acts=torch.tensor([[2.0]]),
        act_slope=torch.tensor([[1.0]]),
        error=torch.tensor([[3.0, 4.0]]),
        W_dec=W_dec,
        error_weight=torch.tensor([0.5]),
        sparsity_weight=torch.tensor([0.1]),
        penalty_slope=torch.tensor(1.0),
        penalty_norm_slope=norm_slope,
        unit_decoder=unit_decoder,
    )
    return encoder.item(), decoder.item()


def test_worked_gradient_norms() -> None:
    # One feature with f = 2, d = (1, 0), e = (3, 4), w = .5, b = .1: δ = 2·.5·3 + .1 = 3.1, times ‖x‖ = 5.
    d = torch.tensor([[1.0, 0.0]])
    # l1, free: 2·.5·2·5. Unit: only the 4 across d counts, 2·.5·2·4.
    assert worked_norms(d, None, unit_decoder=False) == pytest.approx((15.5, 10.0))
    assert worked_norms(d, None, unit_decoder=True) == pytest.approx((15.5, 8.0))
    # l1-decoder-norm, free: 2·‖(3, 4) + .1·(1, 0)‖.
    assert worked_norms(d, torch.tensor([[2.0]]), unit_decoder=False)[1] == pytest.approx(2 * (3.1**2 + 16) ** 0.5)


def test_a_decoder_row_of_norm_0_feels_no_pull_of_the_penalty() -> None:
    zero = torch.zeros(1, 2)
    assert worked_norms(zero, torch.tensor([[2.0]]), unit_decoder=False)[1] == pytest.approx(10.0)


def test_shares_of_gradient_norms() -> None:
    shares = GradShare()
    shares.update({"W_enc": torch.tensor([1.0, 3.0]), "W_dec": torch.tensor([2.0, 2.0])}, torch.tensor([0, SINKS]))
    shares.update({"W_enc": torch.tensor([4.0]), "W_dec": torch.tensor([1.0])}, torch.tensor([1]))
    computed = shares.compute()
    assert computed["W_enc"]["sinks"] == pytest.approx(3 / 8)
    assert computed["W_enc"]["ns"] == pytest.approx(5 / 8)
    assert computed["W_dec"]["bins"][:3] == pytest.approx([2 / 5, 1 / 5, None])


def test_worked_projections() -> None:
    # g = (4, 2), ‖g‖² = 20; the third group pulls back.
    parts = [{"a": torch.tensor([3.0]), "b": torch.tensor([[1.0]])}, {"a": torch.tensor([2.0]), "b": torch.ones(1, 1)}]
    parts.append({"a": torch.tensor([-1.0]), "b": torch.tensor([[0.0]])})
    total = {"a": torch.tensor([4.0]), "b": torch.tensor([[2.0]])}
    assert group_gradient_projection([*parts, None], total) == pytest.approx([0.7, 0.5, -0.2, None])


def test_projections_of_a_batch_add_up_to_1() -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(12, 3, generator=g), torch.randn(3, 3, generator=g)
    group = torch.arange(12) % 3

    def gradient(rows: Tensor) -> dict[str, Tensor]:
        weight = W.clone().requires_grad_()
        ((x[rows] @ weight).tanh() - x[rows]).square().sum().div(12).backward()
        assert weight.grad is not None
        return {"W": weight.grad}

    projections = group_gradient_projection([gradient(group == b) for b in range(3)], gradient(group >= 0))
    assert sum(p for p in projections if p is not None) == pytest.approx(1, abs=1e-6)
    assert len({round(p or 0, 3) for p in projections}) == 3


def test_projections_on_no_gradient_are_undefined() -> None:
    zero = {"a": torch.zeros(2)}
    assert group_gradient_projection([zero, None], zero) == [None, None]


def test_gradients_of_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        group_gradient_projection([{"a": torch.zeros(1)}], {"b": torch.zeros(1)})

"""What happens to gradients and decoder rows around a step, and Adam."""

from __future__ import annotations

import pytest
import torch

from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.decoder import bound_rows_, clip_norm_, normalise_rows_, remove_parallel_component_
from nsae_cli.kernels.types import Weights


def test_the_component_along_each_unit_row_is_removed():
    W_dec = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    remove_parallel_component_(gradient, W_dec)
    # ⟨(1, 2), (.6, .8)⟩ = 2.2
    torch.testing.assert_close(gradient, torch.tensor([[1 - 2.2 * 0.6, 2 - 2.2 * 0.8], [0.0, 4.0]]))
    torch.testing.assert_close((gradient * W_dec).sum(1), torch.zeros(2), atol=1e-6, rtol=0)


def test_rows_are_normalised_and_a_zero_row_stays():
    W_dec = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -0.5]])
    normalise_rows_(W_dec)
    torch.testing.assert_close(W_dec, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))


def test_only_rows_beyond_the_bound_are_shortened():
    W_dec = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    bound_rows_(W_dec)
    torch.testing.assert_close(W_dec, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_clipping_scales_all_gradients_by_one_factor():
    gradients = Weights(torch.tensor([[3.0]]), torch.tensor([4.0]), torch.tensor([[12.0]]), torch.tensor([0.0]))
    clip_norm_(gradients, 6.5)  # norm 13
    assert [float(g) for g in gradients.tensors()] == pytest.approx([1.5, 2.0, 6.0, 0.0])
    clip_norm_(gradients, 100.0)
    assert [float(g) for g in gradients.tensors()] == pytest.approx([1.5, 2.0, 6.0, 0.0])


def random_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return Weights(*(torch.randn(size, generator=generator) for size in ((3, 5), (5,), (5, 3), (3,))))


def test_adam_equals_torch_bit_for_bit_and_goes_on_from_its_state():
    ours, theirs = random_weights(0), random_weights(0)
    parameters = list(theirs.tensors())
    optimizer = torch.optim.Adam(parameters, lr=0.01, betas=(0.9, 0.999), fused=True)
    adam = Adam(ours)
    for step in range(6):
        gradients = random_weights(step + 1)
        optimizer.param_groups[0]["lr"] = lr = 0.01 * (step + 1)
        for parameter, gradient in zip(parameters, gradients.tensors(), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in adam.state().items()}
            adam = Adam(ours)
            adam.load_state(saved)
        adam.step(gradients, lr)
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), parameters, strict=True))


def test_adam_by_hand():
    """First step: m̂ = g, v̂ = g², so every parameter moves by lr·g/(|g| + eps)."""
    weights = random_weights(0)
    before = [tensor.clone() for tensor in weights.tensors()]
    gradients = random_weights(1)
    Adam(weights).step(gradients, 0.25)
    for old, new, gradient in zip(before, weights.tensors(), gradients.tensors(), strict=True):
        torch.testing.assert_close(old - new, 0.25 * gradient.sign(), rtol=1e-5, atol=1e-6)


def test_moments_of_a_silent_feature_vanish_instead_of_turning_into_denormals():
    weights = random_weights(0)
    adam, silent = Adam(weights), weights.zeros_like()
    adam.step(random_weights(1), 0.01)
    smallest: list[float] = []
    for _ in range(1200):
        adam.step(silent, 0.01)
        moment = adam.state()["exp_avg/W_enc"].abs()
        smallest += moment[moment > 0].flatten().tolist()
    assert min(smallest) > torch.finfo(torch.float32).tiny
    assert not adam.state()["exp_avg/W_enc"].any()
    assert adam.state()["exp_avg_sq/W_enc"].all()

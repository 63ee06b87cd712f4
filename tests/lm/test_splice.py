"""Splicing into the residual stream, against hooks written by hand on the Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from tiny_gpt2 import N_LAYERS, build_model
from transformers import GPT2LMHeadModel

from nsae_cli.errors import ArtifactError
from nsae_cli.lm.families import FAMILIES
from nsae_cli.lm.splice import Splicer, replace_rows, require_hook

HOOKS = [f"blocks.{layer}.hook_{site}" for layer in range(N_LAYERS) for site in ("resid_pre", "resid_post")]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return build_model()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(1))


def plain(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def hooked(model: GPT2LMHeadModel, ids: torch.Tensor, hook: str, mask: torch.Tensor, value: float) -> torch.Tensor:
    """The full model with a forward hook that sets the masked rows to `value`."""
    _, layer, site = hook.replace("hook_", "").split(".")
    block = model.transformer.h[int(layer)]

    def edit(residual: torch.Tensor) -> torch.Tensor:
        changed = residual.clone()
        changed[mask] = value
        return changed

    if site == "resid_pre":
        handle = block.register_forward_pre_hook(lambda _, inputs: (edit(inputs[0]), *inputs[1:]))
    else:
        handle = block.register_forward_hook(lambda _, __, output: edit(output))
    try:
        return plain(model, ids)
    finally:
        handle.remove()


@pytest.mark.parametrize("hook", HOOKS)
def test_the_identity_gives_the_bits_of_the_plain_pass(model: GPT2LMHeadModel, ids: torch.Tensor, hook: str) -> None:
    splicer = Splicer(model, FAMILIES["gpt2"], hook)
    residual = splicer.residual(ids)
    assert torch.equal(splicer.logits(ids, residual), plain(model, ids))
    unchanged = replace_rows(residual, torch.ones(3, 20, dtype=torch.bool), residual.clone())
    assert torch.equal(splicer.logits(ids, unchanged), plain(model, ids))
    assert len(model.transformer.h) == N_LAYERS


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_replaced_rows_equal_a_hook_on_the_full_model(
    model: GPT2LMHeadModel, ids: torch.Tensor, hook: str, share: float
) -> None:
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < share
    splicer = Splicer(model, FAMILIES["gpt2"], hook)
    replaced = replace_rows(splicer.residual(ids), mask, torch.full((16,), 0.25))
    expected = hooked(model, ids, hook, mask, 0.25)
    assert torch.equal(splicer.logits(ids, replaced), expected)
    assert not torch.equal(expected, plain(model, ids))


def test_the_last_residual_is_before_the_final_layer_norm(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    splicer = Splicer(model, FAMILIES["gpt2"], f"blocks.{N_LAYERS - 1}.hook_resid_post")
    residual = splicer.residual(ids)
    with torch.no_grad():
        expected = model.lm_head(model.transformer.ln_f(residual))
    assert torch.equal(splicer.logits(ids, residual), expected)


def test_pads_at_the_end_do_not_reach_the_tokens_before_them(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    splicer = Splicer(model, FAMILIES["gpt2"], "blocks.1.hook_resid_post")
    padded = ids.clone()
    padded[0, 7:] = 0
    residual = splicer.residual(padded)
    alone = splicer.residual(ids[:1, :7])
    torch.testing.assert_close(residual[:1, :7], alone, rtol=1e-5, atol=1e-5)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[0, :7] = True
    spliced = splicer.logits(padded, replace_rows(residual, mask, residual * 0.5))[0, :7]
    torch.testing.assert_close(spliced, splicer.logits(ids[:1, :7], alone * 0.5)[0], rtol=1e-4, atol=1e-4)


def test_the_blocks_come_back_after_an_error(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    splicer = Splicer(model, FAMILIES["gpt2"], "blocks.0.hook_resid_post")
    before = plain(model, ids)
    with pytest.raises(RuntimeError):
        splicer.logits(ids, torch.zeros(3, 20, 5))
    assert torch.equal(plain(model, ids), before)


@pytest.mark.parametrize(
    "hook", ["blocks.3.hook_resid_post", "blocks.1.attn.hook_z", "h.1", "blocks.-1.hook_resid_pre"]
)
def test_a_hook_that_is_not_there_is_refused(hook: str) -> None:
    with pytest.raises(ArtifactError, match=r"layers 0-2|nsae splices at"):
        require_hook(hook, N_LAYERS, "tiny")

"""Harvested rows against an independent forward with hooks of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_gpt2 import MAX_CONTEXT, N_LAYERS, build_model
from torch import Tensor

from nsae_cli.errors import NumericalError, ResourceError
from nsae_cli.lm.families import FAMILIES
from nsae_cli.lm.harvest import HarvestedBatch, Harvester, HarvestSpec, ResidualReader
from nsae_cli.lm.layers import Site, hook_name
from nsae_cli.lm.packing import Context

GPT2 = FAMILIES["gpt2"]
CPU = torch.device("cpu")
LAYERS = tuple(range(N_LAYERS))


def contexts_of(lengths: list[int], seed: int = 0) -> list[Context]:
    draw = np.random.default_rng(seed)
    return [
        Context(draw.integers(1, 257, n).astype(np.int32), np.full(n, 10 + i, np.int32)) for i, n in enumerate(lengths)
    ]


def independent_residuals(model: torch.nn.Module, context: Context, site: Site) -> list[Tensor]:
    """Residuals [position, d_model] of one context alone, whole forward, hooks written for this test."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, inputs, output: seen.append((inputs[0] if site == "resid_pre" else output)[0].detach().clone())
        )
        for block in model.transformer.h
    ]
    with torch.no_grad():
        model(torch.from_numpy(context.tokens).long()[None])
    for handle in handles:
        handle.remove()
    return seen


def harvest(
    model: torch.nn.Module,
    batches: list[list[Context]],
    site: Site = "resid_post",
    vector_layers: tuple[int, ...] = LAYERS,
    norm_layers: tuple[int, ...] = LAYERS,
    dtype: torch.dtype = torch.float32,
) -> list[HarvestedBatch]:
    spec = HarvestSpec(site, vector_layers, norm_layers, dtype)
    return list(Harvester(model, GPT2, spec, CPU, lambda token: f"<{token}>").harvest(batches))


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("lengths", [[12, 12, 12], [1, MAX_CONTEXT, 7, 2]])
def test_rows_equal_an_independent_forward(site: Site, lengths: list[int]) -> None:
    model = build_model()
    contexts = contexts_of(lengths)
    [batch] = harvest(model, [contexts], site)
    oracle = [independent_residuals(model, context, site) for context in contexts]
    for layer in LAYERS:
        expected = torch.cat([residuals[layer] for residuals in oracle])
        torch.testing.assert_close(batch.vectors[hook_name(layer, site)], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch.norms[:, layer], expected.double().norm(dim=1).float(), rtol=1e-5, atol=1e-5)
    assert batch.tokens.tolist() == [int(t) for context in contexts for t in context.tokens]
    assert batch.positions.tolist() == [i for n in lengths for i in range(n)]
    assert batch.documents.tolist() == [10 + i for i, n in enumerate(lengths) for _ in range(n)]
    assert {batch.tokens.dtype, batch.positions.dtype, batch.documents.dtype} == {torch.int32}


def test_rows_equal_hidden_states_except_the_last() -> None:
    model = build_model()
    contexts = contexts_of([10, 10])
    ids = torch.stack([torch.from_numpy(context.tokens).long() for context in contexts])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    [pre] = harvest(model, [contexts], "resid_pre")
    [post] = harvest(model, [contexts], "resid_post")
    for layer in LAYERS:
        found = pre.vectors[hook_name(layer, "resid_pre")].view(2, 10, -1)
        torch.testing.assert_close(found, hidden[layer], rtol=1e-5, atol=1e-5)
    last = post.vectors[hook_name(N_LAYERS - 1, "resid_post")].view(2, 10, -1)
    assert not torch.allclose(last, hidden[-1], atol=0.1), "hidden_states[-1] is after the final LayerNorm"
    with torch.inference_mode():
        torch.testing.assert_close(model.transformer.ln_f(last), hidden[-1], rtol=1e-5, atol=1e-5)


def test_forward_stops_at_the_deepest_wanted_layer() -> None:
    model = build_model()
    calls: list[str] = []
    for layer, block in enumerate(model.transformer.h):
        block.attn.register_forward_hook(lambda *_, layer=layer: calls.append(f"attn{layer}"))
    model.transformer.ln_f.register_forward_hook(lambda *_: calls.append("ln_f"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("lm_head"))
    ids = torch.ones(1, 4, dtype=torch.long)
    for site, layers, expected in [
        ("resid_pre", [0], []),
        ("resid_pre", [2], ["attn0", "attn1"]),
        ("resid_post", [0], ["attn0"]),
        ("resid_post", [2, 0], ["attn0", "attn1", "attn2"]),
    ]:
        calls.clear()
        taken: list[int] = []
        ResidualReader(model, GPT2, site, layers).run(ids, lambda layer, _x, taken=taken: taken.append(layer))  # type: ignore[arg-type,misc]
        assert calls == expected
        assert taken == sorted(layers)


def test_no_hook_is_left_behind() -> None:
    model = build_model()
    harvest(model, [contexts_of([5])])
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model.transformer.h)


def test_norms_of_layers_whose_vectors_are_not_kept() -> None:
    [batch] = harvest(build_model(), [contexts_of([6, 6])], vector_layers=(1,))
    assert list(batch.vectors) == ["blocks.1.hook_resid_post"]
    assert batch.norms.shape == (12, N_LAYERS)


def test_norms_are_taken_before_the_cast() -> None:
    model = build_model().to(torch.bfloat16)
    [batch] = harvest(model, [contexts_of([8])], dtype=torch.float16)
    vectors = batch.vectors[hook_name(1, "resid_post")]
    assert vectors.dtype == torch.float16
    # A bf16 value is exact in fp16 here, so these norms are of the model's own output, squared in float32.
    torch.testing.assert_close(batch.norms[:, 1], vectors.double().norm(dim=1).float(), rtol=1e-6, atol=0)
    assert batch.norms.dtype == torch.float32


def test_batches_in_order_with_one_in_flight() -> None:
    model = build_model()
    contexts = contexts_of([9] * 5)
    parts = harvest(model, [contexts[:2], contexts[2:4], contexts[4:]])
    assert [part.contexts for part in parts] == [2, 2, 1]
    whole = torch.cat([part.tokens for part in parts])
    assert whole.tolist() == [int(t) for context in contexts for t in context.tokens]


def scaled_block(layer: int, factor: float, only_token: int) -> torch.nn.Module:
    """A model whose block output is multiplied where a token stands."""
    model = build_model()

    def scale(_m: object, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, only_token] *= factor
        return output

    model.transformer.h[layer].register_forward_hook(scale)
    return model


def test_fp16_overflow_names_layer_token_position_and_remedy() -> None:
    contexts = contexts_of([6])
    token = int(contexts[0].tokens[4])
    model = scaled_block(1, 1e5, only_token=4)
    with pytest.raises(NumericalError) as caught:
        harvest(model, [contexts], dtype=torch.float16, vector_layers=(0, 1))
    message = str(caught.value)
    largest = independent_residuals(build_model(), contexts[0], "resid_post")[1][4].abs().max() * 1e5
    assert message.startswith(f"layer 1: {largest:,.0f} at token '<{token}>' (id {token}) at position 4 of document 10")
    assert message.endswith("use --dtype bf16")


def test_large_values_fit_bf16_and_unkept_layers_may_overflow() -> None:
    model = scaled_block(1, 1e5, only_token=4)
    [batch] = harvest(model, [contexts_of([6])], dtype=torch.bfloat16)
    assert torch.isfinite(batch.vectors["blocks.1.hook_resid_post"]).all()
    [batch] = harvest(model, [contexts_of([6])], dtype=torch.float16, vector_layers=(0,))
    assert float(batch.norms[4, 1]) > 65504


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad: float) -> None:
    model = scaled_block(1, bad, only_token=2)
    with pytest.raises(NumericalError, match=r"layer 1: .* not finite at token '<\d+>' .*position 2 of document 10"):
        harvest(model, [contexts_of([6])], vector_layers=(0,))


def test_device_out_of_memory_names_the_option() -> None:
    model = build_model()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.transformer.h[0].register_forward_pre_hook(fail)
    with pytest.raises(ResourceError, match=r"out of memory on cpu .*lower --batch-size"):
        harvest(model, [contexts_of([6])])


def test_other_runtime_errors_stay_bugs() -> None:
    model = build_model()

    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    model.transformer.h[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes"):
        harvest(model, [contexts_of([6])])

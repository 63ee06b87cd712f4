"""Every family, site and layer against a forward pass written for these tests (`own_forward`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_forward import OwnForward, own_forward
from tiny_models import MAX_CONTEXT, N_LAYERS, TINY, VOCABULARY
from torch import Tensor

from nsae_cli.errors import ArtifactError, UsageError
from nsae_cli.lm.families import FAMILIES
from nsae_cli.lm.harvest import HarvestedBatch, Harvester, HarvestSpec, ResidualReader
from nsae_cli.lm.layers import SITES, Site, hook_name
from nsae_cli.lm.loading import inspect_model, load_model
from nsae_cli.lm.packing import Context
from nsae_cli.lm.splice import Splicer
from nsae_cli.lm.unembedding import unembedding_of

CPU = torch.device("cpu")
LAYERS = tuple(range(N_LAYERS))
LENGTHS = (20, 1, MAX_CONTEXT, 7)


@pytest.fixture(scope="module", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return TINY[name].build()


@pytest.fixture(scope="module")
def own(name: str, model: Any) -> OwnForward:
    return own_forward(model, TINY[name].model_type)


@pytest.fixture(scope="module")
def contexts() -> list[Context]:
    draw = np.random.default_rng(0)
    return [Context(draw.integers(1, VOCABULARY, n).astype(np.int32), np.zeros(n, np.int32)) for n in LENGTHS]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


def sites_of(name: str, model: Any) -> tuple[Site, ...]:
    return FAMILIES[TINY[name].model_type].sites(model.config)


def harvest(name: str, model: Any, contexts: list[Context], site: Site) -> HarvestedBatch:
    spec = HarvestSpec(site, LAYERS, LAYERS, torch.float32)
    [batch] = Harvester(model, FAMILIES[TINY[name].model_type], spec, CPU, str).harvest([contexts])
    return batch


def test_sites_of_each_family(name: str, model: Any) -> None:
    expected = {
        "pythia": {"resid_pre", "resid_post", "attn_out", "mlp_out"},
        "opt-350m": {"resid_pre", "resid_post"},
    }
    assert set(sites_of(name, model)) == expected.get(name, set(SITES))


def test_every_site_and_layer_equals_the_own_forward(
    name: str, model: Any, own: OwnForward, contexts: list[Context]
) -> None:
    expected = [own.run(context.tokens.tolist()).sites for context in contexts]
    for site in sites_of(name, model):
        batch = harvest(name, model, contexts, site)
        for layer in LAYERS:
            rows = torch.cat([sites[layer, site] for sites in expected])
            found = batch.vectors[hook_name(layer, site)]
            torch.testing.assert_close(found.double(), rows, rtol=1e-4, atol=1e-4 * float(rows.abs().max()))
            torch.testing.assert_close(batch.norms[:, layer].double(), rows.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_what_blocks_add_sums_up_to_the_stream(name: str, model: Any, contexts: list[Context]) -> None:
    sites = sites_of(name, model)
    if "attn_out" not in sites:
        return
    read = {site: harvest(name, model, contexts, site).vectors for site in sites}

    def at(site: Site, layer: int) -> Tensor:
        return read[site][hook_name(layer, site)]

    for layer in LAYERS:
        pre, attn, mlp, post = (at(site, layer) for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        rounding = 4 * torch.finfo(torch.float32).eps * (pre.abs() + attn.abs() + mlp.abs())
        if "resid_mid" in sites:
            mid = at("resid_mid", layer)
            assert torch.equal(pre + attn, mid)
            assert torch.equal(mid + mlp, post)
        assert ((pre + attn + mlp - post).abs() <= rounding).all()
        if layer:
            assert torch.equal(at("resid_post", layer - 1), pre)


def test_forward_stops_at_the_deepest_wanted_site(name: str, model: Any, ids: Tensor) -> None:
    family = FAMILIES[TINY[name].model_type]
    calls: list[str] = []
    handles = [model.get_output_embeddings().register_forward_hook(lambda *_: calls.append("head"))]
    for layer, block in enumerate(model.base_model.get_submodule(family.blocks)):
        for part in {family.attn_out, family.mlp_out}:
            module = block.get_submodule(part)
            handles.append(
                module.register_forward_hook(lambda *_, part=part, layer=layer: calls.append(f"{part}{layer}"))
            )
    attn, mlp = (f"{part}1" for part in (family.attn_out, family.mlp_out))
    expected = {"resid_pre": set(), "attn_out": {attn}, "resid_mid": {attn}, "mlp_out": {attn, mlp}}
    for site in sites_of(name, model):
        calls.clear()
        ResidualReader(model, family, site, [1]).run(ids, lambda *_: None)
        in_block_1 = {call for call in calls if call.endswith("1")}
        assert in_block_1 == expected.get(site, {attn, mlp}), site
        assert not any(call.endswith(("2", "head")) for call in calls)
    for handle in handles:
        handle.remove()


# Splicing ------------------------------------------------------------------------------------------------------------


def plain(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def test_the_own_forward_has_the_models_logits(model: Any, own: OwnForward, ids: Tensor) -> None:
    expected = torch.stack([own.run(row.tolist()).logits for row in ids])
    torch.testing.assert_close(plain(model, ids).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_is_put_back_unchanged_gives_the_bits_of_the_plain_pass(name: str, model: Any, ids: Tensor) -> None:
    family = FAMILIES[TINY[name].model_type]
    expected = plain(model, ids)
    for site in sites_of(name, model):
        for layer in LAYERS:
            splicer = Splicer(model, family, hook_name(layer, site))
            assert torch.equal(splicer.logits(ids, splicer.residual(ids)), expected), (site, layer)
    assert torch.equal(plain(model, ids), expected)


#: The blocks, and of a block the modules that write attention's and MLP's part.
PARTS = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "mistral": ("model.layers", "self_attn", "mlp"),
    "qwen2": ("model.layers", "self_attn", "mlp"),
    "qwen3": ("model.layers", "self_attn", "mlp"),
    "gemma": ("model.layers", "self_attn", "mlp"),
    "gemma2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "opt": ("model.decoder.layers", "self_attn", "fc2"),
}


class _Zeroed:
    """Zeros at a site by hooks written for this test, on the block's own modules and the whole model."""

    def __init__(self, model: Any, model_type: str, layer: int, site: Site) -> None:
        blocks, attn, mlp = PARTS[model_type]
        block = model.get_submodule(f"{blocks}.{layer}")
        self._streams: list[Tensor] = []
        zero = {"attn_out": [attn], "mlp_out": [mlp]}.get(site, [])
        self._handles = [block.get_submodule(part).register_forward_hook(self._zero_output) for part in zero]
        if site == "resid_post":
            self._handles.append(block.register_forward_hook(self._zero_output))
        if site in ("resid_pre", "resid_mid"):
            self._handles.append(block.register_forward_pre_hook(self._zero_input, with_kwargs=True))
        if site == "resid_mid":  # zero stream + zero attention
            self._handles.append(block.get_submodule(attn).register_forward_hook(self._zero_output))

    @staticmethod
    def _zero_output(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    @staticmethod
    def _zero_input(_module: Any, inputs: Any, options: Any) -> Any:
        return (torch.zeros_like(inputs[0]), *inputs[1:]), options

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def test_zeros_equal_zeroing_by_hand(name: str, model: Any, ids: Tensor) -> None:
    model_type = TINY[name].model_type
    for site in sites_of(name, model):
        for layer in LAYERS:
            splicer = Splicer(model, FAMILIES[model_type], hook_name(layer, site))
            found = splicer.logits(ids, torch.zeros_like(splicer.residual(ids)))
            by_hand = _Zeroed(model, model_type, layer, site)
            expected = plain(model, ids)
            by_hand.remove()
            assert torch.equal(found, expected), (site, layer)
            assert not torch.equal(found, plain(model, ids)), (site, layer)


def test_a_site_that_the_model_lacks_is_refused() -> None:
    model = TINY["pythia"].build()
    with pytest.raises(ArtifactError, match=r"resid_mid: the model has resid_post, resid_pre, attn_out, mlp_out only"):
        Splicer(model, FAMILIES["gpt_neox"], "blocks.1.hook_resid_mid")


# Loading and unembedding ---------------------------------------------------------------------------------------------


def test_a_saved_model_is_read_as_it_was(name: str, model: Any, tmp_path: Path, ids: Tensor) -> None:
    info = inspect_model(str(TINY[name].save(tmp_path / "model")))
    assert (info.n_layers, info.d_model, info.max_context, info.vocab_size) == (N_LAYERS, 16, MAX_CONTEXT, VOCABULARY)
    assert info.sites == sites_of(name, model)
    loaded = load_model(info, CPU, torch.float32, with_head=True)
    torch.testing.assert_close(plain(loaded, ids), plain(model, ids), rtol=1e-4, atol=1e-4)
    bare = load_model(info, CPU, torch.float32)
    for site in info.sites:
        taken: dict[int, Tensor] = {}
        ResidualReader(bare, info.family, site, LAYERS).run(ids, lambda layer, x, taken=taken: taken.update({layer: x}))  # type: ignore[misc]
        for layer in LAYERS:
            expected = Splicer(model, info.family, hook_name(layer, site)).residual(ids)
            torch.testing.assert_close(taken[layer], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_language_model_of_one_that_reads_images(tmp_path: Path, ids: Tensor) -> None:
    """The way that docs/models.md shows."""
    import transformers

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = transformers.Gemma3TextConfig(**{**TINY["gemma3"].options, "tie_word_embeddings": True})
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(UsageError, match="'gemma3' reads more than text"):
        inspect_model(str(tmp_path / "whole"))

    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    whole.model.language_model.save_pretrained(tmp_path / "text")
    info = inspect_model(str(tmp_path / "text"))
    assert info.model_type == "gemma3_text"
    loaded = load_model(info, CPU, torch.float32, with_head=True)
    torch.testing.assert_close(plain(loaded, ids), plain(whole.eval(), ids), rtol=1e-5, atol=1e-5)


def test_effect_on_the_logits_is_the_change_of_the_models_own(name: str, model: Any) -> None:
    """The derivative of the logits along a direction, where norm and size of the row stay as they are."""
    family = FAMILIES[TINY[name].model_type]
    unembedding = unembedding_of(model, family)
    generator = torch.Generator().manual_seed(5)
    x, direction = torch.randn(2, 16, generator=generator)
    if unembedding.centres:
        x = x - x.mean()
        direction = direction - direction.mean()
    direction -= x * (direction @ x) / (x @ x)  # leaves the row's size unchanged to first order
    splicer = Splicer(model, family, hook_name(N_LAYERS - 1, "resid_post"))
    ids = torch.ones(1, 1, dtype=torch.long)
    step = 1e-2
    up, down = (splicer.logits(ids, (x + sign * step * direction)[None, None])[0, 0].double() for sign in (1, -1))
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        up, down = (cap * (logits / cap).atanh() for logits in (up, down))
    size = x.pow(2).mean().sqrt() if name != "opt-350m" else 1.0
    found = unembedding.effect(direction[None])[0] / size
    expected = (up - down) / (2 * step)
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=5e-3 * float(expected.abs().max()))

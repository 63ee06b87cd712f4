"""SAEs that the peers' packages saved, against what those packages compute (see golden/make_golden.py)."""

from __future__ import annotations

import shutil

import pytest
import torch
from golden_saes import FOLDERS, GOLDEN, change_config, change_tensors, copied
from safetensors.torch import load_file

from nsae_cli.interop.opening import open_sae
from nsae_cli.sae.autoencoder import SparseAutoencoder


def test_every_format_is_there():
    assert len(FOLDERS) == 24
    assert {name.partition("-")[0].partition("/")[0] for name in FOLDERS} == {
        "saelens6", "saelens5", "sparsify", "dictionary_learning", "openai",
    }  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_acts_and_reconstructions_are_the_peers(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    acts, x_hat = open_sae(str(GOLDEN / name)).sae.reconstruct(expected["x"])
    # Folding rounds once more than computing as the peer does: relative to the size of the row's own values.
    for ours, theirs in ((acts, expected["acts"]), (x_hat, expected["x_hat"])):
        size = theirs.abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
        assert float(((ours - theirs) / size).abs().max()) < 2e-6
    assert torch.equal(acts > 0, expected["acts"] > 0)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_widths_and_the_model_are_known(name):
    found = open_sae(str(GOLDEN / name))
    assert (found.sae.d_in, found.sae.d_sae) == (8, 16)
    assert found.model == "gpt2"
    assert found.weights_file.is_file()


@pytest.mark.parametrize(
    ("name", "hook", "context_size", "prepend_bos"),
    [
        ("saelens6-standard", "blocks.6.hook_resid_pre", 128, True),
        ("saelens5-old-keys", "blocks.8.hook_resid_pre", 128, True),
        ("sparsify/h.6", "blocks.6.hook_resid_post", 512, False),
        ("dictionary_learning-AutoEncoder", "blocks.3.hook_resid_post", 128, None),
        ("openai-topk", "blocks.8.hook_resid_post", 64, None),
    ],
)
def test_where_it_reads_is_known(name, hook, context_size, prepend_bos):
    found = open_sae(str(GOLDEN / name))
    assert (found.hook, found.context_size, found.prepend_bos) == (hook, context_size, prepend_bos)


def test_what_a_plain_sae_can_express_is_one():
    plain = {name for name in FOLDERS if isinstance(open_sae(str(GOLDEN / name)).sae, SparseAutoencoder)}
    assert set(FOLDERS) - plain == {
        "saelens6-standard-layer-norm", "saelens6-standard-constant-norm", "saelens5-topk", "openai-topk",
    }  # fmt: skip


def test_tanh_relu_of_saelens_0_6_to_5(tmp_path):
    """SAELens 6 reads this very folder as relu."""
    folder = copied("saelens5-relu", tmp_path)
    change_config(folder, activation_fn_str="tanh-relu")
    weights, x = load_file(folder / "sae_weights.safetensors"), load_file(folder / "expected.safetensors")["x"]
    acts, x_hat = open_sae(str(folder)).sae.reconstruct(x)
    pre_acts = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    torch.testing.assert_close(acts, torch.tanh(pre_acts.clamp_min(0)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, acts @ weights["W_dec"] + weights["b_dec"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tensor", ["scaling_factor", "finetuning_scaling_factor"])
def test_finetuned_scaling_factors_multiply_the_acts_before_decoding(tmp_path, tensor):
    folder = copied("saelens5-relu", tmp_path)
    expected, factor = load_file(folder / "expected.safetensors"), torch.linspace(0.5, 1.5, 16)
    change_tensors(folder, **{tensor: factor})
    change_config(folder, finetuning_scaling_factor=True)
    acts, x_hat = open_sae(str(folder)).sae.reconstruct(expected["x"])
    weights = load_file(folder / "sae_weights.safetensors")
    torch.testing.assert_close(acts, expected["acts"], rtol=1e-5, atol=1e-4)
    by_hand = (expected["acts"] * factor) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(x_hat, by_hand, rtol=1e-5, atol=1e-3)


def test_scaling_factors_of_one_were_written_for_a_time_and_mean_nothing(tmp_path):
    folder = copied("saelens5-relu", tmp_path)
    change_tensors(folder, scaling_factor=torch.ones(16))
    expected = load_file(folder / "expected.safetensors")
    torch.testing.assert_close(open_sae(str(folder)).sae.reconstruct(expected["x"])[0], expected["acts"])


def test_a_scale_that_cfg_json_names_is_folded_as_well(tmp_path):
    folder = copied("saelens6-average-scale", tmp_path)
    (folder / "activation_scaler.json").unlink()
    change_config(folder, norm_scaling_factor=0.037)
    expected = load_file(folder / "expected.safetensors")
    torch.testing.assert_close(
        open_sae(str(folder)).sae.reconstruct(expected["x"])[1], expected["x_hat"], rtol=1e-5, atol=1e-3
    )


def test_half_precision_weights_are_read_as_float32(tmp_path):
    folder = copied("saelens6-standard", tmp_path)
    weights = load_file(folder / "sae_weights.safetensors")
    change_tensors(folder, **{name: tensor.bfloat16() for name, tensor in weights.items()})
    sae = open_sae(str(folder)).sae
    assert torch.equal(sae.weights.W_dec, weights["W_dec"].bfloat16().float())


def test_several_seeds_of_sparsify(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "sparsify", run)
    shutil.move(run / "h.6", run / "seed1")
    (run / "layers.4").mkdir()
    shutil.move(run / "seed1", run / "layers.4" / "seed1")
    found = open_sae(str(run / "layers.4" / "seed1"))
    assert (found.hook, found.context_size) == ("blocks.4.hook_resid_post", 512)


@pytest.mark.parametrize(("folder", "hook"), [("h.2.mlp", "h.2.mlp"), ("an_sae", None)])
def test_another_hookpoint_of_sparsify_keeps_its_name(tmp_path, folder, hook):
    shutil.copytree(GOLDEN / "sparsify" / "h.6", tmp_path / folder)
    assert open_sae(str(tmp_path / folder)).hook == hook


def test_an_unset_threshold_of_batchtopk_lets_all_positive_acts_pass(tmp_path):
    folder = copied("dictionary_learning-BatchTopKSAE", tmp_path)
    change_tensors(folder, "ae.safetensors", threshold=torch.tensor(-1.0))
    found, x = open_sae(str(folder)), load_file(folder / "expected.safetensors")["x"]
    weights = load_file(folder / "ae.safetensors")
    relu = torch.relu((x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    torch.testing.assert_close(found.sae.reconstruct(x)[0], relu, rtol=1e-5, atol=1e-4)
    assert "never set" in found.notes[0]


def test_a_row_of_zeros_stays_finite_under_row_normalisation():
    for name in ("saelens6-standard-layer-norm", "saelens6-standard-constant-norm"):
        _, x_hat = open_sae(str(GOLDEN / name)).sae.reconstruct(torch.zeros(1, 8))
        assert torch.isfinite(x_hat).all()

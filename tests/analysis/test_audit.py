"""`nsae audit` on SAEs whose numbers are known, in the layouts of other libraries, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import TRAIN, nsae
from nsae_cli.interop.normalized import RowCentredAutoencoder
from nsae_cli.interop.opening import open_sae
from nsae_cli.store.shards import open_activations

D = 64
HOOK = "blocks.2.hook_resid_post"
#: 46 contexts of 128 tokens.
TEXT = ("--tokens", "5888", "--device", "cpu")
PLUS_MINUS = torch.cat([torch.eye(D), -torch.eye(D)])


def make_sae(folder: Path, decoder: torch.Tensor, encoder: torch.Tensor | None = None, **metadata: object) -> Path:
    """A relu SAE in SAELens' layout: pre_acts = (x, −x), x̂ = acts @ decoder."""
    folder.mkdir(parents=True)
    W_enc = PLUS_MINUS.T if encoder is None else encoder
    tensors = {"W_enc": W_enc, "b_enc": torch.zeros(2 * D), "W_dec": decoder, "b_dec": torch.zeros(D)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    known = {"model_name": "mini-sink", "hook_name": HOOK, "context_size": 128, "prepend_bos": True}
    config = {"architecture": "standard", "d_in": D, "d_sae": 2 * D, "metadata": {"sae_lens_version": "6.54.12"}}
    config["metadata"] |= known | metadata
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the activations that the audits are to make, and trained SAEs."""
    root = tmp_path_factory.mktemp("audit")
    collected = nsae("--workspace", root, "collect", "--model", "mini-sink", "--layers", "2", "--norms", "stored",
                     "--dtype", "fp32", *TEXT, "--name", "acts")  # fmt: skip
    assert collected.code == 0, collected.err
    assert nsae("--workspace", root, *TRAIN, "--name", "grid").code == 0
    return root


def audit(workspace: Path, sae: object, *options: object) -> dict:
    """audit.json of a successful audit."""
    outcome = nsae("--workspace", workspace, "--json", "audit", sae, *options)
    assert outcome.code == 0, outcome.err
    return outcome.json["result"]


@pytest.fixture(scope="module")
def half(workspace: Path) -> dict:
    """x̂ = x/2: every row has ρ = 1/4, all of it length."""
    return audit(workspace, make_sae(workspace / "other" / "half", PLUS_MINUS / 2), *TEXT)


def rows_of(workspace: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """x and positions as `collect` stored them, float64."""
    store = open_activations(workspace / "activations" / "acts")
    return store.read(0, [HOOK])[HOOK].double(), store.positions(0)


# Numbers --------------------------------------------------------------------------------------------------------------


def test_an_sae_that_changes_nothing_costs_nothing(workspace):
    found = audit(workspace, make_sae(workspace / "other" / "identity", PLUS_MINUS), *TEXT)
    assert found["metrics"]["all"]["mse"] == 0
    assert found["metrics"]["ns"]["explained_variance"] == 1
    for key in ("delta_ce_all", "delta_ce_ns", "kl"):
        assert found["behaviour"][key]["value"] == 0
    # A dense code: every coordinate of x is in one of two features.
    assert found["metrics"]["all"]["l0"] == D


def test_errors_by_hand(workspace, half):
    x, positions = rows_of(workspace)
    sinks, metrics = positions == 0, half["metrics"]
    for scope in ("all", "ns", "sinks"):
        assert metrics[scope]["mre"] == pytest.approx(0.25, rel=1e-6)
        assert metrics[scope]["magnitude_error"] == pytest.approx(0.25, rel=1e-6)
        assert metrics[scope]["shrinkage"] == pytest.approx(0.5, rel=1e-6)
    assert abs(metrics["ns"]["nbi"]) < 1e-6
    mean = x[~sinks].mean(dim=0)
    for scope, of in (("all", torch.ones(len(x), dtype=torch.bool)), ("ns", ~sinks)):
        variance = 1 - 0.25 * x[of].square().sum() / (x[of] - mean).square().sum()
        assert metrics[scope]["explained_variance"] == pytest.approx(float(variance), rel=1e-5)
    assert half["rows"]["rows"] == len(x)
    assert half["rows"]["held_out"] is False


def test_sinks_groups_and_kinds_by_hand(workspace, half):
    x, positions = rows_of(workspace)
    norm, sinks = x.norm(dim=1), half["sinks"]
    assert (sinks["evaluated"], sinks["only_position0"], sinks["norm"]) == (46, True, 46)
    assert sinks["share_sq"] == pytest.approx(float((norm[positions == 0] ** 2).sum() / (norm**2).sum()), rel=1e-5)
    order = norm.argsort(stable=True)
    k = round(0.01 * len(x))
    l1 = x.abs().sum(dim=1)
    for name, rows in (("bottom", order[:k]), ("other", order[k:-k]), ("top", order[-k:])):
        group = half["groups"][name]
        assert group["rows"] == len(rows)
        assert group["norm_max"] == pytest.approx(float(norm[rows].max()), rel=1e-5)
        assert group["l1"]["mean"] == pytest.approx(float(l1[rows].mean()), rel=1e-5)
        assert group["l1_share"] == pytest.approx(float(l1[rows].sum() / l1.sum()), rel=1e-5)
    assert half["kinds"]["position0"]["rows"] == 46
    assert sum(kind["rows"] for kind in half["kinds"].values()) == len(x)


def test_zero_reconstructions_are_zero_ablation(workspace):
    found = audit(workspace, make_sae(workspace / "other" / "zero", torch.zeros(2 * D, D)), *TEXT)
    behaviour = found["behaviour"]
    assert behaviour["ce_with_sae"]["value"] == pytest.approx(behaviour["ce_zero"]["value"], rel=1e-9)
    assert behaviour["ce_recovered_zero"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["metrics"]["all"]["mre"] == 1


def test_a_store_gives_the_same_numbers_as_running_the_model(workspace, half):
    stored = audit(workspace, workspace / "other" / "half", "--activations", "acts", "--no-behaviour", "--name", "st")
    assert stored["rows"]["rows"] == half["rows"]["rows"]
    assert stored["metrics"]["ns"]["fvu_p0"] == pytest.approx(half["metrics"]["ns"]["fvu_p0"], rel=1e-5)
    assert stored["groups"]["top"]["l0"] == half["groups"]["top"]["l0"]
    assert stored["sinks"]["evaluated"] == half["sinks"]["evaluated"]
    assert stored["behaviour"] is None


def test_a_store_with_tokens_is_spliced_on_its_held_out_contexts(workspace):
    options = ("--activations", "acts", "--bins", "--name", "bins", "--device", "cpu")
    found = audit(workspace, workspace / "other" / "half", *options)
    assert found["behaviour"]["contexts"] == 2
    assert len(found["behaviour"]["bins"]) == 10
    assert found["behaviour"]["delta_ce_all"]["value"] > 0


def test_an_altered_store_is_measured_but_not_spliced(workspace):
    assert nsae("--workspace", workspace, "alter", "acts", "--stretch-norms", "2", "--name", "stretched").code == 0
    options = ("--activations", "stretched", "--name", "stretched")
    found = audit(workspace, workspace / "other" / "half", *options)
    assert found["behaviour"] is None
    assert "so the model does not make them and ΔCE is not measured" in found["warnings"][0]
    assert found["metrics"]["ns"]["mre"] == pytest.approx(0.25, rel=1e-5)


# Norm bias against another SAE ----------------------------------------------------------------------------------------


def test_nbi_rel_of_equal_saes_is_zero_and_of_a_worse_one_on_long_rows_above(workspace):
    half = workspace / "other" / "half"
    same = audit(workspace, half, *TEXT, "--no-behaviour", "--reference", half, "--name", "same")["nbi_rel"]
    assert (same["nbi_rel"], same["low"], same["high"]) == (0, 0, 0)
    # With b_dec ≠ 0 a constant is added to x/2, which weighs less on long rows.
    shifted = Path(shutil.copytree(half, workspace / "other" / "shifted"))
    tensors = load_file(shifted / "sae_weights.safetensors")
    save_file(tensors | {"b_dec": torch.full((D,), 0.5)}, shifted / "sae_weights.safetensors")
    config = json.loads((shifted / "cfg.json").read_text()) | {"apply_b_dec_to_input": False}
    (shifted / "cfg.json").write_text(json.dumps(config))
    options = (*TEXT, "--no-behaviour", "--reference", shifted, "--no-centre", "--name", "other")
    other = audit(workspace, half, *options)
    assert other["nbi_rel"]["low"] > 0
    assert any("harder on long tokens than shifted" in sentence for sentence in other["verdict"])


# nsae's own -----------------------------------------------------------------------------------------------------------


def test_own_saes_are_audited_where_they_were_not_trained(workspace):
    outcome = nsae("--workspace", workspace, "audit", "grid/L2-relu", *TEXT, "--no-behaviour")
    assert outcome.code == 0, outcome.err
    assert "5,888 held-out tokens of builtin" in outcome.out
    run = json.loads((workspace / "saes/grid/L2-relu/run.json").read_text())
    again = audit(workspace, "grid/L2-relu", "--activations", "acts", "--no-behaviour", "--name", "own")
    # The same rows as those of run.json, under the same rules; so are the numbers, to the bit.
    for key in ("mre", "fvu_p0", "l0", "nbi", "nbi_low"):
        assert again["metrics"]["ns"][key] == run["metrics"]["ns"][key]
    assert again["rows"]["held_out"] is True


def test_the_same_audit_again_is_there_already(workspace, half):
    outcome = nsae("--workspace", workspace, "audit", workspace / "other" / "half", *TEXT)
    assert outcome.code == 0
    assert "already complete" in outcome.err
    other = nsae("--workspace", workspace, "audit", workspace / "other" / "half", *TEXT, "--top", "2%")
    assert other.code == 2
    assert "--name half holds another audit (--top 0.01 -> 0.02)" in other.message


def test_a_group_is_several(workspace):
    outcome = nsae("--workspace", workspace, "audit", "grid", "--no-behaviour")
    assert outcome.code == 2
    assert "holds 2 SAEs: L2-relu, L2-tanh-relu; name one" in outcome.message


# What an audit says ---------------------------------------------------------------------------------------------------


def test_the_verdict_is_printed(workspace, half):
    outcome = nsae("--workspace", workspace, "audit", workspace / "other" / "half", *TEXT)
    text = " ".join(outcome.out.split())
    assert "Audit of half SAELens standard, 128 features on blocks.2.hook_resid_post, of mini-sink" in text
    assert "without position 0: it is 0.781 % of the tokens and holds 7" in text
    assert "0.25 of length; reconstructions are too short (γ 0.500)" in text
    assert "Spliced in everywhere it costs the model" in text


def test_another_context_length_and_another_beginning_are_said(workspace):
    sae = make_sae(workspace / "other" / "short", PLUS_MINUS, context_size=64, prepend_bos=False)
    options = (*TEXT, "--no-behaviour", "--context", "128", "--bos")
    outcome = nsae("--workspace", workspace, "audit", sae, *options)
    assert outcome.code == 0, outcome.err
    assert "measured on contexts of 128 tokens, it was trained on 64" in outcome.err
    assert "trained without the BOS token at the start of each context and is measured with" in outcome.err
    own = audit(workspace, sae, *TEXT, "--no-behaviour", "--name", "short-own")
    assert (own["rows"]["context_size"], own["rows"]["bos"], own["warnings"]) == (64, False, [])


def test_centred_activations_are_noticed(workspace):
    """Weights that see and give only what is orthogonal to 1, as those of SAEs on centred activations."""
    P = torch.eye(D) - 1 / D
    sae = make_sae(workspace / "other" / "centred", PLUS_MINUS @ P, P @ PLUS_MINUS.T)
    centred = audit(workspace, sae, *TEXT, "--no-behaviour")
    assert centred["metrics"]["all"]["mre"] < 1e-9
    assert "without their mean over d_in" in centred["warnings"][0]
    plain = audit(workspace, sae, *TEXT, "--no-behaviour", "--no-centre", "--name", "plain")
    x, _ = rows_of(workspace)
    expected = (D * x.mean(dim=1) ** 2 / x.square().sum(dim=1)).mean()
    assert plain["metrics"]["all"]["mre"] == pytest.approx(float(expected), rel=1e-4)
    assert plain["warnings"] == []


def test_a_centred_sae_is_unchanged_on_centred_rows(workspace):
    sae = open_sae(str(workspace / "other" / "half")).sae
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    x -= x.mean(dim=1, keepdim=True)
    torch.testing.assert_close(RowCentredAutoencoder(sae).reconstruct(x)[1], sae.reconstruct(x)[1])


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "options", "code", "message"),
    [
        ({"hook_name": "blocks.2.attn.hook_z"}, (), 3, "reads blocks.2.attn.hook_z; give an SAE of the residual"),
        ({"hook_name": "blocks.9.hook_resid_pre"}, (), 3, "mini-sink has layers 0-3"),
        ({"hook_name": None}, (), 2, "does not say where it reads; name the hook, as --hook"),
        ({"model_name": None}, (), 2, "does not say which model it was trained on; name it with --model"),
        ({"context_size": 1024}, (), 2, "was trained on contexts of 1024 tokens, mini-sink reads at most 128"),
        ({}, ("--context", "256"), 2, "--context 256: mini-sink reads at most 128"),
        ({}, ("--hook", "blocks.1.mlp"), 2, "--hook blocks.1.mlp: expected blocks.0.hook_resid_post, for any"),
        ({}, ("--activations", "acts", "--corpus", "x"), 2, "--corpus says how to run the model on a text"),
        ({}, ("--bins", "--no-behaviour"), 2, "--bins is about the model's behaviour"),
        ({"hook_name": "blocks.1.hook_resid_post"}, ("--activations", "acts"), 3, "acts holds blocks.2"),
        ({"model_name": "gpt2"}, ("--activations", "acts"), 3, "trained on gpt2, acts is from mini-sink"),
        ({"model_name": "nobody/nothing"}, (), 4, "hub is not reachable"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(workspace, tmp_path, monkeypatch, metadata, options, code, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = nsae("--workspace", workspace, "audit", make_sae(tmp_path / "sae", PLUS_MINUS, **metadata), *options)
    assert outcome.code == code
    assert message in outcome.message
    assert not (workspace / "audits" / "sae").exists()


def test_another_width(workspace, tmp_path):
    golden = Path(__file__).parent.parent / "interop" / "golden" / "saelens6-standard"
    outcome = nsae("--workspace", workspace, "audit", golden, "--model", "mini-sink", "--hook", HOOK)
    assert outcome.code == 3
    assert "reads vectors of width 8, mini-sink has width 64" in outcome.message
    outcome = nsae("--workspace", workspace, "audit", golden, "--activations", "acts", "--hook", HOOK)
    assert outcome.code == 3
    assert "acts holds width 64" in outcome.message


def test_nan_in_someones_sae(workspace, tmp_path):
    sae = make_sae(tmp_path / "sae", torch.full((2 * D, D), torch.nan))
    outcome = nsae("--workspace", workspace, "audit", sae)
    assert outcome.code == 5
    assert "W_dec holds 8,192 values that are not finite" in outcome.message


def test_an_sae_whose_numbers_overflow_leaves_nothing_behind(workspace, tmp_path):
    sae = make_sae(tmp_path / "huge", PLUS_MINUS * 3e38, PLUS_MINUS.T * 3e38)
    outcome = nsae("--workspace", workspace, "audit", sae, *TEXT, "--no-behaviour")
    assert outcome.code == 5
    assert "huge: its reconstructions hold NaN or infinity" in outcome.message
    assert not (workspace / "audits" / "huge").exists()


# In a configuration ---------------------------------------------------------------------------------------------------


def test_stages_audit_saes_from_anywhere(workspace, tmp_path):
    make_sae(tmp_path / "sae", PLUS_MINUS)
    config = tmp_path / "config.yaml"
    config.write_text(
        "defaults: {audit: {tokens: 2560, behaviour: false}}\n"
        "stages:\n"
        "  - audit: {saes: sae, name: theirs}\n"
        "  - audit: {saes: grid, name: ours}\n"
    )
    outcome = nsae("--workspace", workspace, "run", config)
    assert outcome.code == 0, outcome.err
    made = {path.name for path in (workspace / "audits").iterdir()}
    assert {"theirs", "ours-L2-relu", "ours-L2-tanh-relu"} <= made
    assert "Audit of grid/L2-tanh-relu" in outcome.out

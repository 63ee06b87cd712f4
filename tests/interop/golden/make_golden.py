"""Makes the golden folders beside this file: SAEs saved by the peers' own packages, with what those packages compute.

    python make_golden.py                                   # sae_lens, eai-sparsify and dictionary_learning installed
    python make_golden.py --openai PATH/TO/sparse_autoencoder/model.py   # a clone of openai/sparse_autoencoder

Each folder holds the SAE as its package (or, for pickles, the documented conversion) writes it, and
`expected.safetensors` with x, acts and x_hat as the package computes them. Random weights, 8 wide, 16 features.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nsae_cli.interop.conversion import dictionary_learning_snippet, openai_snippet

HERE = Path(__file__).parent
D_IN, D_SAE, K = 8, 16, 4


def rows() -> torch.Tensor:
    """x [24, 8]: norms from 0.3 to 3000."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(24, D_IN, generator=generator)
    return x * torch.logspace(-1, 3, 24).unsqueeze(1)


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Random parameters: biases that matter, thresholds that some rows pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator) * (0.4 if parameter.ndim == 2 else 0.6)
            parameter.copy_(values.abs() if "threshold" in name else values)


def save_expected(folder: Path, acts: torch.Tensor, x_hat: torch.Tensor) -> None:
    """What the peer computed."""
    assert (acts > 0).any()
    assert (acts == 0).any()
    tensors = {"x": rows(), "acts": acts, "x_hat": x_hat}
    save_file({name: tensor.detach().float().contiguous() for name, tensor in tensors.items()},
              folder / "expected.safetensors")  # fmt: skip


def fresh(name: str) -> Path:
    """An empty folder of that name."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# SAELens --------------------------------------------------------------------------------------------------------------


def make_saelens() -> None:
    """Version 6 folders, saved by SAELens, and flat ones of earlier versions, read by it."""
    import sae_lens

    metadata = sae_lens.saes.sae.SAEMetadata(
        model_name="gpt2-small",
        hook_name="blocks.6.hook_resid_pre",
        context_size=128,
        prepend_bos=True,
        dataset_path="Skylion007/openwebtext",
        model_from_pretrained_kwargs={"center_writing_weights": False},
    )
    classes: dict[str, tuple[str, dict[str, Any]]] = {
        "standard": ("Standard", {}),
        "standard-free-input": ("Standard", {"apply_b_dec_to_input": False}),
        "standard-layer-norm": ("Standard", {"normalize_activations": "layer_norm"}),
        "standard-constant-norm": ("Standard", {"normalize_activations": "constant_norm_rescale"}),
        "topk": ("TopK", {"k": K}),
        "topk-rescaled": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": ("JumpReLU", {}),
        "gated": ("Gated", {}),
    }
    for seed, (name, (prefix, options)) in enumerate(classes.items()):
        config = getattr(sae_lens, f"{prefix}SAEConfig")(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **options)
        sae = getattr(sae_lens, f"{prefix}SAE")(config)
        randomize(sae, seed)
        folder = fresh(f"saelens6-{name}")
        sae.save_model(folder)
        save_expected(folder, sae.encode(rows()), sae(rows()))
    make_batchtopk(sae_lens, metadata)
    make_average_scale(sae_lens, metadata)
    for name, options in {
        "relu": {},
        "topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": "layer_norm"},
        "jumprelu": {"architecture": "jumprelu", "activation_fn_str": "relu", "normalize_activations": "none"},
        "old-keys": {"hook_point": "blocks.8.hook_resid_pre", "hook_point_head_index": None, "hook_name": None},
    }.items():
        make_flat(sae_lens, name, options)


def make_batchtopk(sae_lens: Any, metadata: Any) -> None:
    """Trained as batchtopk, saved by SAELens as jumprelu with one threshold."""
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, metadata=metadata)
    trained = sae_lens.BatchTopKTrainingSAE(config)
    randomize(trained, 20)
    trained.topk_threshold = torch.tensor(0.7, dtype=trained.topk_threshold.dtype)
    folder = fresh("saelens6-batchtopk")
    trained.save_inference_model(folder)
    sae = sae_lens.SAE.load_from_disk(folder)
    save_expected(folder, sae.encode(rows()), sae(rows()))


def make_average_scale(sae_lens: Any, metadata: Any) -> None:
    """A checkpoint whose activation scale is beside it, against SAELens' own folding of that scale."""
    config = sae_lens.StandardSAEConfig(
        d_in=D_IN, d_sae=D_SAE, metadata=metadata, normalize_activations="expected_average_only_in"
    )
    sae = sae_lens.StandardSAE(config)
    randomize(sae, 21)
    folder = fresh("saelens6-average-scale")
    sae.save_model(folder)
    sae_lens.training.activation_scaler.ActivationScaler(scaling_factor=0.037).save(
        str(folder / "activation_scaler.json")
    )
    sae.fold_activation_norm_scaling_factor(0.037)
    save_expected(folder, sae.encode(rows()), sae(rows()))


def make_flat(sae_lens: Any, name: str, options: dict[str, Any]) -> None:
    """cfg.json as SAELens 3 to 5 wrote it, with the weights of a version 6 SAE, and what SAELens 6 makes of it."""
    flat: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_pre",
        "hook_layer": 8,
        "hook_head_index": None,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": "3.12.1",
        "prepend_bos": True,
        "dataset_path": "Skylion007/openwebtext",
        "context_size": 128,
        "normalize_activations": "none",
        **options,
    }
    if flat["hook_name"] is None:  # the oldest have neither these nor an activation
        for key in ("hook_name", "activation_fn_str", "normalize_activations", "apply_b_dec_to_input"):
            del flat[key]
    architecture = flat.get("architecture", "topk" if flat.get("activation_fn_str") == "topk" else "standard")
    prefix = {"standard": "Standard", "topk": "TopK", "jumprelu": "JumpReLU"}[architecture]
    extra = {"k": K} if architecture == "topk" else {}
    sae = getattr(sae_lens, f"{prefix}SAE")(getattr(sae_lens, f"{prefix}SAEConfig")(d_in=D_IN, d_sae=D_SAE, **extra))
    randomize(sae, 30 + len(name))
    folder = fresh(f"saelens5-{name}")
    sae.save_model(folder)
    (folder / "cfg.json").write_text(json.dumps(flat, indent=1), encoding="utf-8")
    read = sae_lens.SAE.load_from_disk(folder)
    save_expected(folder, read.encode(rows()), read(rows()))


# sparsify -------------------------------------------------------------------------------------------------------------


def make_sparsify() -> None:
    """A topk SAE of a run on two hookpoints, with the run's config.json."""
    import sparsify
    from sparsify.__main__ import RunConfig

    config = sparsify.SparseCoderConfig(num_latents=D_SAE, k=K)
    sae = sparsify.SparseCoder(D_IN, config)
    randomize(sae, 40)
    run = fresh("sparsify")
    RunConfig(config, model="gpt2", dataset="EleutherAI/SmolLM2-135M-10B", ctx_len=512).save_json(run / "config.json")
    folder = run / "h.6"
    sae.save_to_disk(folder)
    top_acts, top_indices, _ = sae.encode(rows())
    acts = torch.zeros(len(rows()), D_SAE).scatter_(1, top_indices, top_acts)
    save_expected(folder, acts, sae.decode(top_acts, top_indices))


# dictionary_learning --------------------------------------------------------------------------------------------------


def make_dictionary_learning() -> None:
    """One per class, saved as their trainer does (ae.pt, config.json), converted with the documented command."""
    for module in ("nnsight", "zstandard"):  # imported by the package's buffers only
        if importlib.util.find_spec(module) is None:
            sys.modules[module] = types.ModuleType(module)
            sys.modules[module].LanguageModel = object  # type: ignore[attr-defined]
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    makers: dict[str, Callable[[], Any]] = {
        "AutoEncoder": lambda: dictionary.AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D_IN, D_SAE),
        "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D_IN, D_SAE),
        "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": lambda: batch_top_k.BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [6, 10]),
    }
    for seed, (name, make) in enumerate(makers.items()):
        sae = make()
        randomize(sae, 50 + seed)
        if "BatchTopK" in name:
            sae.threshold.fill_(0.7)
        folder = fresh(f"dictionary_learning-{name}")
        trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "gpt2",
                   "submodule_name": "resid_post_layer_3"} | ({"k": K} if "TopK" in name else {})  # fmt: skip
        buffer = {"d_submodule": D_IN, "io": "out", "ctx_len": 128}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}, indent=1))
        torch.save(sae.state_dict(), folder / "ae.pt")
        snippet = dictionary_learning_snippet("ae.pt", "ae.safetensors")
        subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True)
        (folder / "ae.pt").unlink()
        save_expected(folder, sae.encode(rows()), sae(rows()))


# OpenAI ---------------------------------------------------------------------------------------------------------------


def make_openai(model_file: Path) -> None:
    """Their ReLU and their TopK (layer norm) SAE, converted with the documented snippet."""
    spec = importlib.util.spec_from_file_location("openai_sparse_autoencoder", model_file)
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    saes = {
        "relu": theirs.Autoencoder(D_SAE, D_IN),
        "topk": theirs.Autoencoder(D_SAE, D_IN, activation=theirs.TopK(K), normalize=True),
    }
    for seed, (name, sae) in enumerate(saes.items()):
        randomize(sae, 60 + seed)
        folder = fresh(f"openai-{name}")
        with tempfile.TemporaryDirectory() as temporary:
            torch.save(sae.state_dict(), f"{temporary}/8.pt")
            snippet = openai_snippet(f"{temporary}/8.pt", str(folder), "resid_post_mlp", 8)
            subprocess.run([sys.executable, "-c", snippet], check=True)
        _, acts, x_hat = sae(rows())
        save_expected(folder, acts, x_hat)


def main() -> None:
    """Makes what the installed packages allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openai", type=Path, help="sparse_autoencoder/model.py of openai/sparse_autoencoder")
    openai = parser.parse_args().openai
    if openai is not None:
        make_openai(openai)
        return
    make_saelens()
    make_sparsify()
    make_dictionary_learning()


if __name__ == "__main__":
    main()

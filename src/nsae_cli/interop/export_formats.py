"""An SAE written as other packages write theirs, and what to type there to open it.

Each writer puts the files of one SAE into a folder that exists, or refuses what the package cannot compute.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nsae_cli import catalogue
from nsae_cli.errors import UsageError
from nsae_cli.interop import dictionary_learning, saelens_reader, sparsify
from nsae_cli.interop.foreign import ForeignSae
from nsae_cli.interop.normalized import RowNormalizedAutoencoder
from nsae_cli.interop.tensors import refuse_non_finite
from nsae_cli.kernels.types import Weights
from nsae_cli.lm.layers import parse_hook
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store import commit
from nsae_cli.store.sae_folder import write_sae

Target = Literal["saelens", "sparsify", "dictionary-learning", "saebench"]


@dataclass(frozen=True)
class Written:
    """What a writer has made.

    Attributes:
        folder: the SAE's own folder, in the one that was given or that itself.
        exactness: how near the package's outputs are to nsae's.
        code: Python that opens it there, with ``{path}`` for the folder.
    """

    folder: Path
    exactness: str
    code: str


_THE_SAME = "the same weights and the same formula: outputs differ by the order of float32 sums alone"
_FOLDED = (
    "the package subtracts b_dec from its input, so b_enc is b_enc + b_dec @ W_enc, added in float64 and rounded once: "
    "outputs differ by float32 rounding"
)


def write_saelens(found: ForeignSae, folder: Path) -> Written:
    """``cfg.json`` and ``sae_weights.safetensors`` of SAELens 6."""
    sae, scheme = _plain(found)
    metadata = _metadata(found)
    write_sae(folder, sae, metadata)
    if scheme is not None:
        config = commit.read_json(folder / saelens_reader.CONFIG)
        commit.write_json(folder / saelens_reader.CONFIG, {**config, "normalize_activations": scheme})
    return Written(folder, _THE_SAME, _SAELENS.format(register=_REGISTER if sae.act == "tanh-relu" else ""))


def write_saebench(found: ForeignSae, folder: Path) -> Written:
    """As `write_saelens`, with decoder rows of length 1 where that changes nothing, and what SAEBench asks for."""
    sae, scheme = _plain(found)
    hook = None if found.hook is None else parse_hook(found.hook)
    if found.model is None or hook is None:
        lacking = "its model" if found.model is None else "a hook of the residual stream"
        raise catalogue.SOURCE_UNKNOWN(
            f"{found.path.name}: SAEBench runs the SAE's model at its hook, and the SAE does not name {lacking}; "
            f"export it --to saelens and add model_name and hook_name to the metadata of cfg.json"
        )
    unit = _with_unit_rows(sae)
    whole = unit if scheme is None else RowNormalizedAutoencoder(unit, scheme)
    written = write_saelens(dataclasses.replace(found, sae=whole), folder)
    path = folder / saelens_reader.CONFIG
    config = commit.read_json(path)
    config["metadata"] |= {"hook_layer": hook[0]}
    commit.write_json(path, config)
    exactness = _THE_SAME
    if unit is not sae:
        exactness = "decoder norms are moved into the encoder: x̂ differs by float32 rounding, acts are times the norms"
    return Written(folder, exactness, written.code + _SAEBENCH)


def write_sparsify(found: ForeignSae, folder: Path) -> Written:
    """``HOOKPOINT/cfg.json`` and ``HOOKPOINT/sae.safetensors``, with the run's ``config.json`` above.

    relu is topk with k = d_sae, since sparsify takes the largest of relu(pre_acts).
    """
    sae = _refuse_rows(found, "sparsify")
    if sae.act not in ("relu", "topk"):
        why = {
            "tanh-relu": "sparsify's acts are relu(pre_acts), it has no tanh",
            "jumprelu": "sparsify's acts are the k largest, it has no thresholds",
        }[sae.act]
        raise _refuse(found, "sparsify", why)
    weights, b_enc = sae.weights, _encoder_bias_after_b_dec(sae)
    place = folder / _hookpoint(found)
    if not place.is_dir():
        commit.make_folder(place)
    _write_tensors(
        place / sparsify.WEIGHTS,
        {"encoder.weight": weights.W_enc.T, "encoder.bias": b_enc, "W_dec": weights.W_dec, "b_dec": weights.b_dec},
    )
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": False,
        "num_latents": sae.d_sae,
        "k": sae.d_sae if sae.k is None else sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    }
    commit.write_json(place / sparsify.CONFIG, {**config, "d_in": sae.d_in})
    run = {"sae": config, "model": found.model, "dataset": found.dataset, "ctx_len": found.context_size}
    commit.write_json(folder / sparsify.RUN_CONFIG, {key: value for key, value in run.items() if value is not None})
    exactness = _FOLDED
    if sae.k is None:
        exactness += "; relu is written as topk with k = d_sae, which is as slow as a dense SAE"
    return Written(place, exactness, _SPARSIFY)


def write_dictionary_learning(found: ForeignSae, folder: Path) -> Written:
    """``ae.pt`` and ``config.json``, as its trainers write them, and ``ae.safetensors`` with the same tensors.

    ``ae.pt`` holds nothing but tensors; nsae reads the safetensors file only.
    """
    sae = _refuse_rows(found, "dictionary_learning")
    weights = sae.weights
    linear = {"encoder.weight": weights.W_enc.T, "decoder.weight": weights.W_dec.T}
    exactness = _THE_SAME
    if sae.act == "relu":
        name = "AutoEncoderNew"  # the one that does not subtract b_dec from its input
        tensors = {**linear, "encoder.bias": weights.b_enc, "decoder.bias": weights.b_dec}
    elif sae.act == "topk":
        name, exactness = "AutoEncoderTopK", _FOLDED
        bias = _encoder_bias_after_b_dec(sae)
        # A threshold below 0 has not been set, as its trainer leaves it.
        numbers = {"k": torch.tensor(sae.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
        tensors = {**linear, "encoder.bias": bias, "b_dec": weights.b_dec, **numbers}
    elif sae.act == "jumprelu":
        name, tensors = "JumpReluAutoEncoder", sae.named()
    else:
        raise _refuse(found, "dictionary_learning", "its classes compute relu, topk and jumprelu, it has no tanh")
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    _write_tensors(folder / dictionary_learning.WEIGHTS, tensors)
    pickled = io.BytesIO()
    torch.save(tensors, pickled)
    commit.write_bytes(folder / dictionary_learning.PICKLE, pickled.getvalue())
    hook = None if found.hook is None else parse_hook(found.hook)
    trainer = {
        "dict_class": name,
        "trainer_class": "nsae",
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": sae.k,
        "layer": None if hook is None else hook[0],
        "lm_name": found.model,
        "submodule_name": found.hook if hook is None else f"{hook[1]}_layer_{hook[0]}",
    }
    buffer = {"d_submodule": sae.d_in, "io": "out", "ctx_len": found.context_size}
    commit.write_json(
        folder / dictionary_learning.CONFIG,
        {"trainer": _said(trainer), "buffer": _said(buffer)},
    )
    return Written(folder, exactness, _DICTIONARY_LEARNING)


WRITERS: Mapping[Target, Callable[[ForeignSae, Path], Written]] = {
    "saelens": write_saelens,
    "sparsify": write_sparsify,
    "dictionary-learning": write_dictionary_learning,
    "saebench": write_saebench,
}

_REGISTER = "import nsae_cli.interop.saelens; nsae_cli.interop.saelens.register()\n"
_SAELENS = """{register}from sae_lens import SAE
sae = SAE.load_from_disk({{path!r}})"""
_SAEBENCH = """
selected_saes = [({name!r}, sae)]  # what every run_eval of SAEBench takes"""
_SPARSIFY = """from sparsify import SparseCoder
sae = SparseCoder.load_from_disk({path!r})"""
_DICTIONARY_LEARNING = """from dictionary_learning.utils import load_dictionary
sae, config = load_dictionary({path!r}, device="cpu")"""


# What is common to them ----------------------------------------------------------------------------------------------


def _plain(found: ForeignSae) -> tuple[SparseAutoencoder, Literal["layer_norm", "constant_norm_rescale"] | None]:
    """The SAE, and what it does to a row before and after."""
    if isinstance(found.sae, RowNormalizedAutoencoder):
        return found.sae.inner, found.sae.scheme
    assert isinstance(found.sae, SparseAutoencoder)
    return found.sae, None


def _refuse_rows(found: ForeignSae, package: str) -> SparseAutoencoder:
    sae, scheme = _plain(found)
    if scheme is not None:
        raise _refuse(found, package, f"the SAE normalises each row by itself ({scheme}), which {package} does not")
    return sae


def _refuse(found: ForeignSae, package: str, why: str) -> UsageError:
    return catalogue.REFUSED_COMBINATION(
        f"{found.path.name} ({found.architecture}) cannot be expressed in {package}: {why}; choose --to saelens"
    )


def _encoder_bias_after_b_dec(sae: SparseAutoencoder) -> torch.Tensor:
    """b_enc of an SAE that encodes x − b_dec: (x − b_dec)·W_enc + b_enc + b_dec·W_enc = x·W_enc + b_enc."""
    weights = sae.weights
    return (weights.b_enc.double() + weights.b_dec.double() @ weights.W_enc.double()).float()


def _with_unit_rows(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same x̂ with rows of W_dec of length 1, for an activation that takes each feature by itself.

    relu(c·z) = c·relu(z) for c > 0, feature by feature, and a threshold grows along. topk compares features with each
    other, so that it would choose others; tanh does not grow along. Both stay as they are, and rows of zeros do.
    """
    if sae.act not in ("relu", "jumprelu"):
        return sae
    weights = sae.weights
    norms = weights.W_dec.double().norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=1e-6):
        return sae
    norms = torch.where(norms > 0, norms, 1.0)
    threshold = None if sae.threshold is None else (sae.threshold.double() * norms).float()
    moved = Weights(
        (weights.W_enc.double() * norms).float(),
        (weights.b_enc.double() * norms).float(),
        (weights.W_dec.double() / norms.unsqueeze(1)).float(),
        weights.b_dec,
    )
    return SparseAutoencoder(sae.act, moved, sae.k, threshold)


def _metadata(found: ForeignSae) -> dict[str, Any]:
    """What SAELens keeps of where an SAE comes from: as nsae has written it, else what its folder says."""
    if found.run is not None:
        config = commit.read_json(found.path / saelens_reader.CONFIG)
        metadata: dict[str, Any] = config.get("metadata") or {}
        return metadata
    centred = None if found.centred_weights is None else {"center_writing_weights": found.centred_weights}
    metadata = {
        "model_name": found.model,
        "hook_name": found.hook,
        "context_size": found.context_size,
        "dataset_path": found.dataset,
        "prepend_bos": found.prepend_bos,
        "model_from_pretrained_kwargs": centred,
    }
    return _said(metadata)


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _hookpoint(found: ForeignSae) -> str:
    """The folder that says where a sparsify SAE reads: the block whose output it is, as the model names it."""
    hook = None if found.hook is None else parse_hook(found.hook)
    if hook is None:
        raise catalogue.SOURCE_UNKNOWN(
            f"{found.path.name}: sparsify names an SAE's folder after its hookpoint, and the SAE does not say that it "
            f"reads the residual stream ({found.hook}); choose --to saelens"
        )
    block = hook[0] - (hook[1] == "resid_pre")  # what goes into a block is what the one before it returns
    if block < 0:
        raise _refuse(found, "sparsify", "it reads the embeddings, which are no module's output there")
    gpt2 = found.model is None or "gpt2" in found.model or found.model in ("mini", "mini-sink")
    return f"{'h' if gpt2 else 'layers'}.{block}"


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        refuse_non_finite(path, name, tensor)
    commit.write_tensors(path, dict(tensors))

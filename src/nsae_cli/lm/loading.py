"""A model by name: an embedded one, a folder, or a hub id. First its config, later its weights.

Only safetensors weights are read and no code from a repository is run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from nsae_cli import assets, catalogue
from nsae_cli.lm.families import Family, family_of
from nsae_cli.lm.hub import ask_hub, looks_like_hub_id
from nsae_cli.lm.layers import SITES, Site
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.store.commit import file_sha256

DTypeName = Literal["fp16", "bf16", "fp32"]

#: Short names, as on the command line and in messages.
DTYPE_NAMES: dict[DTypeName, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_SAVE_AGAIN = "save the model again with save_pretrained(DIR)"
_OFFLINE_REMEDY = "use --model mini, which needs no network, or give the path of a folder"


@dataclass(frozen=True)
class ModelInfo:
    """A model known by its config; its weights are not loaded yet.

    Attributes:
        name: as artifacts record it: an embedded name, a hub id, or a folder's base name (never its path).
        source: what Hugging Face's loaders are given: a path or a hub id.
        revision: the commit of a hub model; None for embedded and local ones.
        model_sha256: SHA-256 over the weight files of a local or embedded model; None for hub ones.
        cached_only: the hub does not answer, only its local cache is asked.
        sites: those that the model has.
        text_start: the configuration's beginning-of-text token, else its end-of-text token; for where no tokenizer is.
    """

    name: str
    source: str
    revision: str | None
    model_type: str
    n_layers: int
    d_model: int
    max_context: int
    vocab_size: int
    model_sha256: str | None = None
    cached_only: bool = False
    sites: tuple[Site, ...] = SITES
    text_start: int | None = None

    @property
    def embedded(self) -> bool:
        """Whether the model ships with nsae."""
        return self.name in assets.EMBEDDED_MODELS and Path(self.source) == assets.model_dir(self.name)

    @property
    def family(self) -> Family:
        """Where this model keeps its parts."""
        return family_of(self.model_type, self.name)


def inspect_model(name: str, revision: str | None = None) -> ModelInfo:
    """Reads a model's config, so that mistakes show before any weights load.

    Args:
        name: ``mini``, ``mini-sink``, a folder, or a hub id.
        revision: branch, tag or commit of a hub model.

    Raises:
        UsageError: unsupported family; ``--revision`` with a model that has none.
        ArtifactError: no readable config, or weights that are not safetensors.
        ResourceError: no such model, or neither hub nor cache has it.
    """
    local = name in assets.EMBEDDED_MODELS or Path(name).is_dir()
    if local and revision is not None:
        raise catalogue.OPTION_WITHOUT_EFFECT(
            f"--revision {revision}: {name} is no hub model and has no revisions; leave it out"
        )
    return _inspect_folder(name) if local else _inspect_hub_model(name, revision)


def _inspect_folder(name: str) -> ModelInfo:
    folder = assets.model_dir(name) if name in assets.EMBEDDED_MODELS else Path(name)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise catalogue.MODEL_INCOMPLETE(
            f"--model {name}: no config.json there; give a folder in the Hugging Face layout"
        )
    weights = sorted(folder.glob("*.safetensors"))
    _require_safetensors(name, [path.name for path in folder.iterdir()])
    digest = hashlib.sha256("".join(file_sha256(path) for path in weights).encode()).hexdigest()
    return _model_info(
        name=name if name in assets.EMBEDDED_MODELS else folder.resolve().name,
        source=str(folder),
        revision=None,
        config_path=config_path,
        model_sha256=digest if len(weights) > 1 else file_sha256(weights[0]),
    )


def _inspect_hub_model(name: str, revision: str | None) -> ModelInfo:
    if not looks_like_hub_id(name):
        raise catalogue.HUB_NOT_FOUND(f"--model {name}: no such folder, and not a hub id; {_OFFLINE_REMEDY}")
    with quiet_libraries():
        found = ask_hub("model", name, revision, _OFFLINE_REMEDY)
        if found.files is not None:
            _require_safetensors(name, found.files)
        try:
            config_path = hf_hub_download(
                name, "config.json", revision=found.commit or revision, local_files_only=not found.reachable
            )
        except EntryNotFoundError as error:
            if found.reachable:
                raise catalogue.MODEL_INCOMPLETE(
                    f"--model {name}: the repository has no config.json; it is not a model, check the id"
                ) from error
            raise catalogue.HUB_UNREACHABLE(
                f"--model {name}: the Hugging Face hub is not reachable and the model is not in the local cache; "
                f"{_OFFLINE_REMEDY}"
            ) from error
        except (HTTPError, OSError) as error:
            raise catalogue.DOWNLOAD_FAILED(
                f"--model {name}: the download failed; try again, or {_OFFLINE_REMEDY}"
            ) from error
    # A cached file lies in snapshots/<commit>/: that is the resolved revision, with or without a network.
    commit = Path(config_path).parent.name
    return _model_info(name, name, commit, Path(config_path), cached_only=not found.reachable)


def _require_safetensors(name: str, files: tuple[str, ...] | list[str]) -> None:
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise catalogue.PICKLE(
            f"--model {name}: its weights are only there as pickle ({pickles[0]}), which can run code when read; "
            f"convert them where they are trusted: AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR)"
        )
    raise catalogue.MODEL_INCOMPLETE(f"--model {name}: no weights (*.safetensors) are there; {_SAVE_AGAIN}")


def _model_info(
    name: str,
    source: str,
    revision: str | None,
    config_path: Path,
    *,
    model_sha256: str | None = None,
    cached_only: bool = False,
) -> ModelInfo:
    from transformers import AutoConfig

    raw = _read_config(config_path, name)
    model_type = raw.get("model_type")
    family = family_of(model_type, name, raw)
    try:
        # The family's configuration class fills in what an old config.json leaves out.
        config = AutoConfig.for_model(**raw)
        sizes = {key: int(getattr(config, key)) for key in (family.n_layers, family.d_model, family.max_context)}
        return ModelInfo(
            name=name,
            source=source,
            revision=revision,
            model_type=str(model_type),
            n_layers=sizes[family.n_layers],
            d_model=sizes[family.d_model],
            max_context=sizes[family.max_context],
            vocab_size=int(config.vocab_size),
            model_sha256=model_sha256,
            cached_only=cached_only,
            sites=family.sites(config),
            text_start=_text_start(config),
        )
    except (TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise catalogue.MODEL_CONFIG(
            f"--model {name}: config.json is not usable ({_first_line(error)}); {_SAVE_AGAIN}"
        ) from error


def _text_start(config: Any) -> int | None:
    tokens = (getattr(config, key, None) for key in ("bos_token_id", "eos_token_id"))
    # A list of end-of-text tokens is for generating; its first is the one that ends documents.
    firsts = (token[0] if isinstance(token, list) and token else token for token in tokens)
    return next((token for token in firsts if isinstance(token, int)), None)


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise catalogue.MODEL_CONFIG(
            f"--model {name}: config.json is not readable JSON ({_first_line(error)}); {_SAVE_AGAIN}"
        ) from error
    if not isinstance(raw, dict):
        raise catalogue.MODEL_CONFIG(f"--model {name}: config.json is not a JSON object; {_SAVE_AGAIN}")
    return raw


def load_model(info: ModelInfo, device: torch.device, dtype: torch.dtype, *, with_head: bool = False) -> nn.Module:
    """Loads the weights, for evaluation, with the family's implementation of attention.

    Args:
        info: from `inspect_model`.
        device: where to.
        dtype: of weights and computation.
        with_head: the causal language model with its logits instead of the base transformer.

    Raises:
        ArtifactError: weights damaged, missing or of another shape than the config says.
        ResourceError: download failed, or the device's memory is too small.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    loader = AutoModelForCausalLM if with_head else AutoModel
    what = f"--model {info.name}"
    with quiet_libraries():
        try:
            loaded: Any = loader.from_pretrained(
                info.source,
                revision=info.revision,
                local_files_only=info.cached_only,
                dtype=dtype,
                attn_implementation=info.family.attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model, report = loaded
            model = model.to(device)
        except SafetensorError as error:
            raise catalogue.MODEL_WEIGHTS(
                f"{what}: the weights are damaged ({_first_line(error)}); get them again"
            ) from error
        except torch.OutOfMemoryError as error:
            raise catalogue.OUT_OF_MEMORY(f"{what} does not fit the memory of {device}; use --device cpu") from error
        except (OSError, HTTPError) as error:
            raise catalogue.DOWNLOAD_FAILED(
                f"{what}: loading failed ({_first_line(error)}); {_OFFLINE_REMEDY}"
            ) from error
        except RuntimeError as error:
            raise catalogue.MODEL_WEIGHTS(
                f"{what}: the weights do not fit config.json ({_first_line(error)}); {_SAVE_AGAIN}"
            ) from error
    # Missing weights would be drawn at random, silently.
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise catalogue.MODEL_WEIGHTS(
            f"{what}: {len(missing)} weights are missing, the first is {missing[0]}; {_SAVE_AGAIN}"
        )
    return model.eval()


def choose_model_dtype(option: Literal["auto"] | DTypeName, device: torch.device) -> DTypeName:
    """``auto``: bf16 on CUDA, fp32 elsewhere."""
    if option != "auto":
        return option
    return "bf16" if device.type == "cuda" else "fp32"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

"""Where an SAE is audited: its hook, its model, and the text or the store that its rows come from, all checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nsae_cli import catalogue
from nsae_cli.analysis.audit_options import AuditOptions
from nsae_cli.device import choose_device
from nsae_cli.errors import NsaeError
from nsae_cli.interop.foreign import ForeignSae, hub_model
from nsae_cli.lm.config import DEFAULT_CONTEXT, CollectConfig, resolve
from nsae_cli.lm.corpus import open_corpus
from nsae_cli.lm.layers import SITES, hook_name, parse_hook
from nsae_cli.lm.loading import DTypeName, ModelInfo, choose_model_dtype, inspect_model
from nsae_cli.lm.packing import Layout
from nsae_cli.lm.splice import require_hook
from nsae_cli.lm.texts import Text, corpus_text, held_out_text
from nsae_cli.lm.tokenizing import load_tokenizer_for
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.manifest import describe_alterations
from nsae_cli.store.shards import ActivationStore
from nsae_cli.values import validate_options

#: What identifies the text; of `lm.config.ResolvedConfig`.
_IDENTITY = (
    "model", "revision", "model_sha256", "corpus", "corpus_config", "split", "corpus_revision", "corpus_sha256",
    "text_column", "context", "bos", "model_dtype",
)  # fmt: skip
#: Options that collect has too.
_OF_THE_TEXT = (
    "revision", "corpus", "corpus_config", "split", "text_column", "chat_column", "tokens_column", "tokens",
    "model_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Where an SAE is audited.

    Attributes:
        hook: where it reads.
        model: the model's name; None for a store that does not know.
        info: the model; None where it is not run.
        text: what it is run on; of a store, its held-out contexts. None where it is not run.
        special_token_ids: tokens that are special.
        context_size, bos: of the rows; None where not known.
        source: ``corpus`` or ``store``.
        held_out: whether the rows are only such as nsae did not train this SAE on.
        identity: what determines the text, by name and hash.
        warnings: what a reader of the numbers must know.
    """

    hook: str
    model: str | None
    info: ModelInfo | None
    text: Text | None
    special_token_ids: list[int]
    context_size: int | None
    bos: bool | None
    source: Literal["corpus", "store"]
    held_out: bool
    model_dtype: Literal["auto"] | DTypeName
    identity: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def dtype(self, device: torch.device) -> DTypeName:
        """What the model computes in."""
        return choose_model_dtype(self.model_dtype, device)

    def describe(self) -> dict[str, Any]:
        """`rows` of audit.json."""
        keys = ("corpus", "corpus_config", "split", "revision")
        return {
            "source": self.source,
            "held_out": self.held_out,
            "context_size": self.context_size,
            "bos": self.bos,
            **{key: self.identity.get(key) for key in keys},
        }


def find_setting(found: ForeignSae, options: AuditOptions, store: ActivationStore | None) -> Setting:
    """Finds out where to audit an SAE, before anything large is loaded.

    Raises:
        UsageError: the SAE does not say what is needed, or an option does not fit.
        ArtifactError: SAE, model and store do not fit each other, or nsae cannot read the hook.
        ResourceError: model, corpus or hub not available.
    """
    hook = _hook(found, options)
    return _in_text(found, options, hook) if store is None else _in_store(found, options, hook, store)


def _hook(found: ForeignSae, options: AuditOptions) -> str:
    hook = options.hook or found.hook
    example, sites = hook_name(0, "resid_post"), ", ".join(SITES)
    if hook is None:
        raise catalogue.SOURCE_UNKNOWN(
            f"{found.path.name} does not say where it reads; name the hook, as --hook {example}"
        )
    if parse_hook(hook) is not None:
        return hook
    if options.hook is not None:
        raise catalogue.OPTION_VALUE(f"--hook {hook}: expected {example}, for any layer and any of {sites}")
    raise catalogue.HOOK_UNSUPPORTED(
        f"{found.path.name} reads {hook}; give an SAE of the residual stream or of what a block adds to it ({example}, "
        f"for any layer and any of {sites})"
    )


# On a text -----------------------------------------------------------------------------------------------------------


def _in_text(found: ForeignSae, options: AuditOptions, hook: str) -> Setting:
    name = options.model or found.model
    if name is None:
        raise catalogue.SOURCE_UNKNOWN(
            f"{found.path.name} does not say which model it was trained on; name it with --model"
        )
    info = inspect_model(name, options.revision)
    _require_fit(found, info, hook)
    context = options.context or _own_context(found, info)
    bos = options.bos if options.bos is not None else found.prepend_bos if found.prepend_bos is not None else True
    layer, site = parse_hook(hook) or (0, "resid_post")
    given = {
        **{key: getattr(options, key) for key in _OF_THE_TEXT},
        "model": name,
        "layers": str(layer),
        "site": site,
        "context": context,
        "bos": bos,
    }
    config = validate_options(CollectConfig, {key: value for key, value in given.items() if value is not None})
    corpus = open_corpus(config.corpus_choice(info.embedded))
    device, _ = choose_device(options.device)
    resolved = resolve(config, info, corpus, device)
    tokenizer = load_tokenizer_for(corpus.content, info, SilentReporter())
    # Text that nsae trained it on is passed over; what others trained theirs on is not known.
    held_out = found.run is not None and corpus.name == found.dataset and context == found.context_size
    layout = Layout(context, True, bos, tokenizer.separator, None if held_out else resolved.row_limit)
    text = corpus_text(corpus, tokenizer, layout, held_out=held_out, tokens=resolved.row_limit)
    warnings = [*_changed(found, context, bos), *_other_model(found, options)]
    return Setting(
        hook=hook,
        model=info.name,
        info=info,
        text=text,
        special_token_ids=tokenizer.special_token_ids,
        context_size=context,
        bos=bos,
        source="corpus",
        held_out=held_out,
        model_dtype=resolved.model_dtype,
        identity={key: getattr(resolved, key) for key in _IDENTITY} | corpus.other_column,
        warnings=warnings,
    )


def _require_fit(found: ForeignSae, info: ModelInfo, hook: str) -> None:
    require_hook(hook, info.n_layers, info.name, info.sites)
    if found.sae.d_in != info.d_model:
        raise catalogue.WIDTH_MISMATCH(
            f"{found.path.name} reads vectors of width {found.sae.d_in}, {info.name} has width {info.d_model}; "
            f"name the model that it was trained on with --model"
        )


def _own_context(found: ForeignSae, info: ModelInfo) -> int:
    if found.context_size is None:
        return min(DEFAULT_CONTEXT, info.max_context)
    if found.context_size > info.max_context:
        raise catalogue.CONTEXT_TOO_LONG(
            f"{found.path.name} was trained on contexts of {found.context_size} tokens, {info.name} reads at most "
            f"{info.max_context}; give --context, or the right --model"
        )
    return found.context_size


def _changed(found: ForeignSae, context: int | None, bos: bool | None) -> list[str]:
    """Where the rows are cut otherwise than those it was trained on."""
    changes = []
    if found.context_size is not None and context is not None and context != found.context_size:
        changes.append(
            f"measured on contexts of {context} tokens, it was trained on {found.context_size}: position 0 is 1 row in "
            f"{context} here, and positions beyond its own are new to it"
        )
    if found.context_size is None:
        changes.append(f"it does not say on which context length it was trained; {context} is used here")
    if found.prepend_bos is not None and bos is not None and bos != found.prepend_bos:
        own, here = ("with", "without") if found.prepend_bos else ("without", "with")
        changes.append(f"it was trained {own} the BOS token at the start of each context and is measured {here}")
    return changes


def _other_model(found: ForeignSae, options: AuditOptions) -> list[str]:
    if options.model is None or found.model is None or hub_model(options.model) == found.model:
        return []
    return [f"it was trained on {found.model} and is measured on {options.model}"]


# In a store ----------------------------------------------------------------------------------------------------------


def _in_store(found: ForeignSae, options: AuditOptions, hook: str, store: ActivationStore) -> Setting:
    manifest = store.manifest
    if hook not in manifest.hooks:
        raise catalogue.HOOK_MISMATCH(
            f"{found.path.name} reads {hook}, {store.name} holds {', '.join(manifest.hooks)}; give activations of that "
            f"hook, or leave --activations out"
        )
    if found.sae.d_in != manifest.d_in:
        raise catalogue.WIDTH_MISMATCH(
            f"{found.path.name} reads vectors of width {found.sae.d_in}, {store.name} holds width {manifest.d_in}; "
            f"give activations of the same model, or leave --activations out"
        )
    own, theirs = found.model, hub_model(manifest.model)
    if options.model is None and own is not None and theirs is not None and own != theirs:
        raise catalogue.MODEL_MISMATCH(
            f"{found.path.name} was trained on {own}, {store.name} is from {theirs}; if it fits all the same, say so "
            f"with --model {theirs}"
        )
    warnings = _changed(found, manifest.context_size, manifest.bos)
    info, text = _model_of_store(options, store, warnings) if options.behaviour else (None, None)
    dtype = None if info is None else choose_model_dtype(options.model_dtype, choose_device(options.device)[0])
    return Setting(
        hook=hook,
        model=manifest.model,
        info=info,
        text=text,
        special_token_ids=manifest.special_token_ids or [],
        context_size=manifest.context_size,
        bos=manifest.bos,
        source="store",
        held_out=found.run is not None,
        model_dtype=options.model_dtype,
        identity={"model": manifest.model, "model_dtype": dtype},
        warnings=warnings,
    )


def _model_of_store(
    options: AuditOptions, store: ActivationStore, warnings: list[str]
) -> tuple[ModelInfo | None, Text | None]:
    """The model behind a store and the contexts to splice on; (None, None) with a warning where that cannot be."""
    if (altered := describe_alterations(store.manifest)) is not None:
        warnings.append(f"{store.name}: its {altered}, so the model does not make them and ΔCE is not measured")
        return None, None
    name = options.model or store.manifest.model
    if name is None or not (store.has_tokens and store.has_positions):
        lacks = "which model it is from" if name is None else "its tokens and positions"
        warnings.append(f"{store.name} does not hold {lacks}, so ΔCE is not measured")
        return None, None
    try:
        info = inspect_model(name, options.revision or (None if options.model else store.manifest.revision))
        text = held_out_text(store, options.row_limit)
        _require_readable(info, text, store.name)
        return info, text
    except NsaeError as error:
        error.reword(lambda message: f"{message} (or leave ΔCE out with --no-behaviour)")
        raise


def _require_readable(info: ModelInfo, text: Text, name: str) -> None:
    if text.longest > info.max_context:
        raise catalogue.CONTEXT_TOO_LONG(
            f"{name} has contexts of {text.longest} tokens, {info.name} reads at most {info.max_context}; give the "
            f"right --model"
        )
    largest = max(int(context.max()) for context in text.contexts)
    if largest >= info.vocab_size:
        raise catalogue.TOKENS_OF_ANOTHER_MODEL(
            f"{name} holds token {largest}, {info.name} has 0-{info.vocab_size - 1}; it was tokenized for "
            f"another model, give that one with --model"
        )

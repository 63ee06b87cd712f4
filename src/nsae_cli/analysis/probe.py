"""`nsae norms --probe`: runs the store's model again to find out what carries its sinks."""

from __future__ import annotations

from typing import Any

import torch

from nsae_cli import catalogue
from nsae_cli.device import DeviceOption, choose_device
from nsae_cli.lm.families import require_position_embedding
from nsae_cli.lm.layers import parse_hook
from nsae_cli.lm.loading import DTYPE_NAMES, choose_model_dtype, inspect_model, load_model
from nsae_cli.lm.probe import ProbeSubject, probe_sinks
from nsae_cli.lm.tokenizing import load_tokenizer
from nsae_cli.reporter import Reporter
from nsae_cli.store.shards import ActivationStore

#: Contexts that are run again, under each change.
PROBE_CONTEXTS = 128


def probe_store(
    store: ActivationStore, model: str | None, device_option: DeviceOption, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """The probe's result by hook, for all hooks of the store that have norms.

    Args:
        model: where the model is; None for the name that the manifest records.

    Raises:
        UsageError: the store records no model, tokens or positions, or the model has no position embedding.
        ArtifactError: the model is not the one that the store was collected from.
        ResourceError: the model cannot be had.
    """
    manifest = store.manifest
    if not (store.has_tokens and store.has_positions and manifest.context_size):
        raise catalogue.TEXT_NOT_IN_STORE(
            f"--probe: {store.name} has no tokens and positions to run again; collect it with nsae"
        )
    source = model or manifest.model
    if source is None:
        raise catalogue.SOURCE_UNKNOWN(f"--probe: {store.name} does not say which model it is from; give --model")
    info = inspect_model(source, manifest.revision if model is None else None)
    if manifest.model_sha256 is not None and info.model_sha256 != manifest.model_sha256:
        raise catalogue.MODEL_MISMATCH(
            f"--probe: {source} is not the model that {store.name} was collected from; give --model"
        )
    require_position_embedding(info.family, info.name)
    hooks = manifest.norm_hooks or manifest.hooks
    places = [place for hook in hooks if (place := parse_hook(hook)) is not None]
    if not places:
        raise catalogue.TEXT_NOT_IN_STORE(f"--probe: {store.name} has no hook of nsae's ({hooks[0]}); leave it out")
    device, why = choose_device(device_option)
    reporter.note(f"probing the sinks of {info.name} on {PROBE_CONTEXTS} contexts; device {why}")
    tokenizer = load_tokenizer(info)
    ordinary = torch.tensor(sorted(set(range(info.vocab_size)) - set(tokenizer.special_token_ids)))
    subject = ProbeSubject(
        load_model(info, device, DTYPE_NAMES[choose_model_dtype("auto", device)]),
        info.family,
        tokenizer.separator,
        ordinary,
    )
    return probe_sinks(subject, first_contexts(store, PROBE_CONTEXTS), [layer for layer, _ in places], places[0][1])


def first_contexts(store: ActivationStore, most: int) -> torch.Tensor:
    """Token ids of the store's first whole contexts, int64 [contexts, context_size].

    Raises:
        UsageError: there is no whole context.
    """
    size = store.manifest.context_size or 0
    whole = torch.arange(size)
    found: list[torch.Tensor] = []
    for shard in range(len(store.manifest.shards)):
        tokens, positions = store.tokens(shard), store.positions(shard)
        if tokens is None or positions is None:
            break
        for start in (positions == 0).nonzero().squeeze(1).tolist():
            if torch.equal(positions[start : start + size], whole):
                found.append(tokens[start : start + size])
            if len(found) == most:
                return torch.stack(found)
    if not found:
        raise catalogue.NO_ROWS(f"--probe: {store.name} holds no whole context of {size} tokens; collect more tokens")
    return torch.stack(found)

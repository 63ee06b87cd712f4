"""What a reader makes of somebody's SAE."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsae_cli.sae.autoencoder import Autoencoder


@dataclass(frozen=True)
class ForeignSae:
    """An SAE as nsae computes it, in units of the raw activations, and what its folder says of it.

    Attributes:
        sae: computes acts and x̂.
        format: whose layout the folder has: ``SAELens``, ``SAELens < 6``, ``sparsify``, ``dictionary_learning``,
            ``OpenAI`` or ``nsae``.
        architecture: as the folder names it.
        path: the folder.
        weights_file: the file that the weights were read from.
        hook: where in the model it reads, as TransformerLens names it or as the folder says; None where not said.
        model: name of the language model on the hub; None where not said.
        context_size: tokens per context while it was trained.
        prepend_bos: whether each context started with a beginning-of-text token.
        dataset: the text that it was trained on.
        centred_weights: whether it was trained on activations whose mean over d_in had been taken out of the model's
            weights (TransformerLens' ``center_writing_weights``); None where it is not known.
        notes: what the reader did to express it, for people.
        run: run.json of an SAE that `nsae train` made.
    """

    sae: Autoencoder
    format: str
    architecture: str
    path: Path
    weights_file: Path
    hook: str | None = None
    model: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    dataset: str | None = None
    centred_weights: bool | None = None
    notes: tuple[str, ...] = ()
    run: dict[str, Any] | None = field(default=None, repr=False)


#: TransformerLens' short names of models whose hub id differs.
_HUB_IDS = {"gpt2-small": "gpt2", "openai-community/gpt2": "gpt2"}


def hub_model(name: Any) -> str | None:
    """The hub id of a model that a folder names; None where it names none."""
    return _HUB_IDS.get(name, name) if isinstance(name, str) and name else None


def whole_number(value: Any) -> int | None:
    """A positive whole number, else None: what a folder says of the context may be missing or nonsense."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def truth(value: Any) -> bool | None:
    """True or False, else None."""
    return value if isinstance(value, bool) else None


def text(value: Any) -> str | None:
    """Text that is not empty, else None."""
    return value if isinstance(value, str) and value else None

"""Where rows come from, as an SAE that was trained on them records it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """Model and text behind rows; None where it is not known.

    Attributes:
        model: an embedded name, a hub id or a folder's base name.
        corpus: the corpus's name.
        context_size: most tokens in a context.
        packing: documents share contexts.
        bos: each context starts with the tokenizer's beginning-of-text token.
    """

    model: str | None
    corpus: str | None
    context_size: int | None
    packing: bool | None
    bos: bool | None

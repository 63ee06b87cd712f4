"""Contexts to run a model on: those that a store was collected from, or a corpus cut in the same way.

Token ids take 4 bytes each and are held in memory; everything that is made of them is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsae_cli import catalogue, interrupt
from nsae_cli.lm.corpus import Corpus
from nsae_cli.lm.packing import Layout, Packer
from nsae_cli.lm.records import Document, TokenIds
from nsae_cli.lm.tokenizing import DocumentTokenizer
from nsae_cli.store.contexts import HELD_OUT_EVERY, Contexts
from nsae_cli.store.shards import ActivationStore

_STOPPED = "stopped while reading the text; run the same command again"


@dataclass(frozen=True)
class ContextBatch:
    """Some contexts for one forward pass, the shorter ones padded at the end.

    Attributes:
        first: index of the first of them in the text.
        token_ids: int64 [batch, longest]; pads are 0.
        lengths: tokens of each.
    """

    first: int
    token_ids: Tensor
    lengths: list[int]

    @property
    def place(self) -> slice:
        """Which of the text's contexts they are."""
        return slice(self.first, self.first + len(self.lengths))

    @property
    def mask(self) -> Tensor:
        """Tokens that are no pads, bool [batch, longest]."""
        return torch.arange(self.token_ids.shape[1]) < torch.tensor(self.lengths).unsqueeze(1)


@dataclass(frozen=True)
class Text:
    """Contexts in the order of their numbers.

    Attributes:
        contexts: token ids of each.
        numbers: of the contexts, in the store or corpus that they are from.
    """

    contexts: Sequence[TokenIds]
    numbers: Sequence[int]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.contexts))

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return max(map(len, self.contexts))

    def batches(self, size: int) -> list[ContextBatch]:
        """All contexts, at most `size` at a time."""
        return [self._batch(first, self.contexts[first : first + size]) for first in range(0, len(self.contexts), size)]

    @staticmethod
    def _batch(first: int, contexts: Sequence[TokenIds]) -> ContextBatch:
        lengths = [len(context) for context in contexts]
        padded = np.zeros((len(contexts), max(lengths)), dtype=np.int64)
        for row, context in zip(padded, contexts, strict=True):
            row[: len(context)] = context
        return ContextBatch(first, torch.from_numpy(padded), lengths)


def held_out_text(store: ActivationStore, tokens: int | None) -> Text:
    """A store's held-out contexts, from the tokens that it holds.

    Args:
        store: the activations.
        tokens: most tokens to take, in whole contexts; None for all.

    Raises:
        UsageError: no tokens or positions, no held-out context, or fewer tokens asked for than a context has.
        ArtifactError: a held-out context does not begin at position 0.
        Interrupted: a signal asked to stop.
    """
    if not (store.has_tokens and store.has_positions):
        raise catalogue.TEXT_NOT_IN_STORE(
            f"{store.name} holds no tokens and positions, so its text cannot be run again; name a text with --corpus"
        )
    found = _held_out_of_store(store)
    text = _take(found, tokens, store.name)
    if not text.contexts:
        raise catalogue.NOTHING_HELD_OUT(
            f"{store.name} has fewer than {HELD_OUT_EVERY} contexts, so none is held out; name a text with --corpus"
        )
    return text


def corpus_text(
    corpus: Corpus, tokenizer: DocumentTokenizer, layout: Layout, *, held_out: bool, tokens: int | None
) -> Text:
    """A corpus's contexts.

    Args:
        corpus: the documents.
        tokenizer: of the model.
        layout: how documents become contexts.
        held_out: only those that no SAE trained on this corpus, cut the same way, has seen.
        tokens: most tokens to take, in whole contexts; None for all.

    Raises:
        UsageError: the corpus makes no (held-out) context, or fewer tokens are asked for than a context has.
        Interrupted: a signal asked to stop.
    """
    packer = Packer(layout)
    numbered: Iterator[tuple[int, TokenIds]] = (
        (number, context.tokens)
        for number, context in enumerate(packer.contexts(tokenizer.encode_batches(_until_stopped(corpus.documents()))))
    )
    if held_out:
        numbered = itertools.islice(numbered, HELD_OUT_EVERY - 1, None, HELD_OUT_EVERY)
    text = _take(numbered, tokens, f"corpus {corpus.name}")
    if not text.contexts:
        lack = f"has fewer than {HELD_OUT_EVERY} contexts" if held_out else "does not fill a context"
        raise catalogue.CORPUS_TOO_SHORT(
            f"corpus {corpus.name} {lack} of {layout.context} tokens; give a smaller --context, another --corpus"
        )
    return text


def _held_out_of_store(store: ActivationStore) -> Iterator[tuple[int, TokenIds]]:
    """Number and tokens of each held-out context; one may lie in several shards."""
    contexts = Contexts(store)
    number, parts, length = -1, list[np.ndarray[Any, Any]](), 0
    for shard in range(len(store.manifest.shards)):
        interrupt.stop_if_requested(_STOPPED)
        held_out = contexts.held_out(shard)
        if not bool(held_out.any()):
            continue
        tokens, positions = store.tokens(shard), store.positions(shard)
        assert tokens is not None
        assert positions is not None
        ids = contexts.ids(shard)[held_out]
        tokens, positions = tokens[held_out].int(), positions[held_out]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), (ids.diff() != 0).nonzero().squeeze(1) + 1])
        for part in torch.arange(len(ids)).tensor_split(starts[1:]):
            if int(ids[part[0]]) != number:
                if parts:
                    yield number, np.concatenate(parts)
                number, parts, length = int(ids[part[0]]), [], 0
            if int(positions[part[0]]) != length:
                raise catalogue.TEXT_CUT(
                    f"{store.name}: context {number} begins at position {int(positions[part[0]])}, not 0, so its text "
                    f"cannot be run again; name a text with --corpus"
                )
            parts.append(tokens[part].numpy())
            length += len(part)
    if parts:
        yield number, np.concatenate(parts)


def _take(numbered: Iterable[tuple[int, TokenIds]], tokens: int | None, name: str) -> Text:
    contexts: list[TokenIds] = []
    numbers: list[int] = []
    left = tokens
    for number, context in numbered:
        if left is not None:
            if len(context) > left:
                if not contexts:
                    raise catalogue.OPTION_DOES_NOT_FIT(
                        f"--tokens {tokens}: expected at least {len(context)}, the first context of {name}"
                    )
                break
            left -= len(context)
        contexts.append(context)
        numbers.append(number)
    return Text(contexts, numbers)


def _until_stopped(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        interrupt.stop_if_requested(_STOPPED)
        yield document

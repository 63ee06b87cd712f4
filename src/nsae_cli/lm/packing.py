"""Documents → contexts. Every token is used once, or counted as dropped.

The stream is, for each document, the separator ``<|endoftext|>`` and then its tokens. With packing it is cut into
pieces of `context` tokens; with ``--bos`` into pieces of `context` - 1, each with one more separator put first. Without
packing each document is cut on its own, without the stream's separators, and its last context may be shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nsae_cli.lm.tokenizing import TokenIds

#: Tokens of one document that are cut into contexts at a time: cutting copies them, with the number of their document.
_PART_TOKENS = 2**20


@dataclass(frozen=True)
class Context:
    """One sequence for the model; a row's position is its index here.

    Attributes:
        tokens: int32 [n], n ≤ the context size.
        documents: for each token the number of its document in the corpus, int32 [n]. A separator put first belongs to
            the document of the token after it.
    """

    tokens: TokenIds
    documents: TokenIds

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Layout:
    """How documents become contexts.

    Attributes:
        context: largest number of tokens in a context, at least 2.
        packing: documents share contexts.
        bos: each context starts with the separator.
        separator: id of ``<|endoftext|>``.
        tokens: most rows to make; None for the whole corpus.
    """

    context: int
    packing: bool
    bos: bool
    separator: int
    tokens: int | None


@dataclass
class Packer:
    """Cuts documents into contexts and counts what did not fit.

    Attributes:
        dropped_tokens: with packing, tokens of the stream that fill no whole context at the corpus's end.
        dropped_documents: documents that were read and have no row at all.

    Text beyond `Layout.tokens` is not reached and not counted. Both counts are complete once `contexts` is exhausted.
    """

    layout: Layout
    dropped_tokens: int = field(init=False, default=0)
    dropped_documents: int = field(init=False, default=0)

    def contexts(self, batches: Iterable[list[TokenIds]]) -> Iterator[Context]:
        """Contexts in corpus order.

        Args:
            batches: token ids of the documents, in corpus order, some documents at a time. Where the batches end makes
                no difference.
        """
        return self._packed(batches) if self.layout.packing else self._one_by_one(batches)

    def _packed(self, batches: Iterable[list[TokenIds]]) -> Iterator[Context]:
        layout = self.layout
        piece = layout.context - layout.bos
        left = np.inf if layout.tokens is None else layout.tokens // layout.context
        separator = np.array([layout.separator], np.int32)
        tokens = documents = np.empty(0, np.int32)
        number, last_kept = 0, -1
        for part in _bounded(batches):
            stream = [ids if goes_on else np.concatenate([separator, ids]) for ids, goes_on in part]
            owners = []
            for ids, (_, goes_on) in zip(stream, part, strict=True):
                number += not goes_on
                owners.append(np.full(len(ids), number - 1, np.int32))
            tokens, documents = np.concatenate([tokens, *stream]), np.concatenate([documents, *owners])
            start = 0
            while left > 0 and len(tokens) - start >= piece:
                cut = slice(start, start + piece)
                last_kept = int(documents[cut][-1])
                yield self._context(tokens[cut], documents[cut])
                start += piece
                left -= 1
            if left == 0:
                return
            tokens, documents = tokens[start:], documents[start:]
        self.dropped_tokens = len(tokens)
        self.dropped_documents = number - 1 - last_kept

    def _one_by_one(self, batches: Iterable[list[TokenIds]]) -> Iterator[Context]:
        layout = self.layout
        piece = layout.context - layout.bos
        left = np.inf if layout.tokens is None else layout.tokens
        for number, ids in enumerate(ids for batch in batches for ids in batch):
            self.dropped_documents += len(ids) == 0
            for start in range(0, len(ids), piece):
                cut = ids[start : start + piece]
                context = self._context(cut, np.full(len(cut), number, np.int32))
                left -= len(context)
                if left < 0:
                    return
                yield context

    def _context(self, tokens: TokenIds, documents: TokenIds) -> Context:
        if not self.layout.bos:
            return Context(tokens, documents)
        return Context(np.insert(tokens, 0, self.layout.separator), np.insert(documents, 0, documents[0]))


def _bounded(batches: Iterable[list[TokenIds]]) -> Iterator[list[tuple[TokenIds, bool]]]:
    """The documents of each batch, long ones in parts: token ids, and whether the document began before them."""
    for batch in batches:
        if len(batch) != 1 or len(batch[0]) <= _PART_TOKENS:
            yield [(ids, False) for ids in batch]
            continue
        [ids] = batch
        for start in range(0, len(ids), _PART_TOKENS):
            yield [(ids[start : start + _PART_TOKENS], start > 0)]

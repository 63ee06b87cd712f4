"""Documents → contexts. Every token is used once, or counted as dropped.

The stream is, for each document, the separator (the tokenizer's beginning-of-text token) and then its tokens. With
packing it is cut into pieces of `context` tokens; with ``--bos`` into pieces of `context` - 1, each with one more
separator put first. Without packing each document is cut on its own, without the stream's separators, and its last
context may be shorter.

A document that begins with the separator as it comes (a chat template or a pre-tokenised corpus may put it there) gets
none from the stream. Rows that are contexts already stay as they are, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nsae_cli import catalogue
from nsae_cli.lm.records import TokenIds

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
        separator: id of the beginning-of-text token.
        tokens: most rows to make; None for the whole corpus.
        rows_are_contexts: documents are contexts already; nothing is put in, `bos` says that each begins with the
            separator, and what is longer than `context` is cut off.
    """

    context: int
    packing: bool
    bos: bool
    separator: int
    tokens: int | None
    rows_are_contexts: bool = False


@dataclass
class Packer:
    """Cuts documents into contexts and counts what did not fit.

    Attributes:
        dropped_tokens: with packing, tokens of the stream that fill no whole context at the corpus's end; of rows that
            are contexts already, those behind the context's size.
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
        if self.layout.rows_are_contexts:
            return self._as_they_are(batches)
        return self._packed(batches) if self.layout.packing else self._one_by_one(batches)

    def _packed(self, batches: Iterable[list[TokenIds]]) -> Iterator[Context]:
        layout = self.layout
        piece = layout.context - layout.bos
        left = np.inf if layout.tokens is None else layout.tokens // layout.context
        separator = np.array([layout.separator], np.int32)
        tokens = documents = np.empty(0, np.int32)
        number, last_kept = 0, -1
        for part in _bounded(batches):
            stream = [
                ids if goes_on or self._begins_with_separator(ids) else np.concatenate([separator, ids])
                for ids, goes_on in part
            ]
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
            if layout.bos and self._begins_with_separator(ids):
                ids = ids[1:]  # it is put in front of every piece, the first too
            self.dropped_documents += len(ids) == 0
            for start in range(0, len(ids), piece):
                cut = ids[start : start + piece]
                context = self._context(cut, np.full(len(cut), number, np.int32))
                left -= len(context)
                if left < 0:
                    return
                yield context

    def _as_they_are(self, batches: Iterable[list[TokenIds]]) -> Iterator[Context]:
        layout = self.layout
        left = np.inf if layout.tokens is None else layout.tokens
        for number, ids in enumerate(ids for batch in batches for ids in batch):
            if not len(ids):
                self.dropped_documents += 1
                continue
            if layout.bos and not self._begins_with_separator(ids):
                raise catalogue.OPTION_DOES_NOT_FIT(
                    f"--bos: row {number} of the corpus begins with token {ids[0]}, not with the beginning-of-text "
                    f"token {layout.separator}, and rows of --tokens-column are used as they are; give --no-bos, or "
                    f"--packing to have it put in"
                )
            left -= min(len(ids), layout.context)
            if left < 0:
                return
            self.dropped_tokens += max(0, len(ids) - layout.context)
            ids = ids[: layout.context]
            yield Context(ids, np.full(len(ids), number, np.int32))

    def _begins_with_separator(self, ids: TokenIds) -> bool:
        return len(ids) > 0 and bool(ids[0] == self.layout.separator)

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

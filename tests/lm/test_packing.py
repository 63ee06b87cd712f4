"""Packing against a counter written from the definition alone: lists, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsae_cli.errors import UsageError
from nsae_cli.lm.packing import Layout, Packer

SEPARATOR = 9
CONTEXT = 8

Row = tuple[int, int, int]  # token, position, document


@dataclass
class Expected:
    contexts: list[list[Row]]
    dropped_tokens: int
    dropped_documents: int


def count_by_hand(documents: list[list[int]], context: int, packing: bool, bos: bool, tokens: int | None) -> Expected:
    contexts: list[list[Row]] = []
    current: list[tuple[int, int]] = []
    room = context - 1 if bos else context

    def close() -> None:
        rows = [(SEPARATOR, current[0][1]), *current] if bos else list(current)
        contexts.append([(token, position, document) for position, (token, document) in enumerate(rows)])
        current.clear()

    for document, ids in enumerate(documents):
        for token in [SEPARATOR, *ids] if packing else ids:
            current.append((token, document))
            if len(current) == room:
                close()
        if not packing and current:
            close()
    if tokens is not None:
        kept = []
        used = 0
        for rows in contexts:
            if used + len(rows) > tokens:
                # Stopped by the limit: the corpus's end was never seen.
                seen = rows[0][2]
                empty = sum(not ids for ids in documents[:seen])
                return Expected(kept, 0, 0 if packing else empty)
            kept.append(rows)
            used += len(rows)
            if packing and used == tokens // context * context:
                return Expected(kept, 0, 0)
        contexts = kept
    present = {row[2] for rows in contexts for row in rows}
    return Expected(contexts, len(current), len(documents) - len(present))


def pack(documents: list[list[int]], batch: int, **layout: object) -> Expected:
    packer = Packer(Layout(separator=SEPARATOR, **layout))  # type: ignore[arg-type]
    arrays = [np.array(ids, dtype=np.int32) for ids in documents]
    batches = [arrays[i : i + batch] for i in range(0, len(arrays), batch)]
    contexts = [
        [(int(t), position, int(d)) for position, (t, d) in enumerate(zip(c.tokens, c.documents, strict=True))]
        for c in packer.contexts(batches)
    ]
    return Expected(contexts, packer.dropped_tokens, packer.dropped_documents)


LENGTHS = st.sampled_from([0, 1, CONTEXT - 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 10 * CONTEXT]) | st.integers(0, 20)


@given(
    lengths=st.lists(LENGTHS, max_size=12),
    packing=st.booleans(),
    bos=st.booleans(),
    tokens=st.none() | st.integers(CONTEXT, 200),
    batch=st.integers(1, 5),
)
@settings(max_examples=400, deadline=None)
def test_packing_equals_the_counter(
    lengths: list[int], packing: bool, bos: bool, tokens: int | None, batch: int
) -> None:
    ids = iter(range(10, 10_000))  # every token differs, so a lost or repeated one shows
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    options = {"context": CONTEXT, "packing": packing, "bos": bos, "tokens": tokens}
    assert pack(documents, batch, **options) == count_by_hand(documents, **options)  # type: ignore[arg-type]


def test_packing_a_worked_example() -> None:
    found = pack([[1, 2, 3], [], [4, 5]], batch=2, context=4, packing=True, bos=True, tokens=None)
    # Stream: 9 1 2 | 3 9 9 | 4 5; the last piece is no whole context.
    assert found.contexts == [
        [(9, 0, 0), (9, 1, 0), (1, 2, 0), (2, 3, 0)],
        [(9, 0, 0), (3, 1, 0), (9, 2, 1), (9, 3, 2)],
    ]
    assert (found.dropped_tokens, found.dropped_documents) == (2, 0)


@pytest.mark.parametrize(
    ("options", "contexts", "dropped"),
    [
        # Stream: 9 1 2 3 4 | 9 5 -> 9 1 2 | 3 4 9 | 5; no second separator where one stands.
        ({"packing": True, "bos": True}, [[9, 9, 1, 2], [9, 3, 4, 9]], (1, 0)),
        ({"packing": True, "bos": False}, [[9, 1, 2, 3], [4, 9, 9, 5]], (0, 0)),
        ({"packing": False, "bos": True}, [[9, 1, 2, 3], [9, 4], [9, 5]], (0, 1)),
        ({"packing": False, "bos": False}, [[9, 1, 2, 3], [4], [9], [9, 5]], (0, 0)),
    ],
)
def test_documents_that_begin_with_the_separator(
    options: dict[str, bool], contexts: list[list[int]], dropped: tuple[int, int]
) -> None:
    found = pack([[9, 1, 2, 3, 4], [9], [9, 5]], batch=2, context=4, tokens=None, **options)
    if options == {"packing": True, "bos": True}:  # the stream is 9 1 2 | 3 4 9 | 9 5
        assert (found.dropped_tokens, found.dropped_documents) == (2, 1)
    else:
        assert (found.dropped_tokens, found.dropped_documents) == dropped
    assert [[token for token, _, _ in context] for context in found.contexts] == contexts


def test_rows_that_are_contexts_already() -> None:
    rows = [[9, 1, 2], [], [9, 3, 4, 5, 6], [9]]
    options = {"batch": 2, "context": 4, "packing": False, "tokens": None, "rows_are_contexts": True}
    found = pack(rows, bos=True, **options)  # type: ignore[arg-type]
    assert [[token for token, _, _ in context] for context in found.contexts] == [[9, 1, 2], [9, 3, 4, 5], [9]]
    assert [context[0][2] for context in found.contexts] == [0, 2, 3]
    assert (found.dropped_tokens, found.dropped_documents) == (1, 1)
    limited = pack(rows, bos=True, **{**options, "tokens": 7})  # type: ignore[arg-type]
    assert len(limited.contexts) == 2
    assert limited.dropped_tokens == 1
    other = pack([[9, 1], [2, 3]], bos=False, **options)  # type: ignore[arg-type]
    assert [[token for token, _, _ in context] for context in other.contexts] == [[9, 1], [2, 3]]
    with pytest.raises(UsageError, match=r"--bos: row 1 .* begins with token 2, .* token 9, .*give --no-bos"):
        pack([[9, 1], [2, 3]], bos=True, **options)  # type: ignore[arg-type]


def test_no_packing_a_worked_example() -> None:
    found = pack([[1, 2, 3, 4], [], [5]], batch=3, context=4, packing=False, bos=True, tokens=None)
    assert found.contexts == [
        [(9, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 0)],
        [(9, 0, 0), (4, 1, 0)],
        [(9, 0, 2), (5, 1, 2)],
    ]
    assert (found.dropped_tokens, found.dropped_documents) == (0, 1)


def test_packing_reads_no_further_than_it_needs() -> None:
    def endless() -> object:
        while True:
            yield [np.arange(5, dtype=np.int32)]

    packer = Packer(Layout(context=4, packing=True, bos=True, separator=9, tokens=4000))
    assert sum(len(context) for context in packer.contexts(endless())) == 4000  # type: ignore[arg-type]


def test_packing_holds_no_more_than_a_batch() -> None:
    """Contexts are handed out while documents come in: memory does not grow with the corpus."""
    read = 0

    def batches() -> object:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield [np.arange(4, dtype=np.int32)]

    packer = Packer(Layout(context=4, packing=True, bos=False, separator=9, tokens=None))
    for number, _ in enumerate(packer.contexts(batches())):  # type: ignore[arg-type]
        assert read <= number + 2

"""A model's tokenizer, and documents → token ids in batches.

Special tokens that stand in a text (``<|endoftext|>`` typed out) are encoded as the ordinary characters they are. In a
conversation the chat template puts them in, and there they are the tokens they name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from huggingface_hub.errors import HTTPError
from tokenizers import Tokenizer

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import ArtifactError
from nsae_cli.lm.chat import ChatTemplate, chat_template_of
from nsae_cli.lm.loading import ModelInfo
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.lm.records import Content, Conversation, Document, TokenIds, TokenRow
from nsae_cli.reporter import Reporter

# A batch ends at whichever comes first, so that long documents do not pile up in memory.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20

# The tokenizer takes some 150 bytes for each character at work, so a long document is given to it in pieces of about
# this many characters, this many at a time.
_PIECE_CHARACTERS = 2**17
_PIECES = 8
# One space or line break between letters or digits: GPT-2's rule for words ends one before it, whatever stands around.
_WORD_BORDER = re.compile(r"(?<=[^\W_])[ \n](?=[^\W_])")


#: What nsae puts between documents and first in contexts of GPT-2, for which it was made; not recorded.
_GPT2_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class TextTokenizer:
    """Documents → token ids.

    Attributes:
        name: the model whose tokenizer it is.
        sha256: of the fast tokenizer's JSON serialisation.
        separator: id of the beginning-of-text token, else of the end-of-text token.
        separator_text: the same as text.
        special_token_ids: every special token, ascending.
        vocab_size: of the model: every id is below it.
        chat: renders conversations; None where the tokenizer has no chat template.
    """

    name: str
    sha256: str
    separator: int
    separator_text: str
    special_token_ids: list[int]
    vocab_size: int
    chat: ChatTemplate | None
    _backend: Tokenizer

    @property
    def identity(self) -> dict[str, Any]:
        """What the manifest records."""
        identity: dict[str, Any] = {"name": self.name, "sha256": self.sha256}
        if self.separator_text != _GPT2_SEPARATOR:
            identity["bos_token"] = {"id": self.separator, "text": self.separator_text}
        return identity

    def identity_for(self, content: Content) -> dict[str, Any]:
        """The same for documents of a kind: with conversations, their template too."""
        if content != "chat" or self.chat is None:
            return self.identity
        return {**self.identity, "chat_template_sha256": self.chat.sha256}

    def encode_batches(self, documents: Iterable[Document]) -> Iterator[list[TokenIds]]:
        """Token ids of each document, in order, some documents at a time; nothing is added to them.

        Raises:
            UsageError: a conversation that the chat template refuses, or no template; an id that the model lacks.
        """
        for kind, some in itertools.groupby(documents, type):
            if kind is TokenRow:
                yield from _checked_rows(cast(Iterator[TokenRow], some), self.name, self.vocab_size)
            elif kind is Conversation:
                yield from self._encode_conversations(cast(Iterator[Conversation], some))
            else:
                yield from self._encode_texts(cast(Iterator[str], some))

    def _encode_texts(self, texts: Iterable[str]) -> Iterator[list[TokenIds]]:
        for batch in _batches(texts):
            if len(batch) == 1 and len(batch[0]) > _PIECE_CHARACTERS and self._splits_at_words:
                yield [self._encode_long(batch[0])]
            else:
                yield self._encode(batch)

    def _encode_conversations(self, conversations: Iterable[Conversation]) -> Iterator[list[TokenIds]]:
        chat = self.chat
        if chat is None:
            raise catalogue.OPTION_DOES_NOT_FIT(
                f"--chat-column: the tokenizer of {self.name} has no chat template; take a model that was trained on "
                f"conversations, or give their text as a column with --text-column"
            )
        for batch in _batches(chat.render(conversation) for conversation in conversations):
            yield [np.asarray(ids, dtype=np.int32) for ids in chat.encode(batch)]

    def _encode(self, texts: list[str]) -> list[TokenIds]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _encode_long(self, text: str) -> TokenIds:
        """The same ids as in one go, in a bounded amount of memory beside them."""
        parts: list[TokenIds] = []
        pieces = _cut_at_words(text)
        while some := list(itertools.islice(pieces, _PIECES)):
            interrupt.stop_if_requested("stopped while tokenizing; the same command goes on with what is on disk")
            parts += self._encode(some)
        return np.concatenate(parts)

    @cached_property
    def _splits_at_words(self) -> bool:
        """Whether text that is cut at `_WORD_BORDER` makes the same tokens: byte-level BPE with GPT-2's own rule."""
        described = json.loads(self._backend.to_str())
        pre = described["pre_tokenizer"] or {}
        return (
            described["normalizer"] is None
            and pre.get("type") == "ByteLevel"
            and pre.get("use_regex") is True
            and pre.get("add_prefix_space") is False
            and all(token["special"] for token in described["added_tokens"])
        )

    def text_of(self, token: int) -> str:
        """A token as text, for messages and tables."""
        return self._backend.decode([token], skip_special_tokens=False)


@dataclass(frozen=True)
class NumbersOnly:
    """Stands for the tokenizer of a model that has none, where all documents are token ids already.

    Attributes:
        name: of the model.
        separator: beginning-of-text token of the model's configuration.
        vocab_size: of the model.
    """

    name: str
    separator: int
    vocab_size: int

    def identity_for(self, content: Content) -> dict[str, Any]:
        """What the manifest records."""
        return {"name": None, "sha256": None, "bos_token": {"id": self.separator, "text": None}}

    @property
    def separator_text(self) -> str:
        """As a number."""
        return self.text_of(self.separator)

    @property
    def special_token_ids(self) -> list[int]:
        """Only the one that is known."""
        return [self.separator]

    def encode_batches(self, documents: Iterable[Document]) -> Iterator[list[TokenIds]]:
        """As `TextTokenizer.encode_batches`."""
        return _checked_rows(cast(Iterable[TokenRow], documents), self.name, self.vocab_size)

    def text_of(self, token: int) -> str:
        """``#50256``."""
        return f"#{token}"


#: What makes token ids of documents.
DocumentTokenizer = TextTokenizer | NumbersOnly


def _checked_rows(rows: Iterable[TokenRow], model: str, vocab_size: int) -> Iterator[list[TokenIds]]:
    """Token ids that stand in the corpus, some rows at a time.

    Raises:
        UsageError: one that the model does not have.
    """
    batch: list[TokenIds] = []
    tokens = 0
    for row in rows:
        outside = (row.ids < 0) | (row.ids >= vocab_size)
        if outside.any():
            index = int(outside.argmax())
            raise catalogue.CORPUS_COLUMN(
                f"corpus {row.place}: token {index} is id {row.ids[index]}, {model} has 0-{vocab_size - 1}; give ids "
                f"of the model's own tokenizer, or check --tokens-column"
            )
        batch.append(row.ids.astype(np.int32))
        tokens += len(row)
        if len(batch) == _BATCH_DOCUMENTS or tokens >= _BATCH_CHARACTERS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _cut_at_words(text: str) -> Iterator[str]:
    """Pieces of about `_PIECE_CHARACTERS`; longer where no border of words comes."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        border = _WORD_BORDER.search(text, start + _PIECE_CHARACTERS)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        if len(text) > _PIECE_CHARACTERS:  # alone, to be cut
            if batch:
                yield batch
                batch, characters = [], 0
            yield [text]
            continue
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def load_tokenizer_for(content: Content, info: ModelInfo, reporter: Reporter) -> DocumentTokenizer:
    """As `load_tokenizer`; documents that are token ids already can do without one.

    Raises:
        ArtifactError: no usable tokenizer, and the documents need one.
    """
    try:
        return load_tokenizer(info)
    except ArtifactError:
        if content != "tokens" or info.text_start is None:
            raise
        reporter.note(f"{info.name} has no usable tokenizer: tokens are shown by number")
        return NumbersOnly(info.name, info.text_start, info.vocab_size)


def load_tokenizer(info: ModelInfo) -> TextTokenizer:
    """Loads the fast tokenizer that lies beside a model.

    Raises:
        ArtifactError: none is there, it has no beginning-of-text token, or it makes ids that the model lacks.
    """
    from transformers import AutoTokenizer

    with quiet_libraries():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                info.source, revision=info.revision, local_files_only=info.cached_only, trust_remote_code=False
            )
        except (OSError, HTTPError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise catalogue.TOKENIZER(
                f"--model {info.name}: no tokenizer could be loaded ({reason}); save the model's tokenizer beside it"
            ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise catalogue.TOKENIZER(
            f"--model {info.name}: its tokenizer has no fast form (tokenizer.json); save it as one"
        )
    # Documents are cut into contexts here, never by the tokenizer.
    backend.no_truncation()
    backend.no_padding()
    described = backend.to_str()
    sha256 = hashlib.sha256(described.encode("utf-8")).hexdigest()
    backend.encode_special_tokens = True

    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if separator is None:
        raise catalogue.TOKENIZER(
            f"--model {info.name}: its tokenizer names no beginning-of-text token; set bos_token in it"
        )
    # Special tokens are never made from text, so a padding token beyond the embeddings does no harm.
    control = (token["id"] for token in json.loads(described)["added_tokens"] if token["special"])
    special = sorted({*tokenizer.all_special_ids, *control})
    ordinary = set(backend.get_vocab(with_added_tokens=True).values()) - set(special)
    if not ordinary:
        # transformers makes an empty tokenizer where a model has none.
        raise catalogue.TOKENIZER(f"--model {info.name}: no tokenizer is there; save the model's tokenizer beside it")
    largest = max(ordinary | {separator})
    if largest >= info.vocab_size:
        raise catalogue.TOKENIZER(
            f"--model {info.name}: its tokenizer makes token {largest}, the model has 0-{info.vocab_size - 1}; "
            f"save the model's own tokenizer beside it"
        )
    return TextTokenizer(
        name=info.name,
        sha256=sha256,
        separator=separator,
        separator_text=str(tokenizer.convert_ids_to_tokens(separator)),
        special_token_ids=special,
        vocab_size=info.vocab_size,
        chat=chat_template_of(tokenizer, described, info.name),
        _backend=backend,
    )

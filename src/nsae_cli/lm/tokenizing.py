"""A model's tokenizer, and documents → token ids in batches.

Special tokens that stand in a text (``<|endoftext|>`` typed out) are encoded as the ordinary characters they are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from huggingface_hub.errors import HTTPError
from tokenizers import Tokenizer

from nsae_cli import catalogue, interrupt
from nsae_cli.lm.loading import ModelInfo
from nsae_cli.lm.quiet import quiet_libraries

TokenIds = npt.NDArray[np.int32]

# A batch ends at whichever comes first, so that long documents do not pile up in memory.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20

# The tokenizer takes some 150 bytes for each character at work, so a long document is given to it in pieces of about
# this many characters, this many at a time.
_PIECE_CHARACTERS = 2**17
_PIECES = 8
# One space or line break between letters or digits: GPT-2's rule for words ends one before it, whatever stands around.
_WORD_BORDER = re.compile(r"(?<=[^\W_])[ \n](?=[^\W_])")


@dataclass(frozen=True)
class TextTokenizer:
    """Text → token ids.

    Attributes:
        name: the model whose tokenizer it is.
        sha256: of the fast tokenizer's JSON serialisation.
        separator: id of ``<|endoftext|>`` (the tokenizer's beginning-of-text token).
        special_token_ids: every special token, ascending.
    """

    name: str
    sha256: str
    separator: int
    special_token_ids: list[int]
    _backend: Tokenizer

    @property
    def identity(self) -> dict[str, str]:
        """What the manifest records."""
        return {"name": self.name, "sha256": self.sha256}

    def encode_batches(self, texts: Iterable[str]) -> Iterator[list[TokenIds]]:
        """Token ids of each document, in order, some documents at a time; nothing is added to them."""
        for batch in _batches(texts):
            if len(batch) == 1 and len(batch[0]) > _PIECE_CHARACTERS and self._splits_at_words:
                yield [self._encode_long(batch[0])]
            else:
                yield self._encode(batch)

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
    sha256 = hashlib.sha256(backend.to_str().encode("utf-8")).hexdigest()
    backend.encode_special_tokens = True

    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if separator is None:
        raise catalogue.TOKENIZER(
            f"--model {info.name}: its tokenizer names no beginning-of-text token; set bos_token in it"
        )
    # Special tokens are never made from text, so a padding token beyond the embeddings does no harm.
    special = sorted(set(tokenizer.all_special_ids))
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
    return TextTokenizer(info.name, sha256, separator, special, backend)

"""What a record of a corpus holds: text, a conversation, or token ids.

A record is a line of a .jsonl file, a row of a parquet file or of a hub data set; a .txt file is one document of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nsae_cli import catalogue
from nsae_cli.errors import UsageError

Content = Literal["text", "chat", "tokens"]
TokenIds = npt.NDArray[np.int32]

#: The option that names a column, by what the column holds.
OPTIONS: dict[Content, str] = {"text": "--text-column", "chat": "--chat-column", "tokens": "--tokens-column"}


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: each with ``role`` and usually ``content``, and whatever else the template may ask for.
        place: of the record, for messages.
    """

    messages: list[dict[str, Any]]
    place: str

    def __len__(self) -> int:
        return len(self.messages)


@dataclass(frozen=True)
class TokenRow:
    """Token ids as they are to be used.

    Attributes:
        ids: not yet checked against any vocabulary, int64.
        place: of the record, for messages.
    """

    ids: npt.NDArray[np.int64]
    place: str

    def __len__(self) -> int:
        return len(self.ids)


Document = str | Conversation | TokenRow


@dataclass(frozen=True)
class Column:
    """Where in a record the document is."""

    name: str
    content: Content = "text"

    def of(self, record: Mapping[str, Any], place: str) -> Document:
        """The document in a record; a null is an empty document.

        Raises:
            UsageError: no such column, or it holds something else.
        """
        if self.name not in record:
            raise self.missing(place, list(record))
        value = record[self.name]
        if self.content == "text":
            return _text(value, self.name, place)
        if self.content == "chat":
            return Conversation(_messages(value, self.name, place), place)
        return TokenRow(_ids(value, self.name, place), place)

    def missing(self, corpus: str, found: list[str]) -> UsageError:
        """The error that says so."""
        names = ", ".join(repr(name) for name in found) or "nothing"
        return catalogue.CORPUS_COLUMN(
            f"corpus {corpus} has no column {self.name!r}; found {names}; choose one with {OPTIONS[self.content]}"
            f"{_other_content(self.content, found)}"
        )


def holds_something(document: Document) -> bool:
    """Whether a document is more than white space."""
    return bool(document.strip()) if isinstance(document, str) else len(document) > 0


def _other_content(content: Content, found: list[str]) -> str:
    """Another option that the columns' usual names suggest."""
    usual: dict[str, Content] = {"messages": "chat", "conversation": "chat", "input_ids": "tokens", "tokens": "tokens"}
    other = next((f"{OPTIONS[usual[name]]} {name}" for name in found if usual.get(name, content) != content), None)
    return "" if other is None else f", or perhaps {other}"


def _text(value: Any, column: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise catalogue.CORPUS_COLUMN(
            f"corpus {place}: column {column!r} is {type(value).__name__}, not text; check --text-column"
            f"{_remedy_for(value)}"
        )
    _require_characters(value, place)
    return value


def _require_characters(text: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise catalogue.CORPUS_ENCODING(
            f"corpus {place}: half a surrogate pair at character {error.start:,} is not text; mend it"
        ) from error


def _remedy_for(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return ""
    return ", or --chat-column" if isinstance(value[0], dict) else ", or --tokens-column"


def _messages(value: Any, column: str, place: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    expected = 'expected a list of {"role": …, "content": …}; check --chat-column'
    if not isinstance(value, list):
        raise catalogue.CORPUS_COLUMN(f"corpus {place}: column {column!r} is {type(value).__name__}; {expected}")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise catalogue.CORPUS_COLUMN(
                f"corpus {place}: message {number} of column {column!r} is {type(message).__name__}; {expected}"
            )
        if not isinstance(message.get("role"), str):
            keys = ", ".join(repr(key) for key in message) or "nothing"
            raise catalogue.CORPUS_COLUMN(
                f"corpus {place}: message {number} of column {column!r} has no role, it has {keys}; {expected}"
            )
        if isinstance(content := message.get("content"), str):
            _require_characters(content, place)
    return value


def _ids(value: Any, column: str, place: str) -> npt.NDArray[np.int64]:
    if value is None:
        return np.empty(0, np.int64)
    kind = type(value).__name__
    if isinstance(value, list):
        bad = next((one for one in value if not isinstance(one, int) or isinstance(one, bool)), None)
        if bad is None:
            try:
                return np.asarray(value, dtype=np.int64)
            except OverflowError:
                bad = max(value, key=abs)
        kind = f"a list that holds {bad!r:.40}"
    raise catalogue.CORPUS_COLUMN(
        f"corpus {place}: column {column!r} is {kind}; expected a list of token ids; check --tokens-column"
    )

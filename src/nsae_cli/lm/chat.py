"""Conversations → text and tokens, by the chat template that lies beside a model's tokenizer.

The template is jinja; transformers runs it in its sandbox. Templates that ask for the date are told a fixed one, so
that a store does not depend on the day on which it is collected or resumed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from nsae_cli import catalogue
from nsae_cli.lm.records import Conversation

#: 26 July 2024: what Llama's own template falls back to where it cannot ask.
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%a": "Fri", "%A": "Friday"}
_TIME = {"%H": "00", "%M": "00", "%S": "00"}
_REPLACEMENTS = "".join(f" | replace('{code}', '{value}')" for code, value in {**_DATE, **_TIME}.items())
# A macro hides the function of the same name that transformers offers.
_FIXED_DATE = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACEMENTS} }}}}{{% endmacro %}}"


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations and encodes what comes out.

    Attributes:
        model: whose it is, for messages.
        sha256: of the template's text.
    """

    model: str
    sha256: str
    _template: str
    _tokenizer: Any
    _backend: Tokenizer

    def render(self, conversation: Conversation) -> str:
        """The conversation as the model saw such in training; an empty one is empty.

        Raises:
            UsageError: the template refuses it.
        """
        if not conversation.messages:
            return ""
        try:
            rendered = self._tokenizer.apply_chat_template(
                conversation.messages, chat_template=self._template, tokenize=False
            )
        # What a template does with messages that it does not expect, nobody knows.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise catalogue.CORPUS_COLUMN(
                f"corpus {conversation.place}: the chat template of {self.model} refuses the messages ({reason}); "
                f"leave this record out, or give a model whose template takes it"
            ) from error
        return str(rendered)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids; special tokens that the template wrote are themselves."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def chat_template_of(tokenizer: Any, described: str, model: str) -> ChatTemplate | None:
    """The chat template of a transformers tokenizer, None where it has none.

    Args:
        tokenizer: the tokenizer.
        described: its fast tokenizer as JSON.
        model: the model's name.
    """
    templates = tokenizer.chat_template
    if not templates or (isinstance(templates, dict) and "default" not in templates):
        return None
    template = str(tokenizer.get_chat_template())
    fixed = _FIXED_DATE + template if "strftime_now" in template else template
    sha256 = hashlib.sha256(template.encode("utf-8")).hexdigest()
    backend = Tokenizer.from_str(described)
    backend.encode_special_tokens = False
    return ChatTemplate(model, sha256, fixed, tokenizer, backend)

"""What a token id stands for, for tables; works without the tokenizer too."""

from __future__ import annotations

from collections.abc import Callable

from nsae_cli.errors import NsaeError
from nsae_cli.lm.loading import inspect_model
from nsae_cli.lm.tokenizing import load_tokenizer
from nsae_cli.reporter import Reporter
from nsae_cli.store.manifest import Manifest

TokenText = Callable[[int], str]


def token_text(manifest: Manifest, reporter: Reporter) -> TokenText:
    """The text of a token id by the tokenizer that the store was collected with, else ``#id``.

    A tokenizer that cannot be had (a store from elsewhere, a local model that moved, no network) costs the texts in
    the tables and nothing else, so it is a remark and no error.
    """
    if manifest.model is None or manifest.tokenizer is None:
        return _by_number
    try:
        tokenizer = load_tokenizer(inspect_model(manifest.model, manifest.revision))
    except NsaeError:
        reporter.note(f"the tokenizer of {manifest.model} is not at hand: tokens are shown by number")
        return _by_number
    if tokenizer.sha256 != manifest.tokenizer.get("sha256"):
        reporter.warn(f"the tokenizer of {manifest.model} has changed since collect: tokens are shown by number")
        return _by_number
    return tokenizer.text_of


def _by_number(token: int) -> str:
    return f"#{token}"

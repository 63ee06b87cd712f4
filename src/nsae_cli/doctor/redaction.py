"""Takes out of a report what must not stand in a public issue: secrets, the home folder, the user's name."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
from pathlib import Path
from typing import Any

_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|COOKIE|AUTH|_KEY$|^KEY$|APIKEY", re.IGNORECASE)
_PROXY_NAMES = re.compile(r"_PROXY$", re.IGNORECASE)
_TOKEN_TEXT = re.compile(r"\b(hf|api_org|sk|ghp|gho|github_pat|glpat)[_-][A-Za-z0-9_\-]{8,}")
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_HIDDEN = "set, not shown"
#: Longest text of one value: a report has to stay readable.
_LONGEST = 300


def is_secret(variable: str) -> bool:
    """Whether an environment variable's value must not be shown: its name sounds like one, or it is a proxy's."""
    return bool(_SECRET_NAMES.search(variable) or _PROXY_NAMES.search(variable))


def shown_value(variable: str, value: str) -> str:
    """An environment variable's value as it may be shown, on one line."""
    if is_secret(variable):
        return _HIDDEN
    text = "".join(character if character.isprintable() else "?" for character in value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def without_tokens(text: str) -> str:
    """The text without what looks like a token, or like a login in a URL."""
    return _URL_LOGIN.sub("…@", _TOKEN_TEXT.sub(r"\1_…", text))


class Redactor:
    """Shortens the home folder and the user's name to ``~`` and hides what looks like a token.

    Args:
        homes: home folders, as they are named and as they resolve.
        user: the user's name, or None.
    """

    def __init__(self, homes: list[str], user: str | None) -> None:
        self._homes = sorted({home for home in homes if len(home) > 1}, key=len, reverse=True)
        # A name such as "root" tells nothing; in words it stays (a user may be called "torch"), in paths it goes.
        named = user is not None and len(user) > 1 and user != "root"
        self._user = re.compile(rf"(?<=[/\\_@-]){re.escape(user or '')}(?![A-Za-z0-9])") if named else None

    @classmethod
    def of_this_user(cls) -> Redactor:
        """With the folders and the name that the system and the environment know."""
        folders: list[Path] = []
        user = None
        with contextlib.suppress(RuntimeError, OSError):  # no home folder: nothing to hide
            folders.append(Path.home())
        with contextlib.suppress(KeyError, OSError, ImportError, RuntimeError):  # a number without a name
            user = getpass.getuser()
            folders.append(Path(f"~{user}").expanduser())
        with contextlib.suppress(KeyError, ImportError, AttributeError):  # HOME and USER may say something else
            import pwd

            entry = pwd.getpwuid(os.getuid())
            folders.append(Path(entry.pw_dir))
        return cls([text for folder in folders for text in (str(folder), str(folder.resolve()))], user)

    def text(self, text: str) -> str:
        """The text without them."""
        text = without_tokens(text)
        for home in self._homes:
            text = re.sub(rf"{re.escape(home)}(?![A-Za-z0-9_-])", "~", text)
        return text if self._user is None else self._user.sub("~", text)

    def value(self, value: Any) -> Any:
        """A JSON value without them, in all its texts; keys stay."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value

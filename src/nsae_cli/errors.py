"""What can go wrong, as types. The exit code of each type lives in one table, `nsae_cli.cli.failures`.

NsaeError
├── UsageError        an option, value or input that cannot be used as given
├── ArtifactError     an artifact that is unfinished, corrupt or does not fit
├── ResourceError     model, hub, disk, permission, memory or device not available
├── NumericalError    non-finite values, overflow of a storage dtype
└── BusyError         another process is writing to the folder
RankEnded             one of several processes ends, with the line that this process has to say, if any
Interrupted           a signal asked the run to end; what was trained is saved

A message says what is wrong and with which value, what was expected, and what to type next, in one sentence or two
without a line break: it is printed after ``nsae: `` as it stands. Errors are raised through the entries of
`nsae_cli.catalogue`, from which docs/errors.md is made: ``raise catalogue.DISK_FULL(f"…")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar


class NsaeError(Exception):
    """Base of every error that nsae raises on purpose.

    Attributes:
        entry: its place in the catalogue, which says when it happens and what to do.
        problems: everything that is wrong, one sentence each; one, but for usage errors.
    """

    entry: Entry[Any] | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.problems = [message]

    def reword(self, change: Callable[[str], str]) -> None:
        """Changes the message and each problem, as where a caller knows more than whoever found the problem."""
        self.args = (change(str(self)),)
        self.problems = [change(problem) for problem in self.problems]


class UsageError(NsaeError):
    """The command cannot be carried out as given: bad option, value, name or combination."""


class ArtifactError(NsaeError):
    """An artifact is unfinished, damaged, of another format or does not fit the one it is used with."""


class ResourceError(NsaeError):
    """Something outside nsae is missing or exhausted: model, hub, disk, permission, memory, device."""


class NumericalError(NsaeError):
    """A value is not finite or does not fit the storage dtype."""


class BusyError(NsaeError):
    """Another process is writing to the folder."""


class RankEnded(NsaeError):  # noqa: N818 - what has failed is its cause
    """How one of several processes ends once one of them has failed.

    Args:
        code: exit code.
        message: its line; None where another process says it.
    """

    def __init__(self, code: int, message: str | None) -> None:
        super().__init__(message or "another process has failed")
        self.code, self.said = code, message


class Interrupted(NsaeError):  # noqa: N818 - ending on request is no error
    """A signal asked the run to end.

    Args:
        signum: the signal's number (2 for Ctrl-C, 15 for SIGTERM).
        message: what was saved and how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


E = TypeVar("E", bound=NsaeError)


@dataclass(frozen=True)
class Entry(Generic[E]):
    """One class of failures in the catalogue. Called with a message, it makes the error to raise.

    Attributes:
        name: stable, in lower case with hyphens.
        kind: the error's type, and with it the exit code.
        cause: when it happens.
        remedy: what the user does about it.
    """

    name: str
    kind: type[E]
    cause: str
    remedy: str

    def __call__(self, *problems: str) -> E:
        """The error that reports these problems at once, in the order in which they were found; one is the rule."""
        error = self.kind("; ".join(problems))
        error.problems = list(problems)
        error.entry = self
        return error

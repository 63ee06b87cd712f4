"""What can go wrong, as types. The exit code of each type lives in one table, `nsae_cli.cli.failures`.

NsaeError
├── UsageError        an option, value or input that cannot be used as given
├── ArtifactError     an artifact that is unfinished, corrupt or does not fit
├── ResourceError     model, hub, disk, permission, memory or device not available
├── NumericalError    non-finite values, overflow of a storage dtype
└── BusyError         another process is writing to the folder
Interrupted           a signal asked the run to end; what was trained is saved

A message says what is wrong and with which value, what was expected, and what to type next, in one sentence or two
without a line break: it is printed after ``nsae: `` as it stands.
"""

from __future__ import annotations


class NsaeError(Exception):
    """Base of every error that nsae raises on purpose."""


class UsageError(NsaeError):
    """The command cannot be carried out as given: bad option, value, name or combination.

    Attributes:
        problems: everything that is wrong, one entry each.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.problems = [message]

    @classmethod
    def from_problems(cls, problems: list[str]) -> UsageError:
        """One error that reports every problem at once, in the order in which they were found."""
        error = cls("; ".join(problems))
        error.problems = list(problems)
        return error


class ArtifactError(NsaeError):
    """An artifact is unfinished, damaged, of another format or does not fit the one it is used with."""


class ResourceError(NsaeError):
    """Something outside nsae is missing or exhausted: model, hub, disk, permission, memory, device."""


class NumericalError(NsaeError):
    """A value is not finite or does not fit the storage dtype."""


class BusyError(NsaeError):
    """Another process is writing to the folder."""


class Interrupted(NsaeError):  # noqa: N818 - ending on request is no error
    """A signal asked the run to end.

    Args:
        signum: the signal's number (2 for Ctrl-C, 15 for SIGTERM).
        message: what was saved and how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum

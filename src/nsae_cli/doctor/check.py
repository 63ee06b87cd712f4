"""One finding, and how a check that fails becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "note", "problem"]

#: From harmless to grave.
STATES: tuple[State, ...] = ("ok", "note", "problem")


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        name: what was looked at; unique within its section.
        found: the finding, in words.
        state: ``ok``; ``note``: worth knowing, nsae works; ``problem``: something does not work.
        remedy: what to do; None where there is nothing to do.
        values: the same in figures, ready for JSON.
        fatal: nsae cannot work at all before this is solved.
    """

    name: str
    found: str
    state: State = "ok"
    remedy: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    fatal: bool = False


def ok(name: str, found: str, /, **values: Any) -> Check:
    """A finding with nothing to do about it."""
    return Check(name, found, values=values)


def note(name: str, found: str, remedy: str | None = None, /, **values: Any) -> Check:
    """A finding that explains something, such as a slow or an offline run."""
    return Check(name, found, "note", remedy, values)


def problem(name: str, found: str, remedy: str, /, *, fatal: bool = False, **values: Any) -> Check:
    """A finding that has to be solved."""
    return Check(name, found, "problem", remedy, values, fatal)


def guarded(name: str, look: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks of `look`; where it fails, those that it had finished and one that says what failed.

    Args:
        name: of that last check.
        look: yields checks.
    """
    found: list[Check] = []
    try:
        for check in look():
            found.append(check)  # one by one: those before a failure are kept
    except Exception as error:  # whatever a broken installation raises is a finding here
        found.append(problem(name, f"could not be looked at: {reason(error)}", "report it with this text"))
    return found


def reason(error: BaseException) -> str:
    """An error in one short line: its type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

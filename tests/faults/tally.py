"""Counts of trials: what was tried, how often the promise held, and what was wrong where it did not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

#: So many problems are kept word for word; all are counted.
_KEPT = 20


@dataclass
class Tally:
    """One row of the table of results.

    Attributes:
        what: the fault.
        stage: the command that it befell.
        tried, held: trials, and those in which every promise held.
        counts: anything else that was counted.
        most: the largest value of what was measured.
        problems: the first of what was wrong.
    """

    what: str
    stage: str
    tried: int = 0
    held: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    most: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, where: str, problems: list[str]) -> None:
        """Counts a trial.

        Args:
            where: names it.
            problems: what was wrong; empty if every promise held.
        """
        self.tried += 1
        self.held += not problems
        if problems and len(self.problems) < _KEPT:
            self.problems.append(f"{where}: {'; '.join(problems)}")

    def measure(self, name: str, value: float) -> None:
        """Keeps the largest value."""
        self.most[name] = max(value, self.most.get(name, value))

    def to_json(self) -> dict[str, Any]:
        """For the file of results."""
        return {
            "what": self.what,
            "stage": self.stage,
            "tried": self.tried,
            "held": self.held,
            "counts": dict(self.counts),
            "most": {name: round(value, 3) for name, value in self.most.items()},
            "problems": self.problems,
        }

    def require(self) -> None:
        """Fails a test with what was wrong."""
        assert self.tried, f"{self.what}, {self.stage}: nothing was tried"
        said = [f"{self.what}, {self.stage}: {self.held} of {self.tried}", *self.problems]
        assert self.held == self.tried, "\n".join(said)

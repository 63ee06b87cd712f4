"""How a prediction is put together: clauses with a verdict each, joined without wishful thinking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nsae_cli.analysis.comparison_statistics import Interval

Verdict = Literal["confirmed", "refuted", "undecided"]


@dataclass(frozen=True)
class Clause:
    """One thing that was checked: its verdict and a sentence with the numbers."""

    verdict: Verdict
    sentence: str


@dataclass
class Prediction:
    """A prediction with everything that bears on it.

    Attributes:
        id: P1 … P7.
        statement: what is predicted.
        clauses: what was checked.
        remarks: numbers that bear on it and decide nothing.
        needs: what was missing.
        parts: parts of the statement for which nothing could be checked at all; while there are any the prediction is
            not confirmed.
    """

    id: str
    statement: str
    clauses: list[Clause] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    parts: int = 0

    def lacks(self, what: str) -> None:
        """A part of the statement could not be checked for want of something."""
        self.parts += 1
        self.needs.append(what)

    @property
    def verdict(self) -> Verdict:
        """Refuted by one refuted clause; confirmed if all are and none is missing; else undecided."""
        verdicts = {clause.verdict for clause in self.clauses}
        if "refuted" in verdicts:
            return "refuted"
        return "confirmed" if verdicts == {"confirmed"} and not self.parts else "undecided"

    def document(self) -> dict[str, Any]:
        """As JSON: {id, statement, verdict, no_data, evidence, clauses, needs}."""
        return {
            "id": self.id,
            "statement": self.statement,
            "verdict": self.verdict,
            "no_data": not self.clauses,
            "evidence": [f"{clause.sentence} ({clause.verdict})." for clause in self.clauses]
            + [f"{remark}." for remark in self.remarks],
            "clauses": {
                verdict: sum(clause.verdict == verdict for clause in self.clauses)
                for verdict in ("confirmed", "refuted", "undecided")
            },
            "needs": list(dict.fromkeys(self.needs)),
        }


def lies_within(interval: Interval | None, low: float, high: float) -> Verdict:
    """Whether an interval lies inside (low, high), the ends not included (confirmed), outside (refuted), or neither."""
    if interval is None:
        return "undecided"
    if low < interval[0] and interval[1] < high:
        return "confirmed"
    return "refuted" if interval[1] < low or interval[0] > high else "undecided"


def agreed(verdicts: Iterable[Verdict]) -> Verdict:
    """What all of them say; undecided where they differ."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "undecided"


def every(values: Sequence[float], holds: Sequence[bool]) -> Verdict:
    """Of values that are far from their bound or not: confirmed if all hold, refuted if none does."""
    if not values:
        return "undecided"
    return "confirmed" if all(holds) else "refuted" if not any(holds) else "undecided"


def shown(value: float | None) -> str:
    """Three digits, with a sign of its own."""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def shown_range(values: Sequence[float]) -> str:
    """``0.1 to 0.3``; one number where both ends read the same."""
    low, high = shown(min(values)), shown(max(values))
    return low if low == high else f"{low} to {high}"


def shown_interval(interval: Interval | None) -> str:
    """``[−0.7, −0.5]``; what is missing where there is none."""
    return "(one seed: no interval)" if interval is None else f"[{shown(interval[0])}, {shown(interval[1])}]"

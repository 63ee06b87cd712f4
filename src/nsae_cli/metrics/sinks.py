"""Which rows are sinks: three rules, judged per hook from all rows of a store, and S is their union.

1. position: position 0, if the median n at position 0 exceeds 3 × the median n elsewhere;
2. norm: n > 10 × the hook's median n;
3. massive: max_j |x_j| > 100 and > 1000 × the median of |x_j| over the same row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

POSITION0_FACTOR = 3.0
NORM_FACTOR = 10.0
MASSIVE_ABSOLUTE = 100.0
MASSIVE_FACTOR = 1000.0

RULES = ("position", "norm", "massive")


@dataclass(frozen=True)
class SinkThresholds:
    """What the rules compare a row of one hook with, and the medians it follows from (units of n).

    Args:
        position0_active: rule 1 applies; None where positions are unknown or one side of its comparison is empty.
        median: median n over all rows.
        median_position0: median n over the rows at position 0, None if unknown.
        median_elsewhere: median n over the other rows, None if unknown.
        norm_threshold: rule 2 applies above this norm.
    """

    position0_active: bool | None
    median: float
    median_position0: float | None
    median_elsewhere: float | None
    norm_threshold: float


def fit_thresholds(median: float, median_position0: float | None, median_elsewhere: float | None) -> SinkThresholds:
    """Thresholds from the medians of n over all rows of a hook. Without positions rule 1 is off."""
    active = None
    if median_position0 is not None and median_elsewhere is not None:
        active = median_position0 > POSITION0_FACTOR * median_elsewhere
    return SinkThresholds(active, median, median_position0, median_elsewhere, NORM_FACTOR * median)


def massive_rows(x: Tensor) -> Tensor:
    """Rule 3 for x [B, d]: bool [B]. The median of an even number of values is the mean of the middle two."""
    magnitude = x.abs()
    peak = magnitude.amax(1)
    massive = peak > MASSIVE_ABSOLUTE
    candidates = massive.nonzero()[:, 0]
    # Late layers have large coordinates in every row, and sorting all of them would cost more than harvesting. A
    # median below peak/1000 needs half of the row below it, which is cheap to count and nearly always settles it.
    bound = peak[candidates].double() / MASSIVE_FACTOR
    half = (x.shape[1] + 1) // 2
    candidates = candidates[(magnitude[candidates] < bound[:, None]).sum(1) >= half]

    ordered = magnitude[candidates].double().sort(1).values
    median = (ordered[:, (x.shape[1] - 1) // 2] + ordered[:, x.shape[1] // 2]) / 2
    massive[:] = False
    massive[candidates] = peak[candidates].double() > MASSIVE_FACTOR * median
    return massive


@dataclass(frozen=True)
class SinkFlags:
    """The rows that each rule catches, bool [B] each; all False under a rule that was not judged.

    `judged` names the rules that were, in the order of `RULES`.
    """

    position: Tensor
    norm: Tensor
    massive: Tensor
    judged: tuple[str, ...]

    @property
    def any(self) -> Tensor:
        """S, the union: bool [B]."""
        return self.position | self.norm | self.massive


def flag_sinks(thresholds: SinkThresholds, norm: Tensor, positions: Tensor | None, massive: Tensor | None) -> SinkFlags:
    """Applies the rules to rows.

    Args:
        thresholds: of the rows' hook.
        norm: n [B].
        positions: index in the context [B]; may be None only where rule 1 does not apply.
        massive: `massive_rows` of the same rows, or None for a hook whose vectors are not at hand.
    """
    never = torch.zeros_like(norm, dtype=torch.bool)
    if thresholds.position0_active and positions is None:
        raise ValueError("rule 1 applies to this hook, but the rows come without positions")
    judged = {
        "position": positions is not None and thresholds.position0_active is not None,
        "norm": True,
        "massive": massive is not None,
    }
    return SinkFlags(
        position=positions == 0 if positions is not None and thresholds.position0_active else never,
        # In float64: the threshold need not be a float32.
        norm=norm.double() > thresholds.norm_threshold,
        massive=massive if massive is not None else never,
        judged=tuple(rule for rule in RULES if judged[rule]),
    )


class SinkCounts:
    """Counts the rows that each rule catches and where the rules disagree, over a stream of one hook's rows."""

    def __init__(self) -> None:
        self._judged: tuple[str, ...] | None = None
        self._exactly: Counter[tuple[str, ...]] = Counter()

    def update(self, flags: SinkFlags) -> None:
        """Adds rows; all updates must have judged the same rules."""
        if self._judged not in (None, flags.judged):
            raise ValueError(f"rows judged by {flags.judged} cannot be counted with rows judged by {self._judged}")
        self._judged = flags.judged
        code = flags.position.long() + 2 * flags.norm.long() + 4 * flags.massive.long()
        for value, count in enumerate(torch.bincount(code, minlength=1 << len(RULES)).tolist()):
            self._exactly[tuple(rule for bit, rule in enumerate(RULES) if value >> bit & 1)] += count

    def to_json(self) -> dict[str, int | dict[str, int] | None]:
        """{total, position, norm, massive, overlap}, in rows.

        A rule that was never judged is None. `overlap` has one key per non-empty set of judged rules, joined by "+",
        with the rows caught by exactly these; the key that names all judged rules holds the rows where they agree.
        """
        judged = self._judged or ()
        sets = [rules for size in range(1, len(judged) + 1) for rules in combinations(judged, size)]
        return {
            "total": sum(self._exactly[rules] for rules in sets),
            **{
                rule: sum(self._exactly[rules] for rules in sets if rule in rules) if rule in judged else None
                for rule in RULES
            },
            "overlap": {"+".join(rules): self._exactly[rules] for rules in sets},
        }

"""What a report page shows, as read from artifacts; `page` makes HTML of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class NormsContent:
    """norms.json and the arrays `counts`, `edges`, `position0_counts` of norms.safetensors."""

    name: str
    document: Mapping[str, Any]
    arrays: Arrays


@dataclass(frozen=True)
class SaeContent:
    """One SAE: its run.json, the rows of metrics.jsonl, and what other commands measured of it, where they did.

    Attributes:
        top_norms: top_norms.json and the arrays `l0`, `l1`, `group`.
        evaluation: eval.json.
    """

    name: str
    run: Mapping[str, Any]
    curves: Sequence[Mapping[str, Any]]
    top_norms: tuple[Mapping[str, Any], Arrays] | None = None
    evaluation: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class FeaturesContent:
    """features.json and the arrays of features.safetensors."""

    document: Mapping[str, Any]
    arrays: Arrays


@dataclass(frozen=True)
class ReportContent:
    """Everything on one page.

    Attributes:
        title: of the page.
        tables: (name, table.json) of comparison tables.
        missing: what is not on the page, and which command makes it; one sentence each.
    """

    title: str
    norms: Sequence[NormsContent] = ()
    saes: Sequence[SaeContent] = ()
    tables: Sequence[tuple[str, Any]] = ()
    features: Sequence[FeaturesContent] = ()
    missing: Sequence[str] = field(default_factory=tuple)

"""Numbers, differences and marks of a comparison, as its Markdown and its terminal table write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nsae_cli.report import format as fmt

#: (name in table.json, heading, whether it is a share), in the order of the table.
COLUMNS = (
    ("l0_ns", "L0 ns", False),
    ("fvu_p0_ns", "FVU ns", False),
    ("mre_ns", "MRE ns", False),
    ("nbi", "nbi", False),
    ("nbi_rel", "nbi_rel", False),
    ("shrinkage_low", "γ low", False),
    ("shrinkage_high", "γ high", False),
    ("mre_sinks", "MRE sinks", False),
    ("norm_ratio_sinks", "norm ratio sinks", False),
    ("delta_ce_ns", "ΔCE ns", False),
    ("delta_ce_all", "ΔCE all", False),
    ("dead_fraction", "dead", True),
    ("alpha", "α", False),
)
#: What is compared, and how a difference in it is written.
COMPARED = (
    ("fvu_p0_ns", "FVU ns"),
    ("mre_ns", "MRE ns"),
    ("nbi", "nbi"),
    ("delta_ce_ns", "ΔCE ns"),
    ("delta_ce_all", "ΔCE all"),
)
LEGEND = (
    "Held-out tokens; ns = non-sink. FVU: unexplained share of the variance; MRE: mean ‖x̂−x‖²/‖x‖²; nbi: slope of log "
    "relative error on log norm, nbi_rel: the same less that of relu p=2 q=1 at equal L0 and seed; γ low, high: "
    "shrinkage in the lowest and the highest norm bin (1 = none); ΔCE: added next-token cross-entropy in nats with the "
    "reconstruction in place of non-sinks, of all tokens; dead: features silent on these tokens. Mean ± standard "
    "deviation over seeds."
)


def spread(cell: Mapping[str, Any] | None, share: bool = False) -> str:
    """``.191 ± .002``: mean and standard deviation with as many decimals as the mean has."""
    mean, sd = (cell or {}).get("mean"), (cell or {}).get("sd")
    if mean is None:
        return fmt.MISSING
    if share:
        mean, sd = 100 * mean, None if sd is None else 100 * sd
    text = fmt.number(mean)
    text = text.replace("-", "−")
    if sd is not None:
        decimals = len(text.partition(".")[2]) if text[-1:].isdecimal() else 2
        text += f" ± {sd:.{decimals}f}"
    return f"{text} %" if share else text


def signed(value: float | None, digits: int = 2) -> str:
    """``+0.013``, ``−2.1``: two digits, with its sign."""
    if value is None:
        return fmt.MISSING
    if 0 < abs(value) < 1e-4:
        return f"{'>−' if value < 0 else '<'}0.0001"
    text = fmt.number(abs(value), digits)
    return text if value == 0 else f"{'+' if value > 0 else '−'}{text}"


def interval(part: Mapping[str, Any] | None, scale: float = 1.0) -> str:
    """``[−3.1, −0.9]``."""
    return fmt.MISSING if part is None else f"[{signed(scale * part['low'])}, {signed(scale * part['high'])}]"


def in_percent(metric: str, entry: Mapping[str, Any]) -> float | None:
    """100 ÷ the baseline's value for what is given relative to it, else None."""
    if metric not in ("fvu_p0_ns", "mre_ns") or not entry.get("relative") or not entry["difference"]:
        return None
    return float(100 * entry["relative"] / entry["difference"])


def difference(metric: str, entry: Mapping[str, Any]) -> str:
    """``−2.1 %``, ``+0.013``."""
    scale = in_percent(metric, entry)
    return signed(entry["difference"]) if scale is None else f"{signed(scale * entry['difference'])} %"


def unmatched(compared: Mapping[str, Any]) -> str:
    """Why two arms are not compared."""
    if compared["status"] == "no common seed":
        return f"no seed in common with {compared['with']}"
    l0, other = fmt.number(compared["l0_ns"]), fmt.number(compared["l0_ns_with"])
    return f"unmatched L0 ({l0} vs {other})"


def usual(group: Mapping[str, Any]) -> str:
    """``unless an arm says otherwise: tokens=1M``; empty where nothing differs."""
    values = ", ".join(f"{name}={value}" for name, value in (group.get("usual") or {}).items())
    return f"unless an arm says otherwise: {values}" if values else ""


def with_p0(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The comparison of a row with the p = 0 arm of its activation."""
    return next((compared for compared in row["comparisons"] if compared["kind"] == "p=0"), None)


def mark_cell(compared: Mapping[str, Any] | None, metric: str) -> str:
    """``−2.1 % better``; the reason where nothing can be said; empty for a row that is a baseline itself."""
    if compared is None:
        return ""
    if compared["status"] != "matched":
        return unmatched(compared)
    entry = compared["metrics"].get(metric)
    return fmt.MISSING if entry is None else f"{difference(metric, entry)} {entry['mark']}"


def present_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, bool]]:
    """The columns in which some row has a value."""
    return [column for column in COLUMNS if any(row["metrics"][column[0]]["mean"] is not None for row in rows)]

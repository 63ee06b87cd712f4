"""eval.json as a terminal table and as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.report import format as fmt
from nsae_cli.report.layout import Column, WideTable

Document = Mapping[str, Any]

_NOTE = (
    "L0: active features per token; FVU: unexplained share of the variance; ΔCE: rise of the next-token cross-entropy, "
    "in nats per predicted token, with x̂ spliced in at non-sinks (ns) or at every token (all), in brackets the 95 % "
    "interval over contexts; KL: of the clean from the spliced predictions; recovered: (CE ablated − CE spliced) ÷ (CE "
    "ablated − CE clean), ablated to zero or to the mean."
)
_BINS_NOTE = (
    "x̂ spliced in at the rows of one norm bin, or at the sinks, only: rise of the summed cross-entropy, in nats per "
    "spliced row."
)
#: Sentences about single SAEs, at most for so many.
_MOST_SENTENCES = 8
#: L0s that differ by more than this share are not equal.
_EQUAL_L0 = 0.05


def eval_table(documents: Sequence[Document], labels: Sequence[str] | None = None) -> RenderableType:
    """One row per SAE; with ``--bins`` a second table of the norm bins.

    Args:
        documents: eval.json of each SAE.
        labels: a name for each; by default the SAE names without their common beginning.
    """
    if not documents:
        return Text("no evaluation")
    names = list(labels) if labels is not None else fmt.short_labels([_name(document) for document in documents])
    parts: list[RenderableType] = []
    # Numbers of the model alone are printed once for all SAEs that share them.
    for line in (_text, _ablations):
        parts += [Text(text) for text in dict.fromkeys(map(line, documents))]
    keys = [
        Column("name", names),
        Column("layer", [str(_layer(document)) for document in documents]),
    ]
    groups = [
        [Column("L0\nns", [fmt.number(_metric(d, "ns", "l0")) for d in documents])],
        [Column("FVU\nns", [fmt.number(_metric(d, "ns", "fvu_p0")) for d in documents])],
        [Column("ΔCE\nns", [_with_interval(d, "delta_ce_ns") for d in documents])],
        [Column("\nall", [_with_interval(d, "delta_ce_all") for d in documents])],
        [Column("\nKL", [fmt.number(_value(d, "kl")) for d in documents])],
        [Column("recovered\nfrom zero", [fmt.percent(_value(d, "ce_recovered_zero")) for d in documents]),
         Column("\nfrom mean", [fmt.percent(_value(d, "ce_recovered_mean")) for d in documents])],
    ]  # fmt: skip
    title = "Effect on the model's predictions"
    parts += [Text(""), WideTable(keys, groups, note=_NOTE)]
    with_bins = [place for place, document in enumerate(documents) if document["behaviour"].get("bins")]
    if with_bins:
        parts += [Text(""), _bins_table([documents[place] for place in with_bins], [names[p] for p in with_bins])]
    return Group(Text(title, style="bold"), *parts)


def _bins_table(documents: Sequence[Document], names: Sequence[str]) -> WideTable:
    columns = [
        Column(f"bin {b}", [_group(document["behaviour"]["bins"][b]) for document in documents]) for b in range(10)
    ]
    columns.append(Column("sinks", [_group(document["behaviour"]["sinks"]) for document in documents]))
    return WideTable(
        [Column("name", names)], [[column] for column in columns], title="ΔCE by norm, lowest first", note=_BINS_NOTE
    )


def eval_findings(documents: Sequence[Document], labels: Sequence[str] | None = None) -> list[str]:
    """What stands out, in sentences: about each SAE (the first few), and whether they can be compared."""
    names = list(labels) if labels is not None else fmt.short_labels([_name(document) for document in documents])
    sentences = []
    for name, document in zip(names[:_MOST_SENTENCES], documents, strict=False):
        about = [text for text in (_cost(document), _sinks(document), _by_norm(document)) if text]
        sentences.append(f"{name}: {' '.join(about)}" if len(documents) > 1 else " ".join(about))
    if len(documents) > _MOST_SENTENCES:
        sentences.append(f"… and {len(documents) - _MOST_SENTENCES} more; --json has all.")
    l0 = [value for document in documents if (value := _metric(document, "ns", "l0")) is not None]
    if len(l0) > 1 and max(l0) > (1 + _EQUAL_L0) * min(l0):
        sentences.append(
            f"Their non-sink L0 is not equal ({fmt.span(min(l0), max(l0))}): part of any difference between them is "
            f"sparsity alone."
        )
    return sentences


def _cost(document: Document) -> str:
    ns, zero, mean = (_value(document, key) for key in ("delta_ce_ns", "ce_recovered_zero", "ce_recovered_mean"))
    low, high = _bounds(document, "delta_ce_ns")
    if ns is None:
        return "Nothing was predicted, so nothing can be said."
    if low is not None and high is not None and low <= 0 <= high:
        text = f"At non-sinks the reconstruction changes the cross-entropy by {_nats(ns)}, which may be nothing"
        return f"{text} (95 % interval {fmt.number(low)} to {fmt.number(high)})."
    verb = "costs" if ns > 0 else "gains"
    text = f"At non-sinks the reconstruction {verb} {_nats(abs(ns))} per predicted token"
    kept = [
        f"{fmt.plain_percent(share)} of what {what} ablation costs"
        for share, what in ((mean, "mean"), (zero, "zero"))
        if share is not None and 0 <= share <= 1
    ]
    return f"{text}; spliced in everywhere it recovers {' and '.join(kept)}." if kept else f"{text}."


def _sinks(document: Document) -> str:
    """Whether it is sinks or ordinary tokens that the model suffers from."""
    everywhere, ns = _value(document, "delta_ce_all"), _value(document, "delta_ce_ns")
    sinks = _metric(document, "sinks", "tokens")
    if everywhere is None or ns is None or not sinks:
        return ""
    _, high = _bounds(document, "delta_ce_ns")
    low, _ = _bounds(document, "delta_ce_all")
    apart = low is None or high is None or low > high
    if not apart and abs(everywhere - ns) <= 0.1 * abs(ns):
        return "Splicing the sinks too changes little: the SAE reconstructs them well enough for the model."
    more = f", {fmt.plain(everywhere / ns, 2)} × as much" if apart and ns > 0 else ""
    blame = ": the sinks are what breaks the model" if apart and everywhere > 2 * max(ns, 0) else ""
    return f"With the sinks spliced too it costs {_nats(everywhere)}{more}{blame}."


def _by_norm(document: Document) -> str:
    bins = document["behaviour"].get("bins")
    if not bins:
        return ""
    values = {number: part["delta_ce"]["value"] for number, part in enumerate(bins)}
    known = {number: value for number, value in values.items() if value is not None}
    if len(known) < 2:
        return ""
    most, least = max(known, key=lambda b: known[b]), min(known, key=lambda b: known[b])
    return (
        f"A row costs most in bin {most} ({_nats(known[most])}) and least in bin {least} ({_nats(known[least])}; "
        f"bin 0 has the smallest norms, bin 9 the largest)."
    )


def _text(document: Document) -> str:
    rows = document["rows"]
    where = fmt.artifact_name(rows.get("activations") or rows.get("corpus")) or fmt.MISSING
    kind = "held-out tokens" if rows.get("held_out") else "tokens"
    return (
        f"{fmt.model_name(document['model'])} on {fmt.count(rows['tokens'])} {kind} of {where}, "
        f"{fmt.source_line(document)}"
    )


def _ablations(document: Document) -> str:
    clean, zero, mean = (fmt.number(_value(document, key)) for key in ("ce_clean", "ce_zero", "ce_mean"))
    return f"{document['hook']}: CE {clean}; ablated to zero {zero}, to the mean {mean}"


def _layer(document: Document) -> int | str:
    layer = fmt.layer_of(document["hook"])
    return fmt.MISSING if layer is None else layer


def _name(document: Document) -> str:
    return str(document["sae"]["name"])


def _metric(document: Document, scope: str, key: str) -> Any:
    return (document["metrics"].get(scope) or {}).get(key)


def _value(document: Document, key: str) -> float | None:
    value: float | None = (document["behaviour"].get(key) or {}).get("value")
    return value


def _bounds(document: Document, key: str) -> tuple[float | None, float | None]:
    found = document["behaviour"].get(key) or {}
    return found.get("low"), found.get("high")


def _with_interval(document: Document, key: str) -> str:
    low, high = _bounds(document, key)
    value = fmt.number(_value(document, key))
    return value if low is None or high is None else f"{value} [{fmt.number(low)}, {fmt.number(high)}]"


def _group(part: Mapping[str, Any]) -> str:
    return fmt.number(part["delta_ce"]["value"])


def _nats(value: float) -> str:
    return f"{fmt.plain(value)} nats"

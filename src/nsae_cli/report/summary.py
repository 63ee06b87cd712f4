"""What a report says first: sentences, in numbers, each left out where its numbers are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nsae_cli.report import format as fmt
from nsae_cli.report.arms import behaviour
from nsae_cli.report.page_content import ReportContent

#: A share of explained variance that sinks add and that is worth a sentence.
_GAP = 0.005
_RATIO = 3.0
Named = tuple[str, Mapping[str, Any]]


def summary_sentences(
    norms: Sequence[Mapping[str, Any]],
    runs: Sequence[Named],
    top_norms: Sequence[Named],
    evaluations: Sequence[Named],
) -> list[str]:
    """Sentences about norms, then about the SAEs.

    Args:
        norms: norms.json of each store.
        runs: (name, run.json) of each SAE.
        top_norms: (name, top_norms.json) of each SAE that has one.
        evaluations: (name, eval.json) of each SAE that has one.
    """
    sentences = [_sinks(document) for document in norms]
    sentences += [_saes(runs), _gap(runs), _bias(runs), _top(top_norms), _behaviour(evaluations)]
    sentences += [f"{name}: {warning}" for name, run in runs for warning in run.get("warnings") or []]
    return [sentence for sentence in sentences if sentence]


def summarise(content: ReportContent) -> list[str]:
    """The sentences about everything on a page."""
    return summary_sentences(
        [norms.document for norms in content.norms],
        [(sae.name, sae.run) for sae in content.saes],
        [(sae.name, sae.top_norms[0]) for sae in content.saes if sae.top_norms is not None],
        [(sae.name, sae.evaluation) for sae in content.saes if sae.evaluation is not None],
    )


def _sinks(norms: Mapping[str, Any]) -> str:
    where = f"{fmt.model_name(norms.get('model'))} ({fmt.source_line(norms)})"
    found = [hook for hook in norms.get("hooks") or [] if (hook.get("sinks") or {}).get("total")]
    if not found:
        return f"In {where} no layer has a sink: norms alone give no token an outsized voice."
    worst = max(found, key=lambda hook: hook.get("sink_share_sq") or 0)
    share = fmt.quotient(worst["sinks"]["total"], worst.get("rows"))
    text = (
        f"In {where} sinks are {fmt.plain_percent(share)} of the tokens at layer {fmt.layer_label(worst)} and hold "
        f"{fmt.plain_percent(worst.get('sink_share_sq'))} of Σ‖x‖² there"
    )
    table = worst.get("table") or {}
    first = [cell["median"] for key in ("position0_other", "position0_special")
             if (cell := table.get(key) or {}).get("median") is not None]  # fmt: skip
    rest = (table.get("other") or {}).get("median")
    ratio = fmt.quotient(first[0], rest) if first else None
    if ratio is not None and ratio > _RATIO:
        text += f"; a token at position 0 is {fmt.plain(ratio)} × as long as an ordinary one (medians)"
    layers = [fmt.layer_label(hook) for hook in found]
    total = len(norms.get("hooks") or [])
    return f"{text}. Layers with sinks: {', '.join(layers)} of {total}." if total > 1 else f"{text}."


def _saes(runs: Sequence[Named]) -> str:
    if not runs:
        return ""
    ns = [(run.get("metrics") or {}).get("ns") or {} for _, run in runs]
    l0 = [value["l0"] for value in ns if value.get("l0") is not None]
    fvu = [value["fvu_p0"] for value in ns if value.get("fvu_p0") is not None]
    hooks = sorted({str(run.get("hook")) for _, run in runs})
    text = f"{fmt.count(len(runs))} SAE{'s' if len(runs) > 1 else ''} at {', '.join(hooks)}"
    if l0 and fvu:
        text += f": on ordinary tokens L0 {fmt.span(min(l0), max(l0))}, FVU {fmt.span(min(fvu), max(fvu))}"
    return f"{text}."


def _gap(runs: Sequence[Named]) -> str:
    gaps = []
    for name, run in runs:
        everywhere, ordinary = (
            ((run.get("metrics") or {}).get(scope) or {}).get("explained_variance") for scope in ("all", "ns")
        )
        if everywhere is not None and ordinary is not None:
            gaps.append((everywhere - ordinary, name, everywhere, ordinary))
    # An SAE that reconstructs nothing would show the largest gap and say the least.
    gaps = [gap for gap in gaps if gap[3] >= 0.5] or gaps
    if not gaps or max(gaps)[0] < _GAP:
        return ""
    _, name, everywhere, ordinary = max(gaps)
    return (
        f"Sinks flatter explained variance: {name} reads {fmt.plain(everywhere)} on all tokens and "
        f"{fmt.plain(ordinary)} without sinks."
    )


def _bias(runs: Sequence[Named]) -> str:
    """Between which SAEs the share of the loss that the longest ordinary tokens have lies."""
    found = []
    for name, run in runs:
        bins = (run.get("metrics") or {}).get("bins") or []
        low, high = ((bins[place] or {}).get("bias_ratio") if bins else None for place in (0, -1))
        if low and high:
            found.append((high / low, name, low, high))
    if not found:
        return ""
    least, most = min(found), max(found)
    sentences = []
    for value, name, low, high in dict.fromkeys((least, most)):
        voice = "as loud as" if 0.95 <= value <= 1 / 0.95 else f"{fmt.plain(value)} × as loud as"
        sentences.append(
            f"{name} hears its longest ordinary tokens {voice} its shortest (bias {fmt.plain(high)} and "
            f"{fmt.plain(low)})"
        )
    return f"In the loss, {'; '.join(sentences)}."


def _top(top_norms: Sequence[Named]) -> str:
    found = []
    for name, document in top_norms:
        top = (document.get("groups") or {}).get("top") or {}
        if top.get("l1_share") is not None and top.get("loss_share") is not None:
            found.append((top["loss_share"], name, top, document))
    if not found:
        return ""
    _, name, top, document = max(found, key=lambda one: one[0])
    return (
        f"The top {fmt.plain_percent(document.get('top'))} of tokens by norm cost {name} the most: they take "
        f"{fmt.plain_percent(top['l1_share'])} of its L1 and {fmt.plain_percent(top['loss_share'])} of its "
        f"squared-error loss."
    )


def _behaviour(evaluations: Sequence[Named]) -> str:
    found = [(value, name, document) for name, document in evaluations
             if (value := behaviour(document, "delta_ce_ns")) is not None]  # fmt: skip
    if not found:
        return ""
    value, name, document = min(found, key=lambda one: one[0])
    everywhere = behaviour(document, "delta_ce_all")
    beside = "" if everywhere is None else f" ({fmt.plain(everywhere)} with sinks replaced too)"
    most = f", the least of {len(found)} evaluated SAEs" if len(found) > 1 else ""
    return f"Spliced into the model at non-sinks, {name} costs {fmt.plain(value)} nats{beside}{most}."

"""run.json as a terminal table: one row per SAE, sinks and ordinary tokens side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.report import format as fmt
from nsae_cli.report.layout import Column, WideTable

#: Options that are worth a column only where they differ between the rows.
_VARYING = (
    ("l1_norm", "l1-norm"),
    ("row_weights", "row weights"),
    ("decoder", "decoder"),
    ("sparsity", "sparsity"),
    ("alpha", "α"),
    ("k", "k"),
    ("bandwidth", "bandwidth"),
    ("alpha_scale", "α scale"),
    ("noise", "noise"),
    ("d_sae", "d_sae"),
    ("expansion_factor", "expansion"),
    ("sinks", "sinks"),
    ("lr", "lr"),
    ("tokens", "tokens"),
    ("seed", "seed"),
)


def train_table(
    runs: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None, source: Mapping[str, Any] | None = None
) -> RenderableType:
    """One row per trained SAE.

    Args:
        runs: run.json of each SAE.
        labels: the name of each SAE. What all names have in common up to a ``/`` goes to the title.
        source: where `context_size`, `packing`, `bos` of the activations are to be found (manifest or norms.json).
    """
    if not runs:
        return Text("no trained SAE")
    shared, names = _split(labels)
    keys = [Column("name", names)] if names else []
    layers = [fmt.layer_of(run.get("hook")) for run in runs]
    keys.append(Column("layer", [fmt.MISSING if layer is None else str(layer) for layer in layers]))
    keys += [Column(heading, [_plain(value) for value in values]) for heading, values in varying_options(runs)]
    groups = [
        [Column("L0\nns", _metric(runs, "ns", "l0")), *_targets(runs), Column("\nsinks", _metric(runs, "sinks", "l0"))],
        [Column("FVU\nns", _metric(runs, "ns", "fvu_p0"))],
        [Column("EV\nall", _metric(runs, "all", "explained_variance")),
         Column("\nns", _metric(runs, "ns", "explained_variance"))],
        [Column("MRE\nsinks", _metric(runs, "sinks", "mre"))],
        [Column("shrink\nγ ns", _metric(runs, "ns", "shrinkage"))],
        [Column("\ndead", [fmt.percent(_value(run, "all", "dead_fraction")) for run in runs])],
        [Column("bias\nbin 0", [fmt.number(_bin_value(run, 0, "bias_ratio")) for run in runs]),
         Column("\nbin 9", [fmt.number(_bin_value(run, -1, "bias_ratio")) for run in runs]),
         Column("\nsinks", _metric(runs, "sinks", "bias_ratio"))],
    ]  # fmt: skip
    note = (
        "Held-out tokens; ns = non-sink. FVU: unexplained share of the variance; EV = 1 − FVU; MRE: mean ‖x̂−x‖²/‖x‖²; "
        "γ: 1 = no shrinkage; dead: share of features silent on these tokens; bias: share of the loss for errors ÷ "
        "share of tokens, in the lowest and the highest norm bin and on sinks (1 = every token counts alike)."
    )
    if any((run.get("l0_target") or {}).get("within") is False for run in runs):
        note += " !: L0 is more than 2 % off its target."
    extra = [fmt.source_line(source)] if source is not None else []
    inputs = list(dict.fromkeys(text for run in runs if (text := fmt.trained_on(run))))
    tokens = {_value(run, "all", "tokens") for run in runs}
    if len(tokens) == 1 and (held_out := tokens.pop()) is not None:
        extra.insert(0, f"{fmt.count(held_out)} held-out tokens")
    if inputs:
        extra.insert(0, ", ".join(inputs))
    title = " ".join(part for part in ("Trained SAEs" if len(runs) > 1 else "Trained SAE", shared) if part)
    table = WideTable(keys, groups, title=title, note=note, repeated=1 if names else None)
    return Group(table, Text(" · ".join(extra), style="dim")) if extra else table


def varying_options(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(name, value per run) of activation and ``--l2-norm``, then of every option in which the runs differ."""
    found = [("act", _option(runs, "act")), ("l2-norm", _option(runs, "l2_norm"))]
    for key, heading in _VARYING:
        values = _option(runs, key)
        if len({_plain(value) for value in values}) > 1 and not (key == "decoder" and _usual_decoders(runs)):
            found.append((heading, values))
    return found


def _split(labels: Sequence[str] | None) -> tuple[str, list[str]]:
    """The folder that all names share, and the rest of each; one name is all shared."""
    if not labels:
        return "", []
    if len(labels) == 1:
        return labels[0], []
    folders = {label.rpartition("/")[0] for label in labels}
    if len(folders) > 1 or "" in folders:
        return "", list(labels)
    return folders.pop(), [label.rpartition("/")[2] for label in labels]


def _targets(runs: Sequence[Mapping[str, Any]]) -> list[Column]:
    """What L0 was to be, beside what it is; marked where an SAE has missed it."""
    targets = [run.get("l0_target") for run in runs]
    if not any(targets):
        return []
    shown = [
        fmt.MISSING if not target else f"{target['target']:g}" + ("!" if target["within"] is False else "")
        for target in targets
    ]
    return [Column("\ntarget", shown)]


def _usual_decoders(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every decoder is the default of its activation, so that a column would say nothing new."""
    usual = {("tanh-relu", "free"), *((act, "unit") for act in ("relu", "topk", "batchtopk", "jumprelu"))}
    return set(zip(_option(runs, "act"), _option(runs, "decoder"), strict=True)) <= usual


def _option(runs: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [(run.get("config") or {}).get(key, run.get(key) if key in ("d_sae", "alpha") else None) for run in runs]


def _plain(value: Any) -> str:
    if value is None:
        return fmt.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return fmt.count(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _value(run: Mapping[str, Any], scope: str, key: str) -> Any:
    return ((run.get("metrics") or {}).get(scope) or {}).get(key)


def _bin_value(run: Mapping[str, Any], place: int, key: str) -> Any:
    bins = (run.get("metrics") or {}).get("bins") or []
    return (bins[place] or {}).get(key) if bins else None


def _metric(runs: Sequence[Mapping[str, Any]], scope: str, key: str) -> list[str]:
    return [fmt.number(_value(run, scope, key)) for run in runs]

"""P7: sinks dominate the decoder's gradient at first, and stop doing so once they are fitted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nsae_cli.analysis.comparison import Comparison
from nsae_cli.analysis.comparison_cells import Group, Sae
from nsae_cli.analysis.comparison_statistics import t_interval
from nsae_cli.analysis.prediction_verdicts import (
    Clause,
    Prediction,
    every,
    lies_within,
    shown,
    shown_interval,
    shown_range,
)
from nsae_cli.errors import NsaeError
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.data_files import read_data_file
from nsae_cli.store.profile import profile_hook
from nsae_cli.store.sae_folder import LOG
from nsae_cli.store.seal import is_sealed
from nsae_cli.store.shards import open_activations

#: The first logged step stands for step 0 if it is among this share of the steps: warm-up has hardly begun.
_FIRST_SHARE = 0.01
#: "A few thousand steps", and the share that sinks' gradients are to have fallen below by then.
_WITHIN_STEPS, _FALLEN = 5000, 0.05


@dataclass(frozen=True)
class _Logged:
    """One line of metrics.jsonl.

    Attributes:
        step: 1-based.
        share: sinks' share of the summed gradient norms of W_dec.
        tokens: sinks' share of the batch's rows; None where it was not logged.
    """

    step: int
    share: float
    tokens: float | None


@dataclass(frozen=True)
class _MeanSquares:
    """Mean of ‖x‖² over sinks and over other training rows of a hook, and the sinks' share of those rows."""

    sinks: float
    others: float
    tokens: float

    def share(self, tokens: float | None) -> float:
        """Sinks' share of Σ‖x‖² in a batch of which they are this share; in the whole store for None."""
        part = self.tokens if tokens is None else tokens
        return part * self.sinks / (part * self.sinks + (1 - part) * self.others)


def gradients_of_sinks(comparison: Comparison) -> Prediction:
    """P7: at p = 0 sinks' grad_share of W_dec starts as their share of Σ‖x‖² and falls below 5 %."""
    prediction = Prediction(
        "P7",
        "at p=0 the sinks' share of the decoder's gradient norms equals their share of Σ‖x‖² at step 0 within 15 %, "
        "and falls below 5 % within a few thousand steps",
    )
    found = False
    for group in comparison.groups:
        if group.altered or group.sinks != "keep":
            continue
        for row in group.rows:
            if row.arm.l2_norm != "none" or row.arm.rows != "plain" or row.arm.options:
                continue
            logs = {sae: lines for sae in row.by_seed.values() if (lines := _read_log(sae)) and _has_sinks(sae)}
            if not logs:
                continue
            found = True
            where = f"{row.arm.name}, L0 {row.level.label} ({group.label})"
            _at_first(prediction, group, where, logs)
            _later(prediction, where, logs)
    if not found:
        prediction.lacks("grad_share of W_dec in metrics.jsonl of p=0 SAEs with sinks kept, on a hook with sinks")
    return prediction


def _has_sinks(sae: Sae) -> bool:
    return bool((sae.run.get("sinks") or {}).get("total"))


def _read_log(sae: Sae) -> list[_Logged]:
    """The lines that have the sinks' share of W_dec's gradient; empty where there is no log that can be read.

    Raises:
        ArtifactError: it is not the log that run.json names.
    """
    log = sae.folder / LOG
    if not log.is_file() and not is_sealed(sae.run):
        return []
    found = []
    content = read_data_file(log, sae.run)
    try:
        for line in content.decode("utf-8").splitlines():
            record = json.loads(line)
            share = _sinks_entry((record.get("grad_share") or {}).get("W_dec"))
            if share is not None:
                found.append(_Logged(int(record["step"]), share, _token_share(record)))
    except ValueError:
        return []
    return found


def _sinks_entry(groups: Any) -> float | None:
    """The sinks' value of {sinks, b0, …}, or of a list with sinks first."""
    value = groups.get("sinks") if isinstance(groups, Mapping) else groups[0] if isinstance(groups, list) else None
    return float(value) if isinstance(value, (int, float)) else None


def _token_share(record: Mapping[str, Any]) -> float | None:
    """bias_ratio is the share of the loss ÷ the share of tokens."""
    loss, ratio = _sinks_entry(record.get("loss_share")), _sinks_entry(record.get("bias_ratio"))
    return None if loss is None or not ratio else loss / ratio


def _at_first(prediction: Prediction, group: Group, where: str, logs: Mapping[Sae, list[_Logged]]) -> None:
    store = next((sae.store for sae in logs if sae.store is not None), None)
    squares = None if store is None else _mean_squares(store, group.hook)
    if squares is None:
        prediction.lacks(f"the store {group.data}, for the sinks' share of Σ‖x‖²")
        return
    first = [lines[0] for sae, lines in logs.items() if lines[0].step <= max(1, _FIRST_SHARE * _steps(sae, lines))]
    if not first:
        prediction.lacks("grad_share logged at the beginning of training")
        return
    expected = [squares.share(line.tokens) for line in first]
    relative = [line.share / wanted - 1 for line, wanted in zip(first, expected, strict=True)]
    interval = t_interval(relative)
    percent = None if interval is None else (100 * interval[0], 100 * interval[1])
    share = float(np.mean([line.share for line in first]))
    text = (
        f"{where}: in the batch of step {max(line.step for line in first)} sinks hold "
        f"{shown(float(np.mean(expected)))} of Σ‖x‖² and {shown(share)} of the gradient: off by "
        f"{shown(100 * float(np.mean(relative)))} % {shown_interval(percent)}"
    )
    prediction.clauses.append(Clause(lies_within(interval, -0.15, 0.15), text))


def _later(prediction: Prediction, where: str, logs: Mapping[Sae, list[_Logged]]) -> None:
    ends, steps = [], []
    for lines in logs.values():
        early = [line for line in lines if line.step <= _WITHIN_STEPS]
        tail = early[-max(1, len(early) // 10) :]
        if tail:
            ends.append(float(np.mean([line.share for line in tail])))
            steps.append(tail[-1].step)
    if not ends:
        return
    text = f"{where}: sinks' share of the gradient around step {min(steps):,} is {shown_range(ends)}"
    verdict = every(ends, [end < _FALLEN for end in ends])
    if verdict == "refuted" and min(steps) < _WITHIN_STEPS / 2:
        verdict, text = "undecided", f"{text}, but training ended there"
    prediction.clauses.append(Clause(verdict, text))


def _steps(sae: Sae, lines: Sequence[_Logged]) -> int:
    return int((sae.run.get("counts") or {}).get("steps") or lines[-1].step)


def _mean_squares(store: Path, hook: str) -> _MeanSquares | None:
    """From the training rows; None where the store cannot be read or has no sinks."""
    try:
        activations = open_activations(store)
        profile = profile_hook(activations, hook, Contexts(activations))
    except NsaeError:
        return None
    rows, sinks = profile.training_rows, profile.training_sinks
    if not sinks or rows == sinks:
        return None
    others = profile.mean_power_ns[2]
    total = profile.mean_power[2] * rows
    return _MeanSquares((total - others * (rows - sinks)) / sinks, others, sinks / rows)

"""P7: sinks dominate the decoder's gradient at first, and stop doing so once they are fitted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from nsae_cli.store.profile import profile_hook
from nsae_cli.store.shards import open_activations

#: The first logged step stands for step 0 if it is among this share of the steps: warm-up has hardly begun.
_FIRST_SHARE = 0.01
#: "A few thousand steps", and the share that sinks' gradients are to have fallen below by then.
_WITHIN_STEPS, _FALLEN = 5000, 0.05


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
            logs = {sae: shares for sae in row.by_seed.values() if (shares := _shares(sae)) and _has_sinks(sae)}
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


def _shares(sae: Sae) -> list[tuple[int, float]]:
    """(step, sinks' share of the summed gradient norms of W_dec) of every line of metrics.jsonl that has it."""
    found = []
    try:
        with (sae.folder / "metrics.jsonl").open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                value = _sinks_entry(record.get("grad_share"))
                if value is not None:
                    found.append((int(record["step"]), value))
    except (OSError, ValueError):
        return []
    return found


def _sinks_entry(shares: Any) -> float | None:
    """Sinks' entry of {W_dec: …}, given by group name or as a list with sinks first."""
    part = shares.get("W_dec") if isinstance(shares, Mapping) else None
    value = part.get("sinks") if isinstance(part, Mapping) else part[0] if isinstance(part, Sequence) and part else None
    return float(value) if isinstance(value, (int, float)) else None


def _at_first(prediction: Prediction, group: Group, where: str, logs: Mapping[Sae, list[tuple[int, float]]]) -> None:
    store = next((sae.store for sae in logs if sae.store is not None), None)
    share = None if store is None else _share_of_squares(store, group.hook)
    if share is None:
        prediction.lacks(f"the store {group.data}, for the sinks' share of Σ‖x‖²")
        return
    first = {
        sae: shares[0] for sae, shares in logs.items() if shares[0][0] <= max(1, _FIRST_SHARE * _steps(sae, shares))
    }
    if not first:
        prediction.lacks("grad_share logged at the beginning of training")
        return
    relative = [value / share - 1 for _, value in first.values()]
    interval = t_interval(relative)
    percent = None if interval is None else (100 * interval[0], 100 * interval[1])
    mean = float(np.mean([value for _, value in first.values()]))
    text = (
        f"{where}: sinks hold {shown(share)} of Σ‖x‖² and {shown(mean)} of the "
        f"gradient at step {max(step for step, _ in first.values())}: off by {shown(100 * float(np.mean(relative)))} % "
        f"{shown_interval(percent)}"
    )
    prediction.clauses.append(Clause(lies_within(interval, -0.15, 0.15), text))


def _later(prediction: Prediction, where: str, logs: Mapping[Sae, list[tuple[int, float]]]) -> None:
    ends, steps = [], []
    for shares in logs.values():
        early = [(step, value) for step, value in shares if step <= _WITHIN_STEPS]
        tail = early[-max(1, len(early) // 10) :]
        if tail:
            ends.append(float(np.mean([value for _, value in tail])))
            steps.append(tail[-1][0])
    if not ends:
        return
    text = f"{where}: sinks' share of the gradient around step {min(steps):,} is {shown_range(ends)}"
    verdict = every(ends, [end < _FALLEN for end in ends])
    if verdict == "refuted" and min(steps) < _WITHIN_STEPS / 2:
        verdict, text = "undecided", f"{text}, but training ended there"
    prediction.clauses.append(Clause(verdict, text))


def _steps(sae: Sae, shares: Sequence[tuple[int, float]]) -> int:
    return int((sae.run.get("counts") or {}).get("steps") or shares[-1][0])


def _share_of_squares(store: Path, hook: str) -> float | None:
    """Share of sinks in Σ‖x‖² of the training rows; None where the store cannot be read."""
    try:
        activations = open_activations(store)
        profile = profile_hook(activations, hook, Contexts(activations))
    except NsaeError:
        return None
    rows, sinks = profile.training_rows, profile.training_sinks
    total = profile.mean_power[2] * rows
    return 1 - profile.mean_power_ns[2] * (rows - sinks) / total if total else None

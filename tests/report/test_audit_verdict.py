"""Verdicts of audits with known numbers: each sentence says what they show, and nothing else."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from nsae_cli.report.audit_verdict import audit_verdict
from nsae_cli.report.tables import audit_table


def _scope(**values: Any) -> dict[str, Any]:
    usual = {"tokens": 12_800, "explained_variance": 0.8, "mre": 0.2, "direction_error": 0.18, "magnitude_error": 0.02}
    return {**usual, "shrinkage": 0.93, "norm_ratio": 0.9, **values}


def _part(l0: float | None, rows: int = 128) -> dict[str, Any]:
    spread = {"mean": l0, "median": l0, "p5": l0, "p95": l0}
    return {"rows": rows, "norm_min": 1.0, "norm_max": 2.0, "l0": spread, "l1": spread, "l1_share": 0.17}


def _audit(**changes: Any) -> dict[str, Any]:
    """A GPT-2-like audit: position 0 holds nearly everything."""
    sinks = {"total": 100, "evaluated": 100, "position": 100, "norm": 100, "massive": 0, "only_position0": True}
    number = {"value": 0.5, "low": 0.4, "high": 0.6}
    audit = {
        "sae": {"name": "theirs", "format": "SAELens", "architecture": "standard", "notes": ["a note"]},
        "model": "gpt2",
        "hook": "blocks.8.hook_resid_pre",
        "d_sae": 24_576,
        "options": {"activations": None},
        "rows": {"rows": 12_800, "held_out": False, "corpus": "text", "context_size": 128, "bos": True},
        "sinks": {**sinks, "share_sq": 0.93, "median_position0": 3000.0, "median_elsewhere": 100.0},
        "edges": [float(edge) for edge in range(90, 99)],
        "top": 0.01,
        "metrics": {
            "all": _scope(explained_variance=0.984),
            "ns": _scope(nbi=-0.5, nbi_low=-0.6, nbi_high=-0.4),
            "sinks": _scope(tokens=100, mre=0.0004),
            "bins": [_scope(shrinkage=0.9 + place / 100) for place in range(10)],
        },
        "groups": {"top": _part(9), "other": _part(42, 12_544), "bottom": _part(38)},
        "kinds": {"position0": _part(9), "special": _part(None, 0), "ordinary": _part(42)},
        "nbi_rel": None,
        "behaviour": {
            **dict.fromkeys(("ce_zero", "ce_mean", "kl", "ce_recovered_zero", "ce_recovered_mean"), number),
            "ce_clean": {"value": 3.1, "low": 3.0, "high": 3.2},
            "delta_ce_all": {"value": 0.35, "low": 0.3, "high": 0.4},
            "delta_ce_ns": {"value": 0.12, "low": 0.1, "high": 0.14},
            "bins": None,
            "contexts": 100,
            "tokens": 12_800,
        },
        "warnings": ["a warning"],
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        place: Any = audit
        for parent in parents:
            place = place[parent]
        place[key] = value
    return audit


def verdict(**changes: Any) -> str:
    """The sentences of an audit that differs from the usual one; `a__b` is key b of a."""
    return " ".join(audit_verdict(_audit(**changes)))


def test_a_gpt2_like_sae():
    assert audit_verdict(_audit()) == [
        "Its explained variance 0.984 falls to 0.800 without position 0: it is 0.781 % of the tokens and holds 93 % of "
        "Σ‖x‖².",
        "Position 0: mean relative error 0.0004, against 0.2 of ordinary tokens. The top 1 % by norm uses 9 features a "
        "token (L0), the bottom 1 % 38, the others 42; it holds 17 % of all L1.",
        "Ordinary tokens have a mean relative error of 0.2: 0.18 of direction, 0.02 of length; reconstructions are too "
        "short (γ 0.930).",
        "Among ordinary tokens the relative error falls with the norm (nbi -0.500, 95 % interval -0.600 to -0.400): by "
        "29 % where the norm doubles; γ is 0.900 in the lowest tenth of norms and 0.990 in the highest. Norm goes with "
        "content, so that 0 need not be fair: --reference compares with another SAE.",
        "Spliced in everywhere it costs the model 0.35 nats of cross-entropy (clean 3.1), and 0.12 nats if the sinks "
        "are spared: most of the damage is done at the sinks. Loss recovered: 50 % against zero ablation, 50 % against "
        "mean ablation.",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics__all__explained_variance": 0.7}, "0.700 rises to 0.800 without position 0"),
        ({"metrics__all__explained_variance": 0.805}, "is 0.805 with and 0.800 without position 0"),
        ({"metrics__all__explained_variance": 0.99996}, "0.99996 falls to 0.800"),
        ({"sinks__only_position0": False}, "without the 100 sinks: they are 0.781 % of the tokens and hold 93 %"),
        ({"sinks__only_position0": False, "sinks__evaluated": 1}, "without the one sink: it is <0.01 % of"),
        ({"sinks__evaluated": 0}, "There is no sink at blocks.8.hook_resid_pre: its explained variance 0.800"),
        ({"metrics__sinks__mre": 0.97, "metrics__sinks__norm_ratio": 0.04}, "given up, reconstructions have 4 % of"),
        ({"metrics__ns__shrinkage": 1.01}, "neither too short nor too long (γ 1.01)"),
        ({"metrics__ns__shrinkage": 1.1}, "too long (γ 1.10)"),
        ({"metrics__ns__nbi_high": 0.1}, "shows no trend with the norm (nbi -0.500"),
        ({"metrics__ns__nbi": 1.0, "metrics__ns__nbi_low": 0.9, "metrics__ns__nbi_high": 1.1},
         "rises with the norm (nbi 1.00, 95 % interval 0.900 to 1.10): by 100 % where the norm doubles"),
        ({"nbi_rel": {"reference": "fair", "nbi_rel": -0.3, "low": -0.4, "high": -0.2}},
         "It is less hard on long tokens than fair (nbi_rel -0.300, 95 % interval -0.400 to -0.200)."),
        ({"nbi_rel": {"reference": "fair", "nbi_rel": 0.01, "low": -0.1, "high": 0.1}},
         "the same norm bias, as far as can be told, as fair"),
        ({"behaviour__delta_ce_ns": {"value": 0.35, "low": 0.3, "high": 0.4}}, "as much if the sinks are spared"),
        ({"behaviour__delta_ce_ns": {"value": 0.3, "low": 0.2, "high": 0.4}}, "and 0.3 nats if the sinks are spared. "),
    ],
)  # fmt: skip
def test_each_sentence(changes, said):
    assert said in verdict(**changes)


def test_what_is_undefined_is_left_out():
    text = verdict(metrics__ns__nbi=None, metrics__ns__mre=None, behaviour=None, metrics__all__explained_variance=None)
    assert "None" not in text
    assert "nbi" not in text
    assert "nats" not in text
    assert "–" not in text


@pytest.mark.parametrize("width", [60, 110])
def test_the_table_keeps_its_values_at_any_width(width):
    audit = _audit()
    shown = copy.deepcopy(audit)
    console = Console(width=width, record=True, highlight=False, file=io.StringIO())
    console.print(audit_table({**shown, "verdict": audit_verdict(audit)}))
    text = console.export_text()
    for value in ("theirs", "read as: a note", "0.984", "0.0004", "! a warning", "0.300 to 0.400", "≥ 98"):
        assert value in text, value
    assert all(len(line.rstrip()) <= width for line in text.splitlines())

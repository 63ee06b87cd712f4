"""Which SAEs belong to one arm of a comparison: the same method, at different sparsities, seeds and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsae_cli.report import format as fmt

#: Options that make another method where they differ from the usual value, and how they are shown.
_UNUSUAL = (
    ("l1_norm", "l1-norm", "none"),
    ("noise", "noise", 0.0),
    ("sinks", "sinks", "keep"),
    ("alpha_scale", "α scale", "layer-norm"),
)  # fmt: skip
#: What training does if nothing else is asked for, by activation.
_DECODERS = {"tanh-relu": "free"}
_SPARSITIES = {"jumprelu": "l0"}


@dataclass(frozen=True)
class ParetoPoint:
    """One SAE in the plane of sparsity and error; None where a value is undefined or was not measured."""

    sae: str
    hook: str
    arm: str
    l0: float | None
    fvu: float | None
    mre: float | None
    delta_ce: float | None


#: The errors that are drawn against L0: attribute of a point, name.
ERRORS = (
    ("fvu", "FVU, non-sinks"),
    ("mre", "MRE, non-sinks"),
    ("delta_ce", "ΔCE, spliced at non-sinks (nats)"),
)


def arm_name(run: Mapping[str, Any]) -> str:
    """Activation, ``--l2-norm`` and whatever else of the method is unusual: ``relu, l2 none, sinks drop``."""
    config = run.get("config") or {}
    act = config.get("act")
    if act is None:
        return "other"
    parts = [str(act), f"l2 {config.get('l2_norm', fmt.MISSING)}"]
    usual = (
        *_UNUSUAL,
        ("decoder", "decoder", _DECODERS.get(act, "unit")),
        ("sparsity", "sparsity", _SPARSITIES.get(act, "l1")),
    )
    for key, name, value in usual:
        found = config.get(key, value)
        if found is not None and found != value:
            parts.append(f"{name} {found:g}" if isinstance(found, float) else f"{name} {found}")
    return ", ".join(parts)


def pareto_point(name: str, run: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> ParetoPoint:
    """Reads run.json and, where there is one, eval.json."""
    ns = (run.get("metrics") or {}).get("ns") or {}
    return ParetoPoint(
        sae=name,
        hook=str(run.get("hook") or fmt.MISSING),
        arm=arm_name(run),
        l0=ns.get("l0"),
        fvu=ns.get("fvu_p0"),
        mre=ns.get("mre"),
        delta_ce=behaviour(evaluation, "delta_ce_ns"),
    )


def behaviour(evaluation: Mapping[str, Any] | None, key: str) -> float | None:
    """A number of eval.json's `behaviour`, which may stand there with its interval; None where it is missing."""
    value = ((evaluation or {}).get("behaviour") or {}).get(key)
    if isinstance(value, Mapping):
        value = value.get("value")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def by_arm(points: Sequence[ParetoPoint], error: str) -> dict[str, list[ParetoPoint]]:
    """The points that have L0 and this error, arms by name, each by L0."""
    arms: dict[str, list[ParetoPoint]] = {}
    for point in points:
        if point.l0 is not None and getattr(point, error) is not None:
            arms.setdefault(point.arm, []).append(point)
    return {arm: sorted(arms[arm], key=lambda point: (point.l0, point.sae)) for arm in sorted(arms)}

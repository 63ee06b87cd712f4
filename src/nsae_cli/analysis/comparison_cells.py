"""What is compared: trained SAEs with their evaluations, sorted into groups, arms and seeds.

A *group* is what SAEs must share to be compared at all: the rows they were trained on, the hook, and whether sinks were
kept. An *arm* is everything else in the configuration that varies, apart from what is matched (L0) or paired (seed).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nsae_cli import catalogue
from nsae_cli.sae.objective import DEFAULT_DECODER, DEFAULT_SPARSITY
from nsae_cli.training.options import default_lr

_SELECTING = ("topk", "batchtopk")
_POWER = {"none": "p=0", "norm": "p=1", "sq": "p=2"}
#: Options that name a group, a level or a seed, that an arm's name holds anyway, or that change no result.
_NOT_IN_AN_ARM = frozenset(
    ("hook", "act", "l2_norm", "l1_norm", "decoder", "sparsity", "alpha", "alpha_scale", "row_weights", "target_l0",
     "k", "noise", "sinks", "seed", "deterministic", "probe_every")
)  # fmt: skip


_BELONGS_TO = {"aux_k": _SELECTING, "bandwidth": ("jumprelu",)}
_USUAL_SCALE = "layer-norm"


@dataclass(frozen=True)
class Arm:
    """How an SAE was trained.

    Attributes:
        act: activation.
        l2_norm: as on the command line.
        q: power of the sparsity penalty's divisor.
        rows: what was done to the row weights: plain, mean-one or permuted.
        options: everything else that is not the activation's default or not what most SAEs of the group have, readable.
    """

    act: str
    l2_norm: str
    q: int
    rows: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """``relu p=0``, ``relu p=2 q=1``, ``relu p=0 l1-decoder-norm``, ``topk``, ``relu p=2 permuted``."""
        power = _POWER.get(self.l2_norm, self.l2_norm)
        parts = [self.act] if self.act in _SELECTING and power == "p=0" else [self.act, power]
        if self.q:
            parts.append(f"q={self.q}")
        return " ".join([*parts, *self.options, *([] if self.rows == "plain" else [self.rows])])

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts arms: the activation's plain arms by p and q first."""
        acts = ("relu", "tanh-relu", "jumprelu", "topk", "batchtopk")
        act = acts.index(self.act) if self.act in acts else len(acts)
        power = list(_POWER).index(self.l2_norm) if self.l2_norm in _POWER else len(_POWER)
        return (bool(self.options) or self.rows != "plain", act, power, self.q, self.options, self.rows)


#: relu without other options at p = 0, 1, 2.
NONE, NORM, SQ = (Arm("relu", l2_norm, 0, "plain", ()) for l2_norm in ("none", "norm", "sq"))


@dataclass(frozen=True, eq=False)
class Sae:
    """One trained SAE.

    Attributes:
        name: in the workspace.
        folder: where it is.
        run: its run.json.
        evaluation: its eval.json, or None.
        contexts: per-context sums of the evaluation by name, or None.
        altered: what `nsae alter` did to the store that it was trained on, oldest first; empty for one as collected.
        store: the folder of that store, where it is in the workspace.
    """

    name: str
    folder: Path
    run: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None = None
    contexts: Mapping[str, np.ndarray] | None = None
    altered: Sequence[Mapping[str, Any]] = ()
    store: Path | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The training's options."""
        config: Mapping[str, Any] = self.run["config"]
        return config

    @property
    def seed(self) -> int:
        """Of data order and initialisation."""
        return int(self.config["seed"])

    @property
    def target_l0(self) -> float | None:
        """The non-sink L0 that was asked for: ``--target-l0``, or k."""
        target = self.config.get("target_l0")
        if target is None and self.config["act"] in _SELECTING:
            target = self.config["k"]
        return None if target is None else float(target)

    @property
    def data(self) -> str:
        """The rows that it was trained on, in words."""
        inputs = self.run["inputs"]
        if store := inputs.get("activations"):
            return str(store["name"])
        return f"{inputs['model']['name']} on {(inputs.get('corpus') or {}).get('name')}, live"

    def metric(self, scope: str, key: str) -> float | None:
        """A held-out metric of run.json, of the scopes all, ns, sinks, b0 … b9."""
        metrics = self.run.get("metrics") or {}
        if scope.startswith("b") and scope[1:].isdecimal():
            bins = metrics.get("bins") or []
            part = bins[int(scope[1:])] if int(scope[1:]) < len(bins) else {}
        else:
            part = metrics.get(scope) or {}
        value = (part or {}).get(key)
        return None if value is None else float(value)

    def behaviour(self, key: str) -> float | None:
        """A number of the evaluation's `behaviour`; None where there is no evaluation."""
        value = ((self.evaluation or {}).get("behaviour") or {}).get(key)
        value = value.get("value") if isinstance(value, Mapping) else value
        return None if value is None else float(value)

    def behaviour_by_bin(self) -> list[float | None] | None:
        """ΔCE per spliced row of the ten norm bins and of the sinks; None without an evaluation of bins."""
        behaviour = (self.evaluation or {}).get("behaviour") or {}
        if not behaviour.get("bins"):
            return None
        parts = [*behaviour["bins"], behaviour.get("sinks") or {}]
        return [(part.get("delta_ce") or {}).get("value") for part in parts]

    def value(self, metric: str) -> float | None:
        """A column of the comparison, by its name in `COLUMNS`."""
        if metric == "alpha":
            alpha = self.run.get("alpha")
            return float(alpha) if alpha else None
        scope, key = COLUMNS[metric]
        return self.behaviour(key) if scope == "behaviour" else self.metric(scope, key)


#: Where each column stands: (scope of the metrics, name there).
COLUMNS: dict[str, tuple[str, str]] = {
    "l0_ns": ("ns", "l0"),
    "fvu_p0_ns": ("ns", "fvu_p0"),
    "mre_ns": ("ns", "mre"),
    "nbi": ("ns", "nbi"),
    "shrinkage_low": ("b0", "shrinkage"),
    "shrinkage_high": ("b9", "shrinkage"),
    "mre_sinks": ("sinks", "mre"),
    "norm_ratio_sinks": ("sinks", "norm_ratio"),
    "delta_ce_ns": ("behaviour", "delta_ce_ns"),
    "delta_ce_all": ("behaviour", "delta_ce_all"),
    "dead_fraction": ("all", "dead_fraction"),
    "alpha": ("", "alpha"),
    "fvu_p1_ns": ("ns", "fvu_p1"),
    "fvu_p2_ns": ("ns", "fvu_p2"),
}


@dataclass(frozen=True)
class Level:
    """How sparse SAEs were meant to be: a target for the non-sink L0, or a given α."""

    target_l0: float | None
    alpha: float | None = None

    @property
    def order(self) -> tuple[bool, float]:
        """Targets first, both rising."""
        return self.target_l0 is None, self.target_l0 if self.target_l0 is not None else self.alpha or 0.0

    @property
    def label(self) -> str:
        """``8``, ``α 0.2``."""
        return f"{self.target_l0:g}" if self.target_l0 is not None else f"α {self.alpha:g}"


@dataclass
class Row:
    """The seeds of one arm at one level: a row of the table."""

    arm: Arm
    level: Level
    by_seed: dict[int, Sae] = field(default_factory=dict)

    def values(self, metric: str, seeds: Iterable[int] | None = None) -> list[float]:
        """The values that are defined, by seed."""
        found = [self.by_seed[seed].value(metric) for seed in (sorted(self.by_seed) if seeds is None else seeds)]
        return [value for value in found if value is not None]

    def mean(self, metric: str) -> float | None:
        """Mean over seeds; None where no seed has a value."""
        values = self.values(metric)
        return float(np.mean(values)) if values else None


@dataclass
class Group:
    """SAEs that may be compared: same rows, same hook, sinks treated alike."""

    data: str
    hook: str
    sinks: str
    altered: Sequence[Mapping[str, Any]]
    rows: list[Row]
    #: Of options that differ in the group the value that an arm has unless its name says otherwise.
    usual: Mapping[str, Any] = field(default_factory=dict)
    #: Some number distinguishes two stores of one name; empty where it need not.
    version: str = ""

    @property
    def label(self) -> str:
        """``mini-sink, blocks.2.hook_resid_post, sinks kept``."""
        return f"{self.data}{self.version}, {self.hook}, sinks {'kept' if self.sinks == 'keep' else 'dropped'}"

    def find(self, arm: Arm, level: Level) -> Row | None:
        """The row of an arm at a level."""
        return next((row for row in self.rows if row.arm == arm and row.level == level), None)


def sort_into_groups(saes: Sequence[Sae]) -> list[Group]:
    """Groups in order of data, hook and sinks; rows in order of level and arm.

    Raises:
        UsageError: two SAEs stand for the same arm, level and seed and are not equal.
    """
    sorted_in: dict[tuple[str, str, str], list[Sae]] = {}
    for sae in saes:
        inputs = json.dumps(sae.run["inputs"], sort_keys=True)
        sorted_in.setdefault((inputs, str(sae.run["hook"]), str(sae.config["sinks"])), []).append(sae)
    groups = [_group(members) for members in sorted_in.values()]
    for group in groups:
        alike = [other for other in groups if other.label == group.label]
        for number, other in enumerate(alike[1:], start=2):
            other.version = f" ({number})"
    return sorted(groups, key=lambda group: (bool(group.altered), group.data, group.hook, group.sinks != "keep"))


def _group(members: Sequence[Sae]) -> Group:
    usual = _usual_values(members)
    rows: dict[tuple[Arm, Level], Row] = {}
    for sae in members:
        arm, level = _arm(sae.config, usual), _level(sae)
        row = rows.setdefault((arm, level), Row(arm, level))
        other = row.by_seed.setdefault(sae.seed, sae)
        if other is not sae and other.run.get("weights_sha256") != sae.run.get("weights_sha256"):
            raise catalogue.COMPARED_TWICE(
                f"{other.name} and {sae.name} are both {arm.name} at L0 {level.label} with seed {sae.seed} on "
                f"{sae.data}; compare one of them"
            )
    first = members[0]
    ordered = sorted(rows.values(), key=lambda row: (row.level.order, row.arm.order))
    return Group(first.data, str(first.run["hook"]), str(first.config["sinks"]), first.altered, ordered, usual)


def _level(sae: Sae) -> Level:
    return Level(None, float(sae.config["alpha"])) if sae.target_l0 is None else Level(sae.target_l0)


def _usual_values(members: Sequence[Sae]) -> dict[str, Any]:
    """Options without a place of their own in an arm's name that differ in a group: the value that most SAEs have."""
    names = dict.fromkeys(name for sae in members for name in sae.config if name not in _NOT_IN_AN_ARM)
    usual = {}
    for name in names:
        configs = [sae.config for sae in members if _has(sae.config, name)]
        counted = Counter(json.dumps(_given(config, name)) for config in configs)
        if len(counted) > 1:
            usual[name] = json.loads(min(counted, key=lambda value: (-counted[value], value)))
    return usual


def _has(config: Mapping[str, Any], name: str) -> bool:
    """Whether an option says anything of an SAE: it belongs to the activation, and the nsae that trained knew it."""
    return name in config and config["act"] in _BELONGS_TO.get(name, (config["act"],))


def _arm(config: Mapping[str, Any], usual: Mapping[str, Any]) -> Arm:
    act = str(config["act"])
    options = []
    if config["sparsity"] != DEFAULT_SPARSITY.get(act):
        options.append(str(config["sparsity"]))
    if config["decoder"] != DEFAULT_DECODER.get(act):
        options.append(str(config["decoder"]))
    if config.get("noise"):
        options.append(f"noise={config['noise']:g}")
    if config["alpha_scale"] != _USUAL_SCALE and act not in _SELECTING:
        options.append(f"scale={config['alpha_scale']}")
    for name, value in usual.items():
        if _has(config, name) and _given(config, name) != value:
            options.append(f"{name}={shown_option(name, config[name])}")
    return Arm(
        act,
        str(config["l2_norm"]),
        1 if config["l1_norm"] == "norm" else 0,
        str(config.get("row_weights") or "plain"),
        tuple(options),
    )


def _given(config: Mapping[str, Any], name: str) -> Any:
    """An option's value; None for a learning rate that follows from the width, which says nothing new."""
    value = config.get(name)
    if name == "lr" and value is not None and math.isclose(value, default_lr(config["d_sae"]), rel_tol=1e-6):
        return None
    return value


def shown_option(name: str, value: Any) -> str:
    """An option's value as short as it can be: ``20M``, ``0.001``, ``off`` for null."""
    if name in ("tokens", "buffer", "dead_window") and isinstance(value, int):
        return f"{value / 1e6:g}M" if value % 100_000 == 0 else f"{value / 1e3:g}k" if value % 100 == 0 else str(value)
    return "off" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

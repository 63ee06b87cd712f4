"""The options of `nsae train`, and the SAEs ("cells") that they stand for."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from nsae_cli import catalogue
from nsae_cli.device import DeviceOption
from nsae_cli.kernels.auxk import default_k_aux
from nsae_cli.kernels.options import KernelOption, PrecisionOption
from nsae_cli.sae.objective import DEFAULT_ALPHA, DEFAULT_DECODER, DEFAULT_SPARSITY, refused_combination
from nsae_cli.training.resample import first_resampling
from nsae_cli.training.row_weights import RowWeights
from nsae_cli.training.schedule import probe_interval
from nsae_cli.training.trackers import LogTo
from nsae_cli.values import Fraction, Size, parse_fraction, parse_size, split_list

Act = Literal["relu", "tanh-relu", "topk", "batchtopk", "jumprelu"]
L2Norm = Literal["none", "norm", "sq", "cosine"]
L1Norm = Literal["none", "norm"]
Decoder = Literal["unit", "free", "bounded"]
Sparsity = Literal["l1", "l1-decoder-norm", "tanh", "l0"]
AlphaScale = Literal["layer-norm", "none", "note"]
Sinks = Literal["keep", "drop"]

_Split = BeforeValidator(split_list)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[Size, Field(ge=1)]

DEFAULT_MIN_STEPS = 2000
LR_DECAY = 0.2
#: With a target for L0 the warm-up of α may last so long, as a share of the steps.
LATEST_CONTROL = 0.5
#: k of topk and batchtopk, where there are at least eight times as many features.
DEFAULT_K = 32
#: ε of jumprelu, in scaled units.
DEFAULT_BANDWIDTH = 0.05

_PENALISED = frozenset({"relu", "tanh-relu", "jumprelu"})
_TOP_K = frozenset({"topk", "batchtopk"})
#: Options that belong to some activations only. In a grid they are for the cells of these.
_BELONGS_TO: dict[str, frozenset[str]] = {
    "l1_norm": _PENALISED,
    "sparsity": _PENALISED,
    "alpha": _PENALISED,
    "alpha_scale": _PENALISED,
    "target_l0": _PENALISED,
    "k": _TOP_K,
    "aux_k": _TOP_K,
    "bandwidth": frozenset({"jumprelu"}),
    "resample_dead": _PENALISED,
}


def parse_interval(value: Any) -> Any:
    """``5m``, ``30s``, ``1h`` → "300s"; a number → steps, as an int."""
    text = str(value).strip()
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:].lower())
    try:
        if unit is not None:
            seconds = float(text[:-1]) * unit
            if seconds <= 0:
                raise ValueError
            return f"{seconds:g}s"
        if int(text) < 1:
            raise ValueError
        return int(text)
    except ValueError:
        raise ValueError("expected a time such as 5m or 90s, or a number of steps") from None


def parse_every(value: Any) -> Any:
    """``off`` → None; ``500`` → steps, as an int; ``10%`` or ``0.1`` → a share of the steps, as a float."""
    text = str(value).strip()
    if value is None or text.lower() in ("off", "none", "false"):
        return None
    try:
        if "%" in text or (0 < float(text) < 1):
            share = parse_fraction(text)
            if 0 < share <= 1:
                return float(share)
        elif not isinstance(value, bool) and (steps := parse_size(value)) >= 1:
            return steps
    except ValueError:
        pass
    raise ValueError("expected off, a number of steps such as 500, or a share of the steps such as 10%")


class TrainOptions(BaseModel):
    """Options as given. Those that are lists here span a grid; None stands for a default that depends on others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    act: Annotated[list[Act], _Split] = Field(["relu"], description="activation")
    l2_norm: Annotated[list[L2Norm], _Split] = Field(
        ["none"], description="divide the squared error by 1, ‖x‖ or ‖x‖², or take 2(1 − cos)"
    )
    l1_norm: Annotated[list[L1Norm], _Split] = Field(["none"], description="divide the sparsity penalty by 1 or ‖x‖")
    row_weights: Annotated[list[RowWeights], _Split] = Field(
        ["plain"], description="the weights that l2_norm and l1_norm give to rows: as they are, or a control of them"
    )
    decoder: Annotated[list[Decoder], _Split] | None = Field(None, description="what W_dec's rows may do")
    sparsity: Annotated[list[Sparsity], _Split] | None = Field(None, description="sparsity penalty")
    alpha: Annotated[list[NonNegative], _Split] | None = Field(None, description="sparsity coefficient α")
    alpha_from: str | None = Field(None, min_length=1, description="take α from SAEs that found it for a target L0")
    alpha_scale: Annotated[list[AlphaScale], _Split] = Field(["layer-norm"], description="how β follows from α")
    alpha_warm_up: Fraction = Field(0.2, ge=0, le=1, description="share of the steps over which α rises to its value")
    target_l0: Annotated[list[Positive], _Split] | None = Field(
        None, description="mean L0 of non-sink rows that α is moved to"
    )
    k: Annotated[list[Count], _Split] | None = Field(None, description="active features of a row")
    aux_k: Literal["auto", "off"] | Count = Field("auto", description="dead features that model the error of a row")
    bandwidth: Annotated[list[Positive], _Split] | None = Field(None, description="ε of the thresholds' gradient")
    noise: Annotated[list[NonNegative], _Split] = Field([0.0], description="σ of training noise on pre-activations")
    expansion_factor: Annotated[list[Positive], _Split] | None = Field(None, description="d_sae / d_in")
    d_sae: Annotated[list[Size], _Split] | None = Field(None, description="number of features")
    layers: str | int | list[int | str] | None = Field(None, description="which stored layers")
    tokens: Size | None = Field(None, gt=0, description="rows that each SAE sees, repeats counted")
    batch_size: Size = Field(2048, gt=0, description="rows per step")
    lr: Annotated[list[Positive], _Split] | None = Field(None, description="Adam's learning rate")
    lr_warm_up: Fraction = Field(0.05, ge=0, le=1, description="share of the steps over which lr rises")
    clip: Positive | None = Field(None, description="largest gradient norm, in scaled units")
    input_scale: Literal["auto"] | Positive = Field("auto", description="s of x' = s·x")
    sinks: Annotated[list[Sinks], _Split] = Field(["keep"], description="train on sink rows or not")
    dead_window: Size = Field(262_144, gt=0, description="tokens after which a silent feature counts as dead")
    probe_every: Literal["auto", "off"] | Count = Field("auto", description="steps between probes of the gradient")
    resample_dead: Annotated[int | float | None, BeforeValidator(parse_every)] = Field(
        None, description="every how many steps, or which share of them, dead features get new weights"
    )
    buffer: Size = Field(524_288, gt=0, description="rows that are mixed in memory")
    seed: Annotated[list[Size], _Split] = Field([0], description="of data order, initialisation and noise")
    device: DeviceOption = "auto"
    kernel: KernelOption = Field("auto", description="dense or sparse training steps")
    precision: PrecisionOption = Field("auto", description="of the encoder's product in sparse steps")
    max_memory: Size | None = Field(None, gt=0, description="bytes that weights and mixed rows may take")
    deterministic: bool = False
    checkpoint_every: Annotated[str | int, BeforeValidator(parse_interval)] = "300s"
    log_to: LogTo = Field([], description="trackers that are fed with what metrics.jsonl gets")

    @field_validator("clip", mode="before")
    @classmethod
    def _clip_off(cls, value: Any) -> Any:
        return None if value in ("off", "none") else value


class CellConfig(BaseModel):
    """Everything that determines one SAE's training on a given store; `config` of its run.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hook: str
    act: Act
    l2_norm: L2Norm
    l1_norm: L1Norm
    decoder: Decoder
    sparsity: Sparsity
    alpha: float
    alpha_scale: AlphaScale
    alpha_warm_up: float
    k: int | None
    aux_k: int | None
    bandwidth: float | None
    noise: float
    d_sae: int
    tokens: int
    batch_size: int
    lr: float
    lr_warm_up: float
    lr_decay: float
    clip: float | None
    input_scale: float | Literal["auto"]
    sinks: Sinks
    dead_window: int
    resample_dead: int | None
    buffer: int
    seed: int
    deterministic: bool
    # What later versions added; a run.json from before has none of it.
    probe_every: int | None = None
    target_l0: float | None = None
    row_weights: RowWeights = "plain"

    @property
    def steps(self) -> int:
        """Optimizer steps: floor(tokens / batch)."""
        return self.tokens // self.batch_size


def default_lr(d_sae: int) -> float:
    """2e-4·√(16384 / d_sae)."""
    return float(2e-4 * (16384 / d_sae) ** 0.5)


def expand_cells(options: TrainOptions, hooks: list[str], d_in: int, epoch_rows: int) -> dict[str, CellConfig]:
    """The grid: one configuration per cell, by name (``L6``, ``L6-tanh-relu-sq-seed1``, …).

    Args:
        options: as given.
        hooks: the hooks to train on, in order.
        d_in: width of the activations.
        epoch_rows: training rows of the store, for the default of `tokens`.

    Raises:
        UsageError: a refused combination, an option that belongs to none of the activations, k larger than d_sae,
            tokens for less than one step, or both ways to give the width.
    """
    if options.d_sae is not None and options.expansion_factor is not None:
        raise catalogue.REFUSED_COMBINATION(
            "--d-sae and --expansion-factor both set the number of features; give one of them"
        )
    widths = options.d_sae or [round(factor * d_in) for factor in options.expansion_factor or [8.0]]
    tokens = options.tokens or max(epoch_rows, DEFAULT_MIN_STEPS * options.batch_size)
    problems: dict[str, None] = {}
    if tokens < options.batch_size:
        problems[
            f"--tokens {tokens:,} is less than one batch of {options.batch_size:,} rows; give at least as many"
        ] = None
    if min(widths) < 1:
        option = "--d-sae" if options.d_sae else "--expansion-factor, number of features"
        raise catalogue.OPTION_VALUE(*[*problems, f"{option} {min(widths)}: expected at least 1"])
    problems |= dict.fromkeys(_misplaced(options))
    if options.alpha_from is not None:
        if options.alpha is not None:
            problems["--alpha and --alpha-from both set α; give one of them"] = None
        if not _PENALISED & set(options.act):
            problems[f"--alpha-from: --act {','.join(options.act)} has no α, its L0 is set by --k"] = None
    resample_dead = _resampling_interval(options, tokens // options.batch_size)
    if isinstance(resample_dead, str):
        problems[resample_dead] = None
    by_default: list[Any] = [None]
    axes: dict[str, list[Any]] = {
        "hook": hooks,
        "act": list(options.act),
        "l2_norm": list(options.l2_norm),
        "l1_norm": list(options.l1_norm),
        "row_weights": list(options.row_weights),
        "decoder": list(options.decoder or by_default),
        "sparsity": list(options.sparsity or by_default),
        "alpha": list(options.alpha or by_default),
        "alpha_scale": list(options.alpha_scale),
        "target_l0": list(options.target_l0 or by_default),
        "k": list(options.k or by_default),
        "bandwidth": list(options.bandwidth or by_default),
        "noise": options.noise,
        "d_sae": widths,
        "lr": list(options.lr or by_default),
        "sinks": list(options.sinks),
        "seed": options.seed,
    }
    aux_k = {"auto": default_k_aux(d_in), "off": None}.get(str(options.aux_k), options.aux_k)
    shared = options.model_dump(include=set(CellConfig.model_fields) - set(axes) - {"aux_k", "resample_dead"})
    shared |= {"tokens": tokens, "lr_decay": LR_DECAY, "probe_every": _probe_every(options, tokens)}
    cells: dict[str, CellConfig] = {}
    hook_names = _hook_names(hooks)
    for values in itertools.product(*axes.values()):
        cell = _with_defaults(dict(zip(axes, values, strict=True)) | {"aux_k": aux_k, "resample_dead": resample_dead})
        reason = refused_combination(cell["act"], cell["decoder"], cell["sparsity"], cell["l2_norm"])
        if reason is not None:
            problems[reason] = None
        elif cell["k"] is not None and cell["k"] > cell["d_sae"]:
            problems[f"--k {cell['k']} is more than the {cell['d_sae']} features; give at most as many"] = None
        elif (reason := _impossible_target(cell, options)) is not None:
            problems[reason] = None
        elif not problems:
            config = CellConfig.model_validate(shared | cell)
            name = _cell_name(config, options, hook_names)
            if cells.setdefault(name, config) != config:
                problems[f"two SAEs of this grid would both be named {name}; train them one by one"] = None
    if problems:
        raise catalogue.REFUSED_COMBINATION(*problems)
    return cells


def _probe_every(options: TrainOptions, tokens: int) -> int | None:
    every = options.probe_every
    if isinstance(every, str):
        return probe_interval(tokens // options.batch_size) if every == "auto" else None
    return every


def _misplaced(options: TrainOptions) -> list[str]:
    """What is wrong with options that were given and belong to none of the activations."""
    problems = []
    for name, acts in _BELONGS_TO.items():
        value, default = getattr(options, name), TrainOptions.model_fields[name].default
        if value == default or acts & set(options.act):
            continue
        option, shown = "--" + name.replace("_", "-"), ",".join(map(str, value if isinstance(value, list) else [value]))
        why = "they have no sparsity penalty, their L0 is set by --k" if acts == _PENALISED else "leave it out"
        if name == "resample_dead":
            why = "dead features of these learn through --aux-k"
        owners = ", ".join(act for act in DEFAULT_ALPHA if act in acts)
        problems.append(f"{option} {shown} does not go with --act {','.join(options.act)}, only with {owners}: {why}")
    return problems


def _impossible_target(cell: dict[str, Any], options: TrainOptions) -> str | None:
    """Why α cannot be moved to a cell's target for L0, or None."""
    target = cell["target_l0"]
    if target is None:
        return None
    if target >= cell["d_sae"]:
        return f"--target-l0 {target:g}: expected less than the {cell['d_sae']} features"
    if cell["alpha"] == 0:
        return "--alpha 0 with --target-l0: α is moved by factors from --alpha on; give a number above 0, or none"
    if options.alpha_warm_up > LATEST_CONTROL:
        return (
            f"--alpha-warm-up {options.alpha_warm_up:g} with --target-l0: α is moved once it has warmed up, and needs "
            f"time; give at most {LATEST_CONTROL:g}"
        )
    return None


def _resampling_interval(options: TrainOptions, steps: int) -> int | str | None:
    """Every how many of the steps dead features are resampled; None for never; a text if it could never happen."""
    every = options.resample_dead
    if every is None:
        return None
    interval = every if isinstance(every, int) else max(1, round(every * steps))
    if first_resampling(steps, LR_DECAY, interval, options.batch_size, options.dead_window) is not None:
        return interval
    shown = f"{100 * every:g}%" if isinstance(every, float) else f"{every:,}"
    window = -(-options.dead_window // options.batch_size)
    return (
        f"--resample-dead {shown} would never resample: of {steps:,} steps the last {LR_DECAY:.0%} are without, and a "
        f"--dead-window of {options.dead_window:,} tokens is {window:,} steps; lower one of them or give more --tokens"
    )


def _with_defaults(cell: dict[str, Any]) -> dict[str, Any]:
    """Fills in what depends on the activation or the width, and sets aside what does not belong to the activation."""
    act, width = cell["act"], cell["d_sae"]
    foreign = {"l1_norm": "none", "alpha_scale": "layer-norm"}
    cell = cell | {name: foreign.get(name) for name, acts in _BELONGS_TO.items() if act not in acts}
    defaults: dict[str, Any] = {
        "decoder": DEFAULT_DECODER[act],
        "sparsity": DEFAULT_SPARSITY[act],
        "alpha": DEFAULT_ALPHA[act],
        "lr": default_lr(width),
    }
    if act in _TOP_K:
        defaults["k"] = min(DEFAULT_K, max(1, width // 8))
    if act == "jumprelu":
        defaults["bandwidth"] = DEFAULT_BANDWIDTH
    return cell | {key: default for key, default in defaults.items() if cell[key] is None}


def _cell_name(cell: CellConfig, options: TrainOptions, hook_names: dict[str, str]) -> str:
    """``L6`` plus the options that were given as lists."""
    parts = [hook_names[cell.hook]]
    bare = ("act", "l2_norm", "row_weights", "decoder", "sparsity", "alpha_scale", "sinks")
    prefixed = {"l1_norm": "l1", "alpha": "alpha", "k": "k", "bandwidth": "bandwidth", "noise": "noise", "lr": "lr"}
    prefixed |= {"seed": "seed", "target_l0": "l0_"}
    for field in TrainOptions.model_fields:
        value = getattr(options, field)
        if field in ("layers", "log_to") or not isinstance(value, list) or len(value) < 2:
            continue
        if cell.act not in _BELONGS_TO.get(field, cell.act):
            continue
        if field in bare:
            parts.append(str(getattr(cell, field)))
        elif field in prefixed:
            parts.append(f"{prefixed[field]}{_number_text(getattr(cell, field))}")
        else:
            parts.append(f"f{cell.d_sae}")
    return "-".join(parts)


def _number_text(value: Any) -> str:
    """``0.1`` or ``1e-05``: short where that is exact, so that two values never share a name."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _hook_names(hooks: list[str]) -> dict[str, str]:
    """``L6`` for each hook; the hook's own name, made fit for a folder, where that is not unique or has no layer."""
    layers = Counter(layer_of(hook) for hook in hooks)
    names = {}
    for hook in hooks:
        layer = layer_of(hook)
        unique = layer is not None and layers[layer] == 1
        names[hook] = f"L{layer}" if unique else re.sub(r"[^A-Za-z0-9_.]+", "_", hook).lstrip(".") or "hook"
    return names


def layer_of(hook: str) -> int | None:
    """6 of ``blocks.6.hook_resid_post``; None for a hook of another form."""
    parts = hook.split(".")
    return int(parts[1]) if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdecimal() else None

"""`--target-l0`: α is moved while training until non-sink rows have the wanted mean number of active features."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.groups import SINKS
from nsae_cli.store.batches import HookRows
from nsae_cli.training.parallel.group import ONE, Group

#: A saved SAE whose held-out L0 is farther than this from its target, as a share, has missed it.
TOLERANCE = 0.02
#: α stays within this factor of where it started: a target that cannot be met must not end in an overflow.
ALPHA_RANGE = 1e4
#: With noise on pre-activations the noise-free L0 costs a product of its own, so it is taken every so many steps.
NOISE_FREE_EVERY = 4
#: Training rows are compared with held-out rows every 100th part of a run, from this share of the steps on: the
#: control has begun by then (`options.LATEST_CONTROL`).
_COMPARISONS, _COMPARED_FROM = 100, 0.5
#: Held-out rows of one comparison, about; the next one takes others.
_COMPARED_ROWS = 4096

#: Weight of the newest comparison, once there were as many; the first few are not believed yet.
_NEWEST, _FEW = 1 / 16, 8
#: Lags, in steps of full learning rate, of the averages of log L0 whose difference tells its slope.
_LAGS = (10, 40)
_TINY_L0 = 1e-6


@dataclass(frozen=True)
class Gains:
    """How the control answers to an error of log L0.

    Attributes:
        integral_steps: T, in steps of full learning rate.
        most: errors larger than this count as this large.
        ahead: H, how far ahead the integral looks, in steps of full learning rate.
    """

    integral_steps: float
    most: float
    ahead: float


#: L0 answers to α within about ten steps where α acts on acts; thresholds have to travel, at their learning rate.
_ACTS = Gains(integral_steps=10, most=0.1, ahead=30)
_THRESHOLDS = Gains(integral_steps=100, most=1.0, ahead=100)


def gains_of(act: str) -> Gains:
    """The gains for an activation, by how fast its L0 follows α."""
    return _THRESHOLDS if act == "jumprelu" else _ACTS


class L0Control:
    """A proportional-integral control of log α, fed with the mean L0 of each training batch's non-sink rows.

    With ε = log(L0 / target) + shift and its slope ε′ in a step of full learning rate, each step sets

        log α_found += (lr / peak lr)·clip(ε + H·ε′) / T,        log α = log α_found + clip(ε),

    clip to ±`most`. log L0 answers to log α with a slope near −1 (relu, tanh-relu), so a proportional gain of 1 undoes
    an error at once, and the integral removes what stays. L0 can take hundreds of steps to come down from half of all
    features; an integral of ε alone would drive α far beyond its place meanwhile (a hundredfold, with half of the
    features dead, was seen), so it asks where L0 will be H steps ahead. The noise of single batches needs no filter in
    ε: SAE and integral average over more steps than one. Weights move by about lr a step, so steps are counted as
    steps of full learning rate: while lr decays, SAE and control slow down together, and what lr no longer lets the SAE
    follow does not accumulate in α.

    α's warm-up comes first: the control begins where the warm-up ends. L0 falls from half of all features during it,
    and an error taken then would say nothing about α.

    A finite set of held-out rows has another mean L0 than the training rows, by chance (a standard error of 1.5 % with
    117 contexts) and by overfitting. `shift` is the log of held-out over training L0, an average over many pairs taken
    with the same weights, so that the SAE meets its target on the rows on which it will be judged and compared. That
    number is all that held-out rows tell training.

    Args:
        target: wanted mean L0.
        alpha: α to start from, above 0.
        gains: see `gains_of`.
    """

    def __init__(self, target: float, alpha: float, gains: Gains) -> None:
        self._log_target, self._gains = math.log(target), gains
        self._low, self._high = (math.log(alpha) + side * math.log(ALPHA_RANGE) for side in (-1, 1))
        self._log_found = math.log(alpha)
        self._error = 0.0
        self._averages = [math.nan, math.nan]
        self._means = [math.nan, math.nan]
        self._compared = 0

    @property
    def alpha(self) -> float:
        """α of the next step at full warm-up."""
        return math.exp(self._within(self._log_found + self._error))

    @property
    def found(self) -> float:
        """α without the answer to the newest batch: what α has settled on."""
        return math.exp(self._log_found)

    def update(self, l0: float, lr_share: float) -> None:
        """Adds a batch after α's warm-up.

        Args:
            l0: noise-free mean L0 of its non-sink rows.
            lr_share: this step's learning rate ÷ the peak (times the steps that the batch stands for).
        """
        log_l0 = math.log(max(l0, _TINY_L0))
        error = log_l0 - self._log_target + self._shift
        slope = self._slope(log_l0, lr_share)
        self._error = self._clipped(error)
        expected = self._clipped(error + self._gains.ahead * slope)
        self._log_found = self._within(self._log_found + lr_share * expected / self._gains.integral_steps)

    def _slope(self, log_l0: float, lr_share: float) -> float:
        """What log L0 changes by in a step of full learning rate: two running averages that lag differently."""
        for place, lag in enumerate(_LAGS):
            average = self._averages[place]
            moved = average + min(1.0, lr_share / lag) * (log_l0 - average)
            self._averages[place] = log_l0 if math.isnan(average) else moved
        return (self._averages[0] - self._averages[1]) / (_LAGS[1] - _LAGS[0])

    def _clipped(self, error: float) -> float:
        return max(-self._gains.most, min(self._gains.most, error))

    def compare(self, l0: float, held_out_l0: float) -> None:
        """Adds a pair: mean L0 of a batch's and of held-out non-sink rows at the same weights. NaN: no such rows."""
        if math.isnan(l0) or math.isnan(held_out_l0):
            return
        self._compared += 1
        weight = max(_NEWEST, 1 / self._compared)
        for place, value in enumerate((l0, held_out_l0)):
            mean = self._means[place]
            self._means[place] = value if self._compared == 1 else mean + weight * (value - mean)

    @property
    def _shift(self) -> float:
        trained, held_out = self._means
        return math.log(held_out / trained) if self._compared >= _FEW and min(trained, held_out) > 0 else 0.0

    def _within(self, log_alpha: float) -> float:
        return max(self._low, min(self._high, log_alpha))

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        values = (self._log_found, self._error, *self._averages, *self._means, self._compared)
        return {"l0_control": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from `state()`."""
        self._log_found, self._error, *averages, compared = state["l0_control"].tolist()
        self._averages, self._means, self._compared = averages[:2], averages[2:], int(compared)


def noise_free_l0(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Number of pre_acts above 0, or above their thresholds, per row [B] of x [B, d_in] in units of the weights."""
    pre_acts = torch.addmm(weights.b_enc, x, weights.W_enc)
    least = 0.0 if weights.log_threshold is None else weights.log_threshold.exp()
    return (pre_acts > least).sum(dim=1)


def mean_l0(l0: torch.Tensor, rows: HookRows, data: Group = ONE) -> float:
    """Mean of `l0` [B] over the rows that are neither sinks nor zero, of all processes; NaN if there are none."""
    counted = ~rows.zero & (rows.group != SINKS)
    sums = torch.stack([torch.where(counted, l0, 0).sum(dtype=torch.float64), counted.sum().double()])
    data.sum_(sums)
    return float(sums[0] / sums[1])


def is_compared(step: int, steps: int) -> bool:
    """Whether the batch of 0-based `step` is compared with held-out rows."""
    return step >= _COMPARED_FROM * steps and step % max(1, steps // _COMPARISONS) == 0


def rows_to_compare(rows: HookRows, step: int, steps: int) -> HookRows:
    """The part of the held-out rows that is compared at `step`: about as many each time, in the end all of them."""
    parts = max(1, round(len(rows.norm) / _COMPARED_ROWS))
    return rows.select(slice(step // max(1, steps // _COMPARISONS) % parts, None, parts))


def sample_rows(parts: Iterable[HookRows], rows: int, most: int) -> HookRows | None:
    """At most about `most` of `rows` rows, evenly spread so that every context has its share; None if there are none.

    Args:
        parts: the rows, in order.
        rows: how many there are.
        most: how many are to be kept in memory.
    """
    stride, begun = max(1, -(-rows // most)), 0
    kept: list[HookRows] = []
    for part in parts:
        kept.append(part.select(slice((-begun) % stride, None, stride)).copy())
        begun += len(part.norm)
    found = HookRows.cat(kept) if kept else None
    return found if found is not None and len(found.norm) else None

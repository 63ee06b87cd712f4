"""Dead features begin anew where the reconstruction fails (Bricken et al. 2023, Towards Monosemanticity, appendix).

Every `every` steps, features that were silent over the whole `--dead-window` get new weights, after the step's update,
from rows of its batch with x̂ and the error of the pass before the update. Adapted from the paper's recipe:

- A row is drawn with a probability ∝ (w·D)², the square of what the loss charges for its error. Rows are drawn without
  replacement, so that no two features begin alike; where there are fewer rows than features the others wait.
- Only non-sink rows are drawn from, if there are any. A sink's error is up to a thousand times that of an ordinary row
  at p = 0 while it is not fitted yet, and its square a million times: all features would begin as sink features,
  although sinks need but few.
- u is the direction in which the loss wants x̂ to move: −∂D/∂x̂ of the row, normalised; (x − x̂)/‖x − x̂‖ of the squared
  error.
- W_dec,j = u·ν: ν = 1 of unit rows, else the mean norm of the living features' rows (at most 1 of bounded ones).
- W_enc,j = u·0.2·m, m the mean norm of the living features' columns.
- b_enc,j = −W_enc,j·x̂ (+ θ_j): what is explained of the row already does not count, so its pre-activation is
  W_enc,j·(x − x̂) > 0, above the threshold by that where there is one. The paper sets b_enc = 0 with b_dec subtracted
  from the input, which is −W_enc,j·b_dec here; this is the same with x̂ in place of the reconstruction of nothing, and
  on for the row it was made from, always.
- tanh-relu's acts are bounded, so both numbers have to fit the residual: |W_enc,j| is cut where the row's
  pre-activation would exceed 0.5, beyond which tanh is no longer near linear and learns slowly; and ν is cut to
  ‖x − x̂‖, so that the feature cannot do more than fill the gap.
- θ_j of jumprelu starts at its first value again.
- Adam's moments of all these numbers are 0, and the features count as having fired now: the earliest that one of them
  is drawn for again is a whole window later.

Nothing happens in the last part of a training, where the learning rate falls: what begins there has no time to learn.
Draws are a function of (seed, step); the rest follows from weights, batch and window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.types import StepResult, Weights
from nsae_cli.metrics.deadness import FiredWindow
from nsae_cli.metrics.groups import SINKS
from nsae_cli.sae.init import INITIAL_THRESHOLD
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows, stable_seed
from nsae_cli.training.parallel.ranks import ALONE, Ranks

#: Length of a new encoder column, as a share of the living ones' mean.
ENCODER_SHARE = 0.2
#: Largest pre-activation of tanh-relu on the row that a feature is made from.
_MOST_PRE_ACT = 0.5


def last_step(steps: int, decay: float) -> int:
    """Number of steps before the learning rate falls: the last after which anything is resampled."""
    return math.floor(steps * (1 - decay) + 1e-9)


def first_resampling(steps: int, decay: float, every: int, batch_size: int, dead_window: int) -> int | None:
    """Number of steps before the first resampling that can find a dead feature; None if there is none."""
    full = -(-dead_window // batch_size)  # steps until a feature can have been silent over the whole window
    first = -(-max(full, 1) // every) * every
    return first if first <= last_step(steps, decay) else None


@dataclass
class Resampler:
    """Gives dead features of one SAE new weights.

    Args:
        objective: the loss.
        weights: changed in place.
        decoder: ``unit``, ``free`` or ``bounded``.
        adam: of these weights.
        window: says who is dead.
        seed: of the draws.
        ranks: the processes that train the SAE. All look at the whole batch and at all features, and so agree; each
            writes what is its own.
    """

    objective: Objective
    weights: Weights
    decoder: str
    adam: Adam
    window: FiredWindow
    seed: int
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self._count = torch.zeros((), dtype=torch.int64)

    @property
    def count(self) -> int:
        """How many features were resampled so far; one that was twice counts twice."""
        return int(self._count)

    @torch.no_grad()
    def resample(
        self, rows: HookRows, x: torch.Tensor, result: StepResult, error_weight: torch.Tensor, step: int
    ) -> None:
        """Resamples what is dead.

        Args:
            rows: the batch, or this process's part of it.
            x: its scaled rows [B, d].
            result: of the step on it.
            error_weight: w [B].
            step: 0-based number of the step; its update has been made.
        """
        dead = self.ranks.features.cat(self.window.silent())
        features = dead.nonzero()[:, 0]
        if not len(features):
            return
        rows, cat = self.ranks.whole_batch(rows), self.ranks.data.cat
        chosen = self._draw(len(features), rows, cat(result.distance), cat(error_weight), step).to(x.device)
        features = features[: len(chosen)]
        if not len(features):
            return
        own = self._rebuild(features, ~dead, cat(x)[chosen], cat(result.error)[chosen])
        self.adam.forget(own)
        self.window.revive(own)
        self._count += len(features)

    def _draw(
        self, most: int, rows: HookRows, distance: torch.Tensor, error_weight: torch.Tensor, step: int
    ) -> torch.Tensor:
        """At most `most` different rows with an error, int64 on the CPU, in the order in which they are drawn."""
        # Float64 on the CPU: the draw is the same on every device, but for errors that differ by rounding.
        chance = (error_weight.double() * distance.double()).square().cpu()
        group, zero = rows.group.cpu(), rows.zero.cpu()
        ordinary = (group != SINKS) & ~zero
        if bool(ordinary.any()):
            chance = torch.where(ordinary, chance, 0.0)
        generator = torch.Generator().manual_seed(stable_seed("resample", self.seed, step))
        # The largest log(u)/chance: a weighted draw without replacement (Efraimidis and Spirakis 2006).
        uniform = torch.rand(len(chance), generator=generator, dtype=torch.float64)
        keys = uniform.clamp_min(1e-300).log() / (chance / chance.max().clamp_min(1e-300))
        order = keys.argsort(descending=True, stable=True)
        return order[chance[order] > 0][:most]

    def _rebuild(
        self, features: torch.Tensor, living: torch.Tensor, x: torch.Tensor, error: torch.Tensor
    ) -> torch.Tensor:
        """New weights of features [K] from the rows x [K, d] and their errors x̂ − x; living: bool [F].

        Returns:
            Those of the features that this process has, by their number here.
        """
        weights, bounded_acts = self.weights, not self.objective.nonlinearity.homogeneous
        columns, lengths = (
            self.ranks.features.cat(torch.linalg.vector_norm(weights.W_enc, dim=0)),
            self.ranks.features.cat(torch.linalg.vector_norm(weights.W_dec, dim=1)),
        )
        others = living if bool(living.any()) else torch.ones_like(living)
        x_hat = x + error
        wanted = -self.objective.distance.measure_(x, x_hat.clone()).slope
        wanted = torch.where(wanted.any(dim=1, keepdim=True), wanted, x)  # no angle, no slope
        u = wanted / torch.linalg.vector_norm(wanted, dim=1, keepdim=True).clamp_min(1e-30)
        gap = torch.linalg.vector_norm(error, dim=1)

        encoder = (ENCODER_SHARE * columns[others].mean()).expand(len(features))
        along = torch.linalg.vecdot(u, x - x_hat)
        if bounded_acts:
            encoder = torch.minimum(encoder, _MOST_PRE_ACT / along.clamp_min(1e-30))
        if self.decoder == "unit":
            decoder = torch.ones_like(gap)
        else:
            decoder = lengths[others].mean().expand(len(features))
            decoder = torch.minimum(decoder, gap) if bounded_acts else decoder
        column, row = u * encoder[:, None], u * decoder[:, None]
        bias = -torch.linalg.vecdot(column, x_hat)
        if self.ranks.features.size > 1:
            own = self.ranks.own_features(len(living))
            here = (features >= own.start) & (features < own.stop)
            features, column, row, bias = features[here] - own.start, column[here], row[here], bias[here]
        weights.W_enc.index_copy_(1, features, column.t())
        weights.W_dec.index_copy_(0, features, row)
        if weights.log_threshold is not None:
            weights.log_threshold.index_fill_(0, features, math.log(INITIAL_THRESHOLD))
            bias += INITIAL_THRESHOLD
        weights.b_enc.index_copy_(0, features, bias)
        return features

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {"resampled": self._count}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from `state()`."""
        self._count.copy_(state["resampled"])

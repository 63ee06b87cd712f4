"""One SAE in training: its weights, its optimizer, and one step of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from nsae_cli import catalogue
from nsae_cli.kernels.auxk import with_auxiliary_loss
from nsae_cli.kernels.select import Choice
from nsae_cli.kernels.types import RowGradients, StepResult, Weights, in_memory_order
from nsae_cli.kernels.update import Updater
from nsae_cli.metrics.deadness import FiredWindow
from nsae_cli.sae.autoencoder import SparseAutoencoder, fold_input_scale
from nsae_cli.sae.objective import ERROR_TERMS, L1_POWER, Objective, beta_from_alpha, penalty_degree
from nsae_cli.store.batches import HookRows, stable_seed
from nsae_cli.store.profile import HookProfile
from nsae_cli.training.l0_control import NOISE_FREE_EVERY, L0Control, gains_of, mean_l0, noise_free_l0
from nsae_cli.training.options import CellConfig
from nsae_cli.training.parallel.gradients import BatchSums, SharedGradients, shared_norm
from nsae_cli.training.parallel.group import Group
from nsae_cli.training.parallel.ranks import ALONE, Ranks
from nsae_cli.training.resample import Resampler, last_step
from nsae_cli.training.row_weights import batch_weights
from nsae_cli.training.schedule import is_logged, learning_rate, ramp
from nsae_cli.training.threshold import BatchThreshold


def resolve_input_scale(config: CellConfig, d_in: int, norm_scale: float) -> float:
    """s of x' = s·x: √d_in / ñ for ``auto``, so that a typical scaled row has norm √d_in."""
    return float(d_in**0.5 / norm_scale) if config.input_scale == "auto" else config.input_scale


def make_objective(config: CellConfig, profile: HookProfile, d_in: int) -> Objective:
    """The cell's loss, with β and s resolved from the hook's norms."""
    (p, distance), q = ERROR_TERMS[config.l2_norm], L1_POWER[config.l1_norm]
    powers = profile.mean_power if config.sinks == "keep" else profile.mean_power_ns
    beta = beta_from_alpha(
        config.alpha,
        config.alpha_scale,
        (p, q, penalty_degree(config.act, config.sparsity)),
        profile.norm_scale,
        powers[2 - p],
    )
    scale = resolve_input_scale(config, d_in, profile.norm_scale)
    return Objective(config.act, p, q, config.sparsity, beta, scale, config.k, config.bandwidth, distance)


@dataclass(frozen=True)
class StepLog:
    """A step's kernel result with what is needed to put it into raw units.

    `plain_error_weight` are the weights of the error as they would be with ``--row-weights plain``: which rows the loss
    listens to is told with these, so that SAEs of other row weights compare.
    """

    result: StepResult
    x: torch.Tensor
    error_weight: torch.Tensor
    plain_error_weight: torch.Tensor
    sparsity_weight: torch.Tensor
    alpha: float
    lr: float

    def whole(self, data: Group) -> StepLog:
        """That of the rows of all processes."""
        if data.size == 1:
            return self
        of_rows = ("error", "sq_error", "distance", "penalty", "l0", "l1")
        result = _mapped(self.result, of_rows, data.cat)
        if (sums := result.row_gradients) is not None:
            result.row_gradients = _mapped(sums, [field.name for field in dataclasses.fields(sums)], data.cat)
        weights = ("error_weight", "plain_error_weight", "sparsity_weight")
        return dataclasses.replace(_mapped(self, ("x", *weights), data.cat), result=result)


Record = TypeVar("Record", StepResult, RowGradients, StepLog)


def _mapped(record: Record, names: Iterable[str], function: Callable[[torch.Tensor], torch.Tensor]) -> Record:
    """A copy with a function of these fields, where they are not None."""
    changed: dict[str, Any] = {name: function(value) for name in names if (value := getattr(record, name)) is not None}
    return dataclasses.replace(record, **changed)


class Cell:
    """The state of one SAE in training, in scaled units (x' = s·x).

    Where several processes train it, each has a cell with its part of the features, and steps on its part of every
    batch; what follows is then said of all of them together.

    Args:
        config: what to train.
        objective: its loss, from `make_objective`.
        weights: initial weights in scaled units, on the training device; taken over and updated in place.
        kernel: what to step with.
        norm_scale: ñ of the hook.
        ranks: the processes that train it.
    """

    def __init__(
        self,
        config: CellConfig,
        objective: Objective,
        weights: Weights,
        kernel: Choice,
        norm_scale: float,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self._start_objective = objective
        typical = norm_scale * objective.input_scale
        self._typical_weights = (typical**-objective.weight_power, typical**-objective.l1_power)
        if objective.nonlinearity.selection.bandwidth is not None:
            weights.log_threshold = torch.zeros_like(weights.b_enc)
        self.weights = weights = weights.by_feature()
        make = partial(kernel.make, len(weights.b_dec), len(weights.b_enc), objective.nonlinearity, objective.distance)
        self._exchange = ranks.exchange()
        self.kernel = make(self._exchange)
        #: For rows that all processes have.
        self.probing = self.kernel if ranks.size == 1 else make(ranks.exchange_of_rows())
        self._shared = SharedGradients(weights, ranks.data)
        self._gradients = self._shared.buffer
        self._zero_rows = torch.zeros((), dtype=torch.int64, device=weights.b_enc.device)
        self.window = FiredWindow(len(weights.b_enc), config.dead_window, device=weights.b_enc.device)
        self._updater = Updater(weights, config.decoder, config.clip, partial(shared_norm, ranks))
        self._threshold = BatchThreshold(weights.b_enc.device) if config.act == "batchtopk" else None
        self._resampler = Resampler(
            objective, weights, config.decoder, self._updater.adam, self.window, config.seed, ranks
        )
        self.control: L0Control | None = None
        if config.target_l0 is not None:
            self.control = L0Control(config.target_l0, config.alpha, gains_of(config.act))
        self._held_out_l0: float | None = None

    @property
    def alpha(self) -> float:
        """α as given, or what the control of L0 has settled on."""
        return self.config.alpha if self.control is None else self.control.found

    @property
    def objective(self) -> Objective:
        """The loss at this α."""
        return self._objective_at(self.alpha)

    def _objective_at(self, alpha: float) -> Objective:
        start = self._start_objective
        if alpha == self.config.alpha:
            return start
        return dataclasses.replace(start, beta=start.beta * (alpha / self.config.alpha))  # β ∝ α, whatever the rule

    def train_step(self, rows: HookRows, step: int) -> StepLog:
        """One optimizer step on a batch.

        Args:
            rows: the batch, on the training device; of several processes each has its part.
            step: 0-based number of this step.

        Raises:
            NumericalError: loss or gradient is not finite; the weights are still those before the step. The message
                lacks the reason, which `non_finite.explain` adds.
        """
        config, control = self.config, self.control
        alpha = config.alpha if control is None else control.alpha
        objective = self._objective_at(alpha)
        ramped = ramp(step, config.steps, config.alpha_warm_up)
        # A copy: cells of a grid share the rows, and those of a float32 store are float32 already.
        x = rows.x.to(torch.float32, copy=True).mul_(objective.input_scale)
        batch_size = len(rows.norm) * self.ranks.data.size
        plain = objective.row_weights(rows.norm, rows.zero)
        per_row_error, per_row_sparsity = self._row_weights(plain, rows, step)
        error_weight = per_row_error / batch_size
        sparsity_weight = per_row_sparsity * (objective.beta_scaled * ramped / batch_size)
        noise = self._noise(len(rows.norm), step)
        gradients = self.kernel.backward(
            x,
            self.weights,
            self._gradients,
            activation=objective.nonlinearity,
            penalty=objective.penalty,
            error_weight=error_weight,
            sparsity_weight=sparsity_weight,
            noise=noise,
            distance=objective.distance,
            row_gradients=is_logged(step, config.steps, config.probe_every),
        )
        result = gradients.result
        if config.aux_k is not None:
            gradients = with_auxiliary_loss(
                gradients,
                x,
                self.weights,
                self.window.silent(),
                k_aux=config.aux_k,
                error_weight=objective.squared_error_weight(error_weight, rows.norm, rows.zero),
                noise=noise,
                exchange=self._exchange,
            )
        sums = self._shared.sum(gradients, rows)
        self._refuse_non_finite(sums, step)
        lr = learning_rate(step, config.steps, config.lr, config.lr_warm_up, config.lr_decay)
        if control is not None and ramped == 1:
            self._control_l0(control, x, rows, result, step, lr / config.lr)
        self._updater.step(sums.gradients, lr)
        self.window.update(sums.fired, batch_size)
        if self._threshold is not None:
            assert result.least_act is not None
            self._threshold.update(result.least_act)
        if self._resamples_after(step):
            self._resampler.resample(rows, x, result, error_weight, step)
        self._zero_rows += sums.zero_rows  # stays on the device: reading it here would make every step wait
        return StepLog(result, x, error_weight, plain[0] / batch_size, sparsity_weight, alpha * ramped, lr)

    def _row_weights(
        self, plain: tuple[torch.Tensor, torch.Tensor], rows: HookRows, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `--row-weights` makes of the batch's plain weights, for the rows of this process."""
        kind, data = self.config.row_weights, self.ranks.data
        if kind == "plain" or data.size == 1:
            return batch_weights(kind, plain, rows.zero, self._typical_weights, self.config.seed, step)
        # Controls look at the whole batch, which is a few numbers a row.
        w, v, zero = data.cat(plain[0]), data.cat(plain[1]), data.cat(rows.zero)
        w, v = batch_weights(kind, (w, v), zero, self._typical_weights, self.config.seed, step)
        own = self.ranks.own_rows(len(zero))
        return w[own], v[own]

    def look_at_held_out(self, rows: HookRows) -> None:
        """Counts L0 of held-out rows (on the training device); the next step compares its batch's with it."""
        if self.control is not None:
            scaled = rows.x.to(torch.float32) * self._start_objective.input_scale
            self._held_out_l0 = mean_l0(self._noise_free_l0(scaled), rows)

    def _control_l0(
        self, control: L0Control, x: torch.Tensor, rows: HookRows, result: StepResult, step: int, lr_share: float
    ) -> None:
        """Shows the control a batch's L0, at the weights before this step's update."""
        every = NOISE_FREE_EVERY if self.config.noise else 1
        held_out_l0, self._held_out_l0 = self._held_out_l0, None
        if step % every and held_out_l0 is None:
            return
        mean = mean_l0(self._noise_free_l0(x) if self.config.noise else result.l0, rows, self.ranks.data)
        if held_out_l0 is not None:
            control.compare(mean, held_out_l0)
        if step % every == 0 and mean == mean:  # NaN: the batch has no non-sink row
            control.update(mean, lr_share * every)

    def _noise_free_l0(self, x: torch.Tensor) -> torch.Tensor:
        l0 = noise_free_l0(x, self.weights)
        self.ranks.features.sum_(l0)
        return l0

    def _resamples_after(self, step: int) -> bool:
        every, done = self.config.resample_dead, step + 1
        return every is not None and done % every == 0 and done <= last_step(self.config.steps, self.config.lr_decay)

    def _noise(self, rows: int, step: int) -> torch.Tensor | None:
        """Gaussian noise on pre-activations; a function of (seed, step), so that resuming needs no random state.

        Of several processes each draws the noise of the whole batch and takes its part: the same as in one.
        """
        if self.config.noise == 0:
            return None
        device = self.weights.b_enc.device
        generator = torch.Generator(device=device).manual_seed(stable_seed("noise", self.config.seed, step))
        batch_size, d_sae = rows * self.ranks.data.size, self.config.d_sae
        noise = torch.randn(batch_size, d_sae, generator=generator, device=device).mul_(self.config.noise)
        return noise[self.ranks.own_rows(batch_size), self.ranks.own_features(d_sae)]

    def _refuse_non_finite(self, sums: BatchSums, step: int) -> None:
        # b_dec's gradient sums every row's error, b_enc's every row's delta: a NaN or infinity anywhere reaches one.
        # A threshold has no row of its own, and may be the only thing that is not finite.
        gradients = sums.gradients
        total = sums.sq_error + gradients.b_dec.sum() + gradients.b_enc.sum()
        if gradients.log_threshold is not None:
            total = total + gradients.log_threshold.sum()
        self.ranks.features.sum_(total)
        if not bool(torch.isfinite(total)):
            raise catalogue.LOSS_NOT_FINITE(
                f"loss or gradient is not finite at step {step + 1} of {self.config.hook} ({self.config.act}, "
                f"{self.config.l2_norm}); lower --lr or give --clip 1"
            )

    def refuse_non_finite_state(self, steps: int) -> None:
        """Looks at weights and moments, which a step whose gradient was finite can have made infinite.

        Args:
            steps: how many were taken.

        Raises:
            NumericalError: a value is not finite.
        """
        state = {**self.weights.named(), **self._updater.adam.state()}
        found = self.ranks.agree(*(not bool(torch.isfinite(tensor).all()) for tensor in state.values()))
        bad = [name for name, is_bad in zip(state, found, strict=True) if is_bad]
        if bad:
            raise catalogue.LOSS_NOT_FINITE(
                f"{bad[0]} of {self.config.hook} ({self.config.act}, {self.config.l2_norm}) is not finite after step "
                f"{steps}; lower --lr or give --clip 1"
            )

    @property
    def zero_rows(self) -> int:
        """How many rows so far counted for nothing, repeats counted."""
        return int(self._zero_rows)

    @property
    def resampled(self) -> int:
        """How many dead features were given new weights so far."""
        return self._resampler.count

    def dead_fraction(self) -> float | None:
        """Share of all features that are silent over the window; see `FiredWindow.dead_fraction`."""
        if self.ranks.features.size == 1:
            return self.window.dead_fraction()
        return self.ranks.features.cat(self.window.dead()).double().mean().item()

    def saved_sae(self) -> SparseAutoencoder:
        """The SAE as it is saved: in raw units, float32, on the CPU. One of batchtopk is a jumprelu SAE."""
        act, scale = self.objective.act, self.objective.input_scale
        folded = fold_input_scale(act, self.weights, scale)
        threshold = None if folded.log_threshold is None else folded.log_threshold.exp()
        if self._threshold is not None:
            act, threshold = "jumprelu", torch.full_like(folded.b_enc, self._threshold.value / scale)
        k = self.objective.k if act == "topk" else None
        return SparseAutoencoder(act, dataclasses.replace(folded, log_threshold=None), k, threshold).to("cpu")

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a later step depends on beside the configuration, by name; of this process's features.

        These are the tensors themselves, not copies. Matrices are in the order of their memory (W_enc as
        [d_sae, d_in]), so that copying and writing them reorders nothing.
        """
        state = {name: in_memory_order(tensor) for name, tensor in self.weights.named().items()}
        state |= {f"adam/{key}": value for key, value in self._updater.adam.state().items()}
        state |= {f"window/{key}": value for key, value in self.window.state().items()}
        state |= {f"kernel/{key}": value for key, value in self.kernel.state().items()}
        if self._threshold is not None:
            state |= self._threshold.state()
        state |= self._resampler.state()
        if self.control is not None:
            state |= self.control.state()
        state["zero_rows"] = self._zero_rows
        return {name: tensor.detach() for name, tensor in state.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from `state()`. A missing entry is a KeyError: nothing is ever re-estimated."""
        for name, tensor in self.weights.named().items():
            in_memory_order(tensor).copy_(state[name])
        self._updater.adam.load_state({key: state[f"adam/{key}"] for key in self._updater.adam.state()})
        self.window.load_state({key: state[f"window/{key}"] for key in self.window.state()})
        self.kernel.load_state({key: state[f"kernel/{key}"] for key in self.kernel.state()})
        if self._threshold is not None:
            self._threshold.load_state(state)
        self._resampler.load_state(state)
        if self.control is not None:
            self.control.load_state(state)
        self._zero_rows.copy_(state["zero_rows"])

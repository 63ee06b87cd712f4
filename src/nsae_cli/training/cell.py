"""One SAE in training: its weights, its optimizer, and one step of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from nsae_cli.errors import NumericalError
from nsae_cli.kernels.auxk import with_auxiliary_loss
from nsae_cli.kernels.select import Choice
from nsae_cli.kernels.types import StepResult, Weights, in_memory_order
from nsae_cli.kernels.update import GradientBuffer, Gradients, Updater
from nsae_cli.metrics.deadness import FiredWindow
from nsae_cli.sae.autoencoder import SparseAutoencoder, fold_input_scale
from nsae_cli.sae.objective import L1_POWER, L2_POWER, Objective, beta_from_alpha, penalty_degree
from nsae_cli.store.batches import HookRows, stable_seed
from nsae_cli.store.profile import HookProfile
from nsae_cli.training.options import CellConfig
from nsae_cli.training.schedule import is_logged, learning_rate, ramp
from nsae_cli.training.threshold import BatchThreshold


def resolve_input_scale(config: CellConfig, d_in: int, norm_scale: float) -> float:
    """s of x' = s·x: √d_in / ñ for ``auto``, so that a typical scaled row has norm √d_in."""
    return float(d_in**0.5 / norm_scale) if config.input_scale == "auto" else config.input_scale


def make_objective(config: CellConfig, profile: HookProfile, d_in: int) -> Objective:
    """The cell's loss, with β and s resolved from the hook's norms."""
    p, q = L2_POWER[config.l2_norm], L1_POWER[config.l1_norm]
    powers = profile.mean_power if config.sinks == "keep" else profile.mean_power_ns
    beta = beta_from_alpha(
        config.alpha,
        config.alpha_scale,
        (p, q, penalty_degree(config.act, config.sparsity)),
        profile.norm_scale,
        powers[2 - p],
    )
    scale = resolve_input_scale(config, d_in, profile.norm_scale)
    return Objective(config.act, p, q, config.sparsity, beta, scale, config.k, config.bandwidth)


@dataclass(frozen=True)
class StepLog:
    """A step's kernel result with what is needed to put it into raw units."""

    result: StepResult
    x: torch.Tensor
    error_weight: torch.Tensor
    sparsity_weight: torch.Tensor
    alpha: float
    lr: float


class Cell:
    """The state of one SAE in training, in scaled units (x' = s·x).

    Args:
        config: what to train.
        objective: its loss, from `make_objective`.
        weights: initial weights in scaled units, on the training device; taken over and updated in place.
        kernel: what to step with.
    """

    def __init__(self, config: CellConfig, objective: Objective, weights: Weights, kernel: Choice) -> None:
        self.config = config
        self.objective = objective
        if objective.nonlinearity.selection.bandwidth is not None:
            weights.log_threshold = torch.zeros_like(weights.b_enc)
        self.weights = weights = weights.by_feature()
        self.kernel = kernel.make(len(weights.b_dec), config.d_sae, objective.nonlinearity)
        self._gradients = GradientBuffer(weights)
        self._zero_rows = torch.zeros((), dtype=torch.int64, device=weights.b_enc.device)
        self.window = FiredWindow(config.d_sae, config.dead_window, device=weights.b_enc.device)
        self._updater = Updater(weights, config.decoder, config.clip)
        self._threshold = BatchThreshold(weights.b_enc.device) if config.act == "batchtopk" else None

    def train_step(self, rows: HookRows, step: int) -> StepLog:
        """One optimizer step on a batch.

        Args:
            rows: the batch, on the training device.
            step: 0-based number of this step.

        Raises:
            NumericalError: loss or gradient is not finite; the weights are still those before the step.
        """
        config, objective = self.config, self.objective
        ramped = ramp(step, config.steps, config.alpha_warm_up)
        # A copy: cells of a grid share the rows, and those of a float32 store are float32 already.
        x = rows.x.to(torch.float32, copy=True).mul_(objective.input_scale)
        per_row_error, per_row_sparsity = objective.row_weights(rows.norm, rows.zero)
        error_weight = per_row_error / len(rows.norm)
        sparsity_weight = per_row_sparsity * (objective.beta_scaled * ramped / len(rows.norm))
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
                error_weight=error_weight,
                noise=noise,
            )
        self._refuse_non_finite(gradients, step)
        lr = learning_rate(step, config.steps, config.lr, config.lr_warm_up, config.lr_decay)
        self._updater.step(gradients, lr)
        self.window.update(result.fired, len(rows.norm))
        if self._threshold is not None:
            assert result.least_act is not None
            self._threshold.update(result.least_act)
        self._zero_rows += rows.zero.sum()  # stays on the device: reading it here would make every step wait
        return StepLog(result, x, error_weight, sparsity_weight, config.alpha * ramped, lr)

    def _noise(self, rows: int, step: int) -> torch.Tensor | None:
        """Gaussian noise on pre-activations; a function of (seed, step), so that resuming needs no random state."""
        if self.config.noise == 0:
            return None
        device = self.weights.b_enc.device
        generator = torch.Generator(device=device).manual_seed(stable_seed("noise", self.config.seed, step))
        return torch.randn(rows, self.config.d_sae, generator=generator, device=device).mul_(self.config.noise)

    def _refuse_non_finite(self, gradients: Gradients, step: int) -> None:
        # b_dec's gradient sums every row's error, b_enc's every row's delta: a NaN or infinity anywhere reaches one.
        # A threshold has no row of its own, and may be the only thing that is not finite.
        total = gradients.result.sq_error.sum() + gradients.b_dec.sum() + gradients.b_enc.sum()
        if gradients.log_threshold is not None:
            total = total + gradients.log_threshold.sum()
        if not bool(torch.isfinite(total)):
            raise NumericalError(
                f"loss or gradient is not finite at step {step + 1} of {self.config.hook} ({self.config.act}, "
                f"{self.config.l2_norm}); the last checkpoint is kept, try a lower --lr or --clip 1"
            )

    @property
    def zero_rows(self) -> int:
        """How many rows so far counted for nothing, repeats counted."""
        return int(self._zero_rows)

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
        """Everything that a later step depends on beside the configuration, by name.

        On the CPU these are the tensors themselves, not copies: to be written before the next step. Matrices are in the
        order of their memory (W_enc as [d_sae, d_in]), so that writing them copies nothing either.
        """
        state = {name: in_memory_order(tensor) for name, tensor in self.weights.named().items()}
        state |= {f"adam/{key}": value for key, value in self._updater.adam.state().items()}
        state |= {f"window/{key}": value for key, value in self.window.state().items()}
        state |= {f"kernel/{key}": value for key, value in self.kernel.state().items()}
        if self._threshold is not None:
            state |= self._threshold.state()
        state["zero_rows"] = self._zero_rows
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from `state()`. A missing entry is a KeyError: nothing is ever re-estimated."""
        for name, tensor in self.weights.named().items():
            in_memory_order(tensor).copy_(state[name])
        self._updater.adam.load_state({key: state[f"adam/{key}"] for key in self._updater.adam.state()})
        self.window.load_state({key: state[f"window/{key}"] for key in self.window.state()})
        self.kernel.load_state({key: state[f"kernel/{key}"] for key in self.kernel.state()})
        if self._threshold is not None:
            self._threshold.load_state(state)
        self._zero_rows.copy_(state["zero_rows"])

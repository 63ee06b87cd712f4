"""The sparse training step: after the encoder's product, everything runs on active entries alone.

A feature that is off in a row contributes nothing to x̂, and its pre-activation gets no gradient: act'(z) = 0 for
z ≤ 0. So of the five matrix products of a dense step the decoder's and the three of the backward pass are sums over the
active entries (row i, feature j) only, with the same terms as in the dense sums, not fewer:

    x̂_i = b_dec + Σ_j f_ij d_j          e_i = x̂_i − x_i
    δ_ij = act'(z_ij)·(2w_i e_i·d_j + v_i ∂φ/∂f_ij)
    ∂W_enc,j = Σ_i δ_ij x_i             ∂b_enc,j = Σ_i δ_ij
    ∂W_dec,j = Σ_i 2w_i f_ij e_i + (Σ_i v_i ∂φ/∂ν_j)·d_j/‖d_j‖       ∂b_dec = Σ_i 2w_i e_i

with w the error weight and v the sparsity weight of a row. Activation and penalty are applied to the entries' values by
the same functions as in the dense step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.distance import SQUARED_ERROR
from nsae_cli.kernels.entries import Columns, Entries, SparseOps, UpdatingOps
from nsae_cli.kernels.jump import in_band_, threshold_gradient_of_entries
from nsae_cli.kernels.types import Activation, Distance, Penalty, RowGradients, StepResult, Weights
from nsae_cli.kernels.update import GradientBuffer

#: How often batch-top-k guesses a threshold before it looks at everything that is positive.
_ATTEMPTS = 3


class SparseStep:
    """Callable with `reference.step_gradients`' signature; `backward` gives the gradients in their sparse form.

    Args:
        ops: the operations it is made of.
    """

    def __init__(self, ops: SparseOps) -> None:
        self._ops = ops
        self._guess = 0.0  # of batch-top-k's threshold: saves work, changes nothing

    @property
    def name(self) -> str:
        """Of the operations."""
        return self._ops.name

    def __call__(
        self,
        x: torch.Tensor,
        weights: Weights,
        gradients: Weights,
        *,
        activation: Activation,
        penalty: Penalty,
        error_weight: torch.Tensor,
        sparsity_weight: torch.Tensor,
        noise: torch.Tensor | None = None,
        distance: Distance = SQUARED_ERROR,
    ) -> StepResult:
        """See `reference.step_gradients`."""
        backward = self.backward(
            x,
            weights,
            GradientBuffer(weights),
            activation=activation,
            penalty=penalty,
            error_weight=error_weight,
            sparsity_weight=sparsity_weight,
            noise=noise,
            distance=distance,
        )
        backward.write(gradients)
        return backward.result

    @torch.no_grad()
    def backward(
        self,
        x: torch.Tensor,
        weights: Weights,
        into: GradientBuffer,
        *,
        activation: Activation,
        penalty: Penalty,
        error_weight: torch.Tensor,
        sparsity_weight: torch.Tensor,
        noise: torch.Tensor | None = None,
        distance: Distance = SQUARED_ERROR,
        row_gradients: bool = False,
    ) -> SparseGradients:
        """The step's loss terms, and its gradients in a form that `full` or `update` finishes.

        Args:
            into: taken by `full` only.
            x, weights, activation, penalty, error_weight, sparsity_weight, noise: see `reference.step_gradients`.
            distance: the squared error; no other is covered.
            row_gradients: whether the result is to have them.
        """
        assert distance == SQUARED_ERROR
        ops, selection = self._ops, activation.selection
        entries, band = self._entries(x, weights, activation, noise)
        acts = activation.value_(entries.pre_acts.clone())
        error, sq_error, dots = ops.decode(entries, acts, weights, x)

        counts = entries.counts
        error_pull, sparsity_pull = 2 * error_weight, sparsity_weight
        row_pull = torch.repeat_interleave(error_pull, counts, output_size=len(acts))
        row_sparsity = torch.repeat_interleave(sparsity_pull, counts, output_size=len(acts))
        norms = torch.linalg.vector_norm(weights.W_dec, dim=1) if penalty.uses_decoder_norms else None
        norms_here = None if norms is None else norms[entries.cols]
        act_slope, norm_slope = penalty.slopes(acts, norms_here)
        delta = row_pull * dots
        if isinstance(act_slope, torch.Tensor):
            delta.addcmul_(row_sparsity, act_slope)
        else:  # a number stays on the host: as a tensor it would be copied to the device, which waits
            delta.add_(row_sparsity, alpha=act_slope)
        log_threshold = None
        if weights.log_threshold is not None and band is not None and selection.bandwidth is not None:
            log_threshold = threshold_gradient_of_entries(
                weights.log_threshold,
                entries.cols,
                band * delta,
                band * row_sparsity,
                selection.bandwidth,
                penalty.jump,
            )
        activation.scale_by_derivative_(delta, acts)
        columns = ops.by_feature(entries, len(weights.b_enc), delta, row_pull * acts, dots)

        along = torch.zeros_like(weights.b_enc) if norms is None else _along(norms, entries, row_sparsity * norm_slope)
        penalties = penalty.value(acts, norms_here)
        l1 = ops.row_sums(entries, acts)
        l0, fired = counts.to(x.dtype), columns.counts > 0
        if band is not None:  # entries just below their threshold are among them, with acts of 0
            active = acts > 0
            l0, fired = ops.row_sums(entries, active.to(x.dtype)), torch.zeros_like(fired)
            fired[entries.cols[active]] = True
        result = StepResult(
            error=error,
            sq_error=sq_error,
            distance=sq_error,
            penalty=l1 if penalties is acts else ops.row_sums(entries, penalties),
            l0=l0,
            l1=l1,
            fired=fired,
            least_act=torch.cat([acts, acts.new_tensor([torch.inf])]).min() if selection.over == "batch" else None,
        )
        if row_gradients:
            pulled = acts * row_pull * dots
            result.row_gradients = RowGradients(
                delta_sq=ops.row_sums(entries, delta.square()),
                acts_sq=ops.row_sums(entries, acts.square()),
                pull_sq=error_pull.square() * sq_error,
                along_sq=ops.row_sums(entries, pulled.square()),
            )
            if norms_here is not None:
                norm_pull = (row_sparsity * norm_slope).masked_fill_(norms_here == 0, 0)
                result.row_gradients.norm_sq = ops.row_sums(entries, norm_pull.square())
                cross = norm_pull * pulled / norms_here.clamp_min(1e-30)
                result.row_gradients.norm_cross = ops.row_sums(entries, cross)
        return SparseGradients(
            ops=ops,
            result=result,
            b_enc=columns.sum_delta.to(x.dtype),
            b_dec=error_pull @ error,
            log_threshold=log_threshold,
            columns=columns,
            along=along,
            decoder_norms=norms,
            x=x,
            weights=weights,
            into=into,
        )

    def _entries(
        self, x: torch.Tensor, weights: Weights, activation: Activation, noise: torch.Tensor | None
    ) -> tuple[Entries, torch.Tensor | None]:
        """The entries that may be active; with thresholds also those just below, and K of `jump` for each [E]."""
        selection = activation.selection
        if selection.bandwidth is not None:
            return self._above_threshold(x, weights, selection.bandwidth, noise)
        if selection.top_k is None or selection.over == "row":
            find = self._ops.active
            return find(x, weights, weights.b_enc, noise=noise, threshold=0.0, top_k=selection.top_k), None
        return self._largest_of_batch(x, weights, selection.top_k * len(x), noise), None

    def _above_threshold(
        self, x: torch.Tensor, weights: Weights, bandwidth: float, noise: torch.Tensor | None
    ) -> tuple[Entries, torch.Tensor]:
        assert weights.log_threshold is not None
        lower_edge = weights.log_threshold.exp() - bandwidth / 2
        entries = self._ops.active(x, weights, weights.b_enc - lower_edge, noise=noise, threshold=0.0, top_k=None)
        gap = entries.pre_acts - bandwidth / 2
        pre_acts = (entries.pre_acts + lower_edge[entries.cols]).masked_fill_(gap <= 0, 0)
        return Entries(entries.row_ptr, entries.cols, pre_acts), in_band_(gap, bandwidth)

    def _largest_of_batch(self, x: torch.Tensor, weights: Weights, most: int, noise: torch.Tensor | None) -> Entries:
        find = self._ops.active
        threshold = self._guess
        entries = find(x, weights, weights.b_enc, noise=noise, threshold=threshold, top_k=None)
        lowered = 0
        while len(entries.cols) < most and threshold > 0:
            # Every attempt is a whole encoder product, and there may be less to find than is wanted.
            lowered += 1
            threshold = threshold / 2 if lowered < _ATTEMPTS else 0.0
            entries = find(x, weights, weights.b_enc, noise=noise, threshold=threshold, top_k=None)
        if len(entries.cols) <= most or not len(x):
            self._guess = 0.0
            return entries
        least = torch.kthvalue(entries.pre_acts, len(entries.cols) - most + 1).values
        ties = entries.pre_acts == least
        wanted = ~(entries.pre_acts <= least)  # a NaN too
        wanted |= ties & (torch.cumsum(ties, 0) <= most - wanted.sum())  # the first in the order of rows and columns
        self._guess = 0.9 * float(least)
        return entries.keep(wanted)


def _along(norms: torch.Tensor, entries: Entries, pull: torch.Tensor) -> torch.Tensor:
    """(Σ pull)/‖d_j‖ over each feature's entries [F]: what a penalty on decoder norms [F] adds along d_j; pull: [E].

    ∂‖d_j‖/∂d_j = d_j/‖d_j‖; a zero row has no direction, and torch's own norm gives it gradient 0.
    """
    sums = torch.zeros_like(norms, dtype=torch.float64).index_add_(0, entries.cols, pull.double())
    return (sums / norms.double().clamp_min(1e-30)).to(norms.dtype)


@dataclass
class SparseGradients:
    """Gradients of a sparse step: those of the biases, and the others as sums over entries yet to be taken.

    Attributes:
        result: the step's loss terms.
        b_enc: [F]
        b_dec: [d]
        log_threshold: [F], None where the activation has no thresholds
        along: what is added to ∂W_dec,j in the direction of W_dec,j, [F]; 0 for penalties without decoder norms
        decoder_norms: ‖W_dec,j‖ [F], None where the penalty does not use them
    """

    ops: SparseOps
    result: StepResult
    b_enc: torch.Tensor
    b_dec: torch.Tensor
    log_threshold: torch.Tensor | None
    columns: Columns
    along: torch.Tensor
    decoder_norms: torch.Tensor | None
    x: torch.Tensor
    weights: Weights
    into: GradientBuffer

    def full(self) -> Weights:
        """See `update.Gradients.full`."""
        self.write(self.into.get())
        return self.into.get()

    def write(self, gradients: Weights) -> None:
        """Overwrites all gradients."""
        gradients.b_enc.copy_(self.b_enc)
        gradients.b_dec.copy_(self.b_dec)
        if gradients.log_threshold is not None and self.log_threshold is not None:
            gradients.log_threshold.copy_(self.log_threshold)
        self.ops.gradients(self.columns, self.x, self.result.error, self.along, self.weights, gradients)

    @property
    def can_update(self) -> bool:
        """Whether `update` is there."""
        return isinstance(self.ops, UpdatingOps)

    @torch.no_grad()
    def update(self, adam: Adam, decoder: str, lr: float) -> None:
        """One step of Adam on all parameters and the decoder's constraint, without the gradients in memory.

        Args:
            adam: of these weights.
            decoder: ``free``, ``bounded`` (rows at most 1 long), or ``unit``: unit rows, whose gradient is taken
                perpendicular to them, ∂W_dec,j − ⟨∂W_dec,j, d_j⟩ d_j.
            lr: learning rate.
        """
        assert isinstance(self.ops, UpdatingOps)
        along = self.along
        if decoder == "unit":
            of_penalty = 0.0 if self.decoder_norms is None else along * self.decoder_norms.double().square()
            along = (along - (self.columns.sum_along + of_penalty)).to(along.dtype)
        adam.step_biases(self.b_enc, self.b_dec, lr, self.log_threshold)
        self.ops.update(self.columns, self.x, self.result.error, along, self.weights, adam, decoder, lr)

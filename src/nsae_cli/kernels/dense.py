"""The training step's loss and gradients in closed form, dense: five matrix products and no autograd graph.

Against plain autograd it keeps two [rows, F] buffers instead of about eight, reuses them from step to step, touches
them in place only, works in blocks of rows, and forms no product with W_encᵀ (x needs no gradient).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsae_cli.kernels import scratch
from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.dense_selection import make_selection
from nsae_cli.kernels.distance import SQUARED_ERROR
from nsae_cli.kernels.types import Activation, Distance, Exchange, Penalty, RowGradients, StepResult, Weights
from nsae_cli.kernels.update import GradientBuffer

#: Rows per block are chosen so that one [rows, F] float32 buffer takes at most this many bytes.
_BLOCK_BYTES = 32 * 2**20
_MIN_BLOCK_ROWS = 512


@dataclass
class DenseGradients:
    """A dense step's gradients; see `update.Gradients`.

    Attributes:
        result: the step's loss terms.
        gradients: all of them.
    """

    result: StepResult
    gradients: Weights

    @property
    def b_enc(self) -> torch.Tensor:
        return self.gradients.b_enc

    @property
    def b_dec(self) -> torch.Tensor:
        return self.gradients.b_dec

    @property
    def log_threshold(self) -> torch.Tensor | None:
        return self.gradients.log_threshold

    def full(self) -> Weights:
        """See `update.Gradients.full`."""
        return self.gradients

    @property
    def can_update(self) -> bool:
        return False

    def update(self, adam: Adam, decoder: str, lr: float) -> None:
        """Not there: `can_update` is false."""
        raise NotImplementedError


def _row_gradients(
    acts: torch.Tensor,
    pulled: torch.Tensor,
    along: torch.Tensor,
    norm_pull: torch.Tensor | None,
    norms: torch.Tensor | None,
) -> RowGradients:
    """See `RowGradients`; `delta_sq` is still to come.

    Args:
        acts: f [rows, F].
        pulled: g [rows, d].
        along: f_j·(g·d_j) [rows, F].
        norm_pull: a_j [rows, F], or None.
        norms: ‖d_j‖ [F], where `norm_pull` is given.
    """
    dot = torch.linalg.vecdot
    found = RowGradients(
        delta_sq=pulled.new_empty(0), acts_sq=dot(acts, acts), pull_sq=dot(pulled, pulled), along_sq=dot(along, along)
    )
    if norm_pull is not None and norms is not None:
        norm_pull = norm_pull.masked_fill(norms == 0, 0)
        found.norm_sq, found.norm_cross = dot(norm_pull, norm_pull), dot(norm_pull, along / norms.clamp_min(1e-30))
    return found


class DenseStep:
    """Callable with `reference.step_gradients`' signature, from any thread; a thread's steps share buffers (`scratch`).

    The same inputs give the same bits on one machine with one number of threads: blocks and the order of every sum
    depend on the shapes only.

    Args:
        matmul_dtype: dtype of the matrix products (bfloat16 on CUDA); None computes in the dtype of x. Sums over rows
            and everything element-wise stay in the dtype of x.
        block_rows: rows per block; None chooses by the width of the buffers (all rows at once on a GPU).
        exchange: with the processes that have other rows of the batch or other features of the SAE; None: all are here.
    """

    def __init__(
        self,
        matmul_dtype: torch.dtype | None = None,
        block_rows: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._matmul_dtype = matmul_dtype
        self._block_rows = block_rows
        self._exchange = exchange
        bf16 = ", bf16 products" if matmul_dtype is torch.bfloat16 else ""
        self.name = f"dense{bf16}"

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
    ) -> DenseGradients:
        """The step's loss terms, and its gradients in the buffer.

        Args:
            x, weights, activation, penalty, error_weight, sparsity_weight, noise, distance: see
                `reference.step_gradients`.
            row_gradients: whether the result is to have them.
        """
        result = self(
            x,
            weights,
            into.get(),
            activation=activation,
            penalty=penalty,
            error_weight=error_weight,
            sparsity_weight=sparsity_weight,
            noise=noise,
            distance=distance,
            row_gradients=row_gradients,
        )
        return DenseGradients(result, into.get())

    @torch.no_grad()
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
        row_gradients: bool = False,
    ) -> StepResult:
        """See `reference.step_gradients`; `row_gradients` says whether the result is to have them."""
        rows, d_sae = x.shape[0], weights.b_enc.shape[0]
        norms = torch.linalg.vector_norm(weights.W_dec, dim=1) if penalty.uses_decoder_norms else None
        norm_gradient = torch.zeros_like(weights.b_enc) if norms is not None else None
        for total in (gradients.b_enc, gradients.b_dec) if rows else gradients.tensors():
            total.zero_()
        W_enc, W_dec = self._operand(weights.W_enc), self._operand(weights.W_dec)

        def pre_activations(part: slice) -> torch.Tensor:
            z = scratch.buffer("acts", part.stop - part.start, d_sae, x.dtype, x.device)
            self._product(z, x[part], W_enc, weights.b_enc)
            return z if noise is None else z.add_(noise[part])

        blocks = self._blocks(rows, d_sae, x)
        selection = make_selection(activation.selection, weights, rows, self._exchange)
        acts = x.new_empty(0, d_sae)
        if selection.two_passes:
            for part in blocks:
                acts = pre_activations(part)
                selection.look(acts)
        result = StepResult(
            error=torch.empty_like(x),
            sq_error=x.new_empty(rows),
            distance=x.new_empty(rows),
            penalty=x.new_empty(rows),
            l0=x.new_empty(rows),
            l1=x.new_empty(rows),
            fired=torch.zeros(d_sae, dtype=torch.bool, device=x.device),
            least_act=selection.least_act(acts[:0]),
        )
        of_rows: list[RowGradients] = []
        for part in blocks:
            x_part, error = x[part], result.error[part]
            if not selection.two_passes or len(blocks) > 1:  # one block's are there still
                acts = pre_activations(part)
            delta = scratch.buffer("delta", len(x_part), d_sae, x.dtype, x.device)
            selection.apply_(acts)
            activation.value_(acts)
            result.least_act = selection.least_act(acts)
            self._reconstruct(error, acts, W_dec, weights.b_dec)
            measured = distance.measure_(x_part, error)  # until here it is x̂
            result.distance[part] = measured.value
            result.sq_error[part] = torch.linalg.vecdot(error, error)
            result.l1[part] = acts.sum(dim=1)
            result.penalty[part] = penalty.row_sums(acts, norms)
            result.l0[part] = torch.sign(acts, out=delta).sum(dim=1)
            result.fired |= acts.sum(dim=0) > 0  # acts are not negative

            pulled = measured.slope * (measured.factor * error_weight[part])[:, None]
            gradients.b_dec.add_(pulled.sum(dim=0))
            self._accumulate(gradients.W_dec, acts, pulled, first=part.start == 0)

            self._product(delta, pulled, W_dec.t())
            pull = sparsity_weight[part]
            act_slope, norm_slope = penalty.slopes(acts, norms)
            if row_gradients:
                norm_pull = pull[:, None] * norm_slope if isinstance(norm_slope, torch.Tensor) else None
                of_rows.append(_row_gradients(acts, pulled, acts * delta, norm_pull, norms))
            if isinstance(act_slope, torch.Tensor):
                delta.addcmul_(act_slope.expand_as(delta), pull[:, None])
            else:
                delta.add_((pull * act_slope)[:, None])
            if norm_gradient is not None and isinstance(norm_slope, torch.Tensor):
                norm_gradient.add_(pull @ norm_slope.expand_as(delta))
            selection.learn(delta, pull)
            activation.scale_by_derivative_(delta, acts)
            if row_gradients:
                of_rows[-1].delta_sq = torch.linalg.vecdot(delta, delta)
            gradients.b_enc.add_(delta.sum(dim=0))
            self._accumulate(gradients.W_enc, x_part, delta, first=part.start == 0)
        if norms is not None and norm_gradient is not None:
            # ∂‖d_i‖/∂d_i = d_i/‖d_i‖; a zero row has no direction and torch's own norm gives it gradient 0.
            gradients.W_dec.addcmul_(weights.W_dec, (norm_gradient / norms.clamp_min(1e-30))[:, None])
        selection.write(gradients, penalty.jump)
        if row_gradients:
            result.row_gradients = RowGradients.cat(of_rows, x.new_empty(0))
        if self._exchange is not None:
            self._exchange.complete_(result)
        return result

    def _reconstruct(self, out: torch.Tensor, acts: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor) -> None:
        """x̂ = acts @ W_dec + b_dec, over all features."""
        if self._exchange is None or self._exchange.whole_rows:
            self._product(out, acts, W_dec, b_dec)
            return
        self._product(out, acts, W_dec)
        self._exchange.add_features_(out)
        out.add_(b_dec)

    def _blocks(self, rows: int, d_sae: int, x: torch.Tensor) -> list[slice]:
        """Blocks of nearly equal size, whose buffers take at most _BLOCK_BYTES."""
        most = self._block_rows
        if most is None:
            by_memory = max(_MIN_BLOCK_ROWS, _BLOCK_BYTES // (d_sae * x.element_size()))
            most = by_memory if x.device.type == "cpu" else rows
        if not rows:
            return []
        count = -(-rows // most)
        size = -(-rows // count)
        return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]

    def _operand(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self._matmul_dtype is None else weight.to(self._matmul_dtype)

    def _product(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """out = a @ b (+ bias); b is in the matmul dtype already."""
        if self._matmul_dtype is not None:
            out.copy_(a.to(self._matmul_dtype) @ b)
            if bias is not None:
                out.add_(bias)
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)

    def _accumulate(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
        """total = aᵀ @ b for the first block, total += aᵀ @ b for the others."""
        if self._matmul_dtype is not None:
            product = a.to(self._matmul_dtype).t() @ b.to(self._matmul_dtype)
            total.copy_(product) if first else total.add_(product)
        elif first:
            torch.mm(a.t(), b, out=total)
        else:
            total.addmm_(a.t(), b)

"""The training step's loss and gradients in closed form, dense: five matrix products and no autograd graph.

Against plain autograd it keeps two [rows, F] buffers instead of about eight, reuses them from step to step, works in
blocks of rows that fit the cache, and forms no product with W_encᵀ (x needs no gradient).
"""

from __future__ import annotations

import torch

from nsae_cli.kernels.types import Activation, Penalty, StepResult, Weights

#: Rows per block are chosen so that one [rows, F] float32 buffer takes at most this many bytes.
_BLOCK_BYTES = 32 * 2**20
_MIN_BLOCK_ROWS = 256


class DenseStep:
    """Callable with `reference.step_gradients`' signature; holds the buffers that steps of one shape share.

    Args:
        matmul_dtype: dtype of the matrix products (bfloat16 on CUDA); None computes in the dtype of x. Sums over rows
            and everything element-wise stay in the dtype of x.
    """

    def __init__(self, matmul_dtype: torch.dtype | None = None) -> None:
        self._matmul_dtype = matmul_dtype
        self._buffers: dict[str, torch.Tensor] = {}

    def _buffer(self, name: str, rows: int, like: torch.Tensor, width: int) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.shape[0] < rows
            or buffer.shape[1] != width
            or buffer.dtype != like.dtype
            or buffer.device != like.device
        ):
            buffer = torch.empty(rows, width, dtype=like.dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer[:rows]

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
    ) -> StepResult:
        """See `reference.step_gradients`."""
        rows, d_sae = x.shape[0], weights.b_enc.shape[0]
        for gradient in gradients.tensors():
            gradient.zero_()
        norms = weights.W_dec.norm(dim=1) if penalty.uses_decoder_norms else None
        norm_gradient = torch.zeros_like(weights.b_enc) if norms is not None else None
        matmul = self._cast(weights)
        result = StepResult(
            x_hat=torch.empty_like(x),
            sq_error=x.new_empty(rows),
            penalty=x.new_empty(rows),
            l0=x.new_empty(rows),
            l1=x.new_empty(rows),
            fired=torch.zeros(d_sae, dtype=torch.bool, device=x.device),
        )
        block = self._block_rows(rows, d_sae, x)
        for start in range(0, rows, block):
            part = slice(start, min(rows, start + block))
            self._block(
                part, x, weights, matmul, gradients, activation, penalty, error_weight[part], sparsity_weight[part],
                None if noise is None else noise[part], norms, norm_gradient, result,
            )  # fmt: skip
        if norms is not None and norm_gradient is not None:
            # ∂‖d_i‖/∂d_i = d_i/‖d_i‖; a zero row has no direction and torch's own norm gives it gradient 0.
            gradients.W_dec.addcmul_(weights.W_dec, (norm_gradient / norms.clamp_min(1e-30))[:, None])
        return result

    def _block_rows(self, rows: int, d_sae: int, x: torch.Tensor) -> int:
        if x.device.type != "cpu":
            return rows
        return max(1, min(rows, max(_MIN_BLOCK_ROWS, _BLOCK_BYTES // (d_sae * x.element_size()))))

    def _cast(self, weights: Weights) -> Weights:
        if self._matmul_dtype is None:
            return weights
        return weights.to(self._matmul_dtype)

    def _block(
        self,
        part: slice,
        x: torch.Tensor,
        weights: Weights,
        matmul: Weights,
        gradients: Weights,
        activation: Activation,
        penalty: Penalty,
        error_weight: torch.Tensor,
        sparsity_weight: torch.Tensor,
        noise: torch.Tensor | None,
        norms: torch.Tensor | None,
        norm_gradient: torch.Tensor | None,
        result: StepResult,
    ) -> None:
        xb = x[part]
        rows, d_sae = xb.shape[0], weights.b_enc.shape[0]
        acts = self._buffer("acts", rows, x, d_sae)
        self._product(acts, weights.b_enc, xb, matmul.W_enc)
        if noise is not None:
            acts.add_(noise)
        activation.value_(acts)
        x_hat = result.x_hat[part]
        self._product(x_hat, weights.b_dec, acts, matmul.W_dec)
        error = x_hat - xb
        result.sq_error[part] = torch.linalg.vecdot(error, error)
        result.l1[part] = acts.sum(dim=1)
        result.l0[part] = torch.count_nonzero(acts, dim=1).to(x.dtype)
        result.fired |= acts.amax(dim=0) > 0
        if penalty.name == "l1":
            result.penalty[part] = result.l1[part]
        else:
            result.penalty[part] = penalty.value(acts, norms).sum(dim=1)

        error.mul_((2 * error_weight)[:, None])
        gradients.b_dec.add_(error.sum(dim=0))
        self._accumulate(gradients.W_dec, acts, error)
        delta = self._buffer("delta", rows, x, d_sae)
        self._product(delta, None, error, matmul.W_dec.t())
        act_slope, norm_slope = penalty.slopes(acts, norms)
        if isinstance(act_slope, torch.Tensor):
            delta.addcmul_(act_slope.expand_as(delta), sparsity_weight[:, None])
        else:
            delta.add_(sparsity_weight[:, None] * act_slope)
        if norm_gradient is not None and isinstance(norm_slope, torch.Tensor):
            norm_gradient.add_(sparsity_weight @ norm_slope.expand_as(delta))
        activation.scale_by_derivative_(delta, acts)
        gradients.b_enc.add_(delta.sum(dim=0))
        self._accumulate(gradients.W_enc, xb, delta)

    def _product(self, out: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> None:
        """out = a @ b (+ bias), in the matmul dtype where there is one."""
        if self._matmul_dtype is not None:
            out.copy_(a.to(self._matmul_dtype) @ b)
            if bias is not None:
                out.add_(bias)
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)

    def _accumulate(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """total += aᵀ @ b."""
        if self._matmul_dtype is not None:
            total.add_(a.to(self._matmul_dtype).t() @ b.to(self._matmul_dtype))
        else:
            total.addmm_(a.t(), b)

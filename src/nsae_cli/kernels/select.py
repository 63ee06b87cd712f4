"""The one place that chooses a training step's kernel, and says why.

A kernel is chosen once per run from the device, the compiled loops and the options, and once per step from the density
of the step before: a dense step costs the same whatever is active, a sparse one grows with what is.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nsae_cli import catalogue
from nsae_cli.kernels import calibration, certified
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.distance import SQUARED_ERROR
from nsae_cli.kernels.entries import SparseOps, TooManyEntriesError
from nsae_cli.kernels.native import library
from nsae_cli.kernels.native_ops import NativeOps
from nsae_cli.kernels.options import KernelOption, PrecisionOption
from nsae_cli.kernels.sparse import SparseStep
from nsae_cli.kernels.torch_ops import TorchOps
from nsae_cli.kernels.types import Activation, Distance, Exchange, StepResult, Weights
from nsae_cli.kernels.update import GradientBuffer, Gradients

SparseKind = Literal["native", "torch", "triton"]

#: A step stays with its kernel until the density is this factor past the cross-over: no flicker around it.
_HYSTERESIS = 1.15
#: With a dense step beside it, a Triton step gives a batch back that is denser than this, instead of taking the memory.
_MOST_DENSITY = 0.1
#: So often a sparse step may give a batch back before a run stays with dense steps.
_MOST_REFUSALS = 3


@dataclass(frozen=True)
class Choice:
    """What a run steps with.

    Attributes:
        name: for the log and run.json.
        reason: why, for the log.
        device: where.
        sparse: kind of the sparse step, ``native``, ``torch`` or ``triton``; None if there is none.
        certified: whether it encodes in bfloat16 with a bound.
        dense: whether there is a dense step.
        dense_dtype: of the dense step's products; None for the dtype of x.
    """

    name: str
    reason: str
    device: torch.device
    sparse: SparseKind | None
    certified: bool
    dense: bool
    dense_dtype: torch.dtype | None

    def make(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        distance: Distance = SQUARED_ERROR,
        exchange: Exchange | None = None,
    ) -> AdaptiveKernel:
        """The kernel of one SAE: it keeps what it knows of the SAE's weights and density.

        Args:
            d_in, d_sae: of the features that are here.
            activation, distance: of the SAE.
            exchange: of dense steps, with other processes.
        """
        if self.sparse is not None and not _steps_sparsely(distance):
            assert self.dense, "`choose` was not told of this distance"
            return dataclasses.replace(self, sparse=None).make(d_in, d_sae, activation, distance, exchange)
        sparse = None if self.sparse is None else SparseStep(self._ops())
        dense = DenseStep(self.dense_dtype, exchange=exchange) if self.dense else None
        crossover = calibration.crossover(self.kind, self.device, d_in, d_sae) if sparse and dense else None
        if crossover is not None and self.sparse == "triton":
            crossover = min(crossover, _MOST_DENSITY / _HYSTERESIS)  # denser steps it would only give back
        top_k = activation.selection.top_k
        density = None if top_k is None else top_k / d_sae
        return AdaptiveKernel(dense, sparse, crossover, density)

    def _ops(self) -> SparseOps:
        if self.sparse == "triton":
            from nsae_cli.kernels.triton_ops import TritonOps  # there on Linux only, and takes a while

            return TritonOps(
                self.certified,
                torch.are_deterministic_algorithms_enabled(),
                most_density=_MOST_DENSITY if self.dense else 1.0,
            )
        loops = library.load() if self.sparse == "native" else None
        return TorchOps() if loops is None else NativeOps(loops, self.certified)

    @property
    def kind(self) -> str:
        """Which cross-over applies: ``native-certified``, ``triton-fp32``, …, ``torch`` or ``none``."""
        if self.sparse in ("native", "triton"):
            return f"{self.sparse}-{'certified' if self.certified else 'fp32'}"
        return self.sparse or "none"


def _steps_sparsely(distance: Distance) -> bool:
    """Whether sparse steps cover a loss: their passes form x̂ − x and its products with decoder rows, nothing else."""
    return distance == SQUARED_ERROR


def choose(
    kernel: KernelOption,
    precision: PrecisionOption,
    device: torch.device,
    distances: Collection[Distance] = (SQUARED_ERROR,),
) -> Choice:
    """What a run on this device steps with.

    Args:
        kernel: ``auto`` (by density), ``dense`` or ``sparse``.
        precision: of the encoder's product in sparse steps: ``fp32``, ``certified`` (a bfloat16 product and a bound;
            the active set and the values are those of float32), or ``auto``: certified where the processor multiplies
            bfloat16 and the compiled loops are there.
        device: where the training runs. On CUDA the dense step multiplies in bfloat16 with float32 master weights,
            or in float32 if `precision` says so; the sparse step is Triton's.
        distances: of the losses of the run's SAEs. Those that sparse steps do not cover are stepped densely.

    Raises:
        UsageError: the sparse step or the certified encoder is asked for where it is not there.
    """
    dense_only = [distance for distance in distances if not _steps_sparsely(distance)]
    if not dense_only:
        return _choose(kernel, precision, device)
    name = dense_only[0].name
    all_dense = len(dense_only) == len(distances)
    if kernel == "sparse" or (precision == "certified" and all_dense):
        option = "--kernel sparse" if kernel == "sparse" else "--precision certified"
        raise catalogue.REFUSED_COMBINATION(
            f"{option}: sparse steps have the squared error only, no {name}; leave {option} out"
        )
    choice = _choose("dense" if all_dense else kernel, precision, device)
    if choice.sparse is not None:
        return dataclasses.replace(choice, reason=f"{choice.reason}; {name}: always dense")
    why = "asked for" if kernel == "dense" else f"sparse steps have the squared error only, no {name}"
    return dataclasses.replace(choice, reason=choice.reason.replace("asked for", why)) if all_dense else choice


def _choose(kernel: KernelOption, precision: PrecisionOption, device: torch.device) -> Choice:
    if kernel == "dense" and precision == "certified":
        raise catalogue.REFUSED_COMBINATION(
            "--kernel dense with --precision certified: only sparse steps have a certified encoder; "
            "use --kernel sparse or --precision fp32"
        )
    if device.type == "cuda":
        return _cuda_choice(kernel, precision, device)
    if device.type != "cpu":
        if kernel == "sparse" or precision == "certified":
            option = "--kernel sparse" if kernel == "sparse" else "--precision certified"
            raise catalogue.KERNEL_MISSING(
                f"{option}: only on the CPU, and on CUDA with triton; leave it out or use --device cpu"
            )
        return Choice("dense", f"{device.type}: fp32", device, None, False, True, None)
    if kernel == "dense":
        return Choice("dense", "asked for; fp32, closed-form gradients", device, None, False, True, None)
    loops = library.load()
    if loops is None:
        if precision == "certified":
            raise catalogue.KERNEL_MISSING(
                "--precision certified needs nsae's compiled loops, which this installation lacks; install a C "
                "compiler and reinstall nsae, or use --precision fp32"
            )
        why = "no compiled loops in this installation: torch's CSR products, fp32 encoder"
        return _cpu_choice(kernel, why, device, "torch", False)
    certify = precision == "certified" or (precision == "auto" and certified.has_bf16_products())
    if certify:
        encoder = "certified bf16 encoder" + ("" if certified.has_bf16_products() else ", slow without bf16 hardware")
    else:
        encoder = "fp32 encoder" + (", no bf16 products in this processor" if precision == "auto" else "")
    return _cpu_choice(kernel, f"{loops.isa}, {encoder}", device, "native", certify)


def _cuda_choice(kernel: KernelOption, precision: PrecisionOption, device: torch.device) -> Choice:
    bf16 = precision == "auto"
    dense = f"{'bf16 products, fp32 master weights' if bf16 else 'fp32'}"
    matmul_dtype = torch.bfloat16 if bf16 else None
    has_triton = importlib.util.find_spec("triton") is not None
    certify = precision != "fp32"
    triton = f"Triton, {'certified bf16 encoder' if certify else 'fp32 encoder'}"
    if not has_triton and (kernel == "sparse" or precision == "certified"):
        option = "--kernel sparse" if kernel == "sparse" else "--precision certified"
        raise catalogue.KERNEL_MISSING(
            f"{option}: only on the CPU, and on CUDA with triton; leave it out or use --device cpu"
        )
    if kernel == "sparse":
        return Choice("sparse", f"asked for; {triton}", device, "triton", certify, False, None)
    kind = f"triton-{'certified' if certify else 'fp32'}"
    if kernel == "auto" and has_triton and calibration.crossover(kind, device, 1, 1) is not None:
        why = f"dense or sparse by density; {triton}; {dense} in dense steps"
        return Choice("auto", why, device, "triton", certify, True, matmul_dtype)
    if precision == "certified":
        raise catalogue.KERNEL_MISSING(
            "--precision certified on CUDA: give --kernel sparse too, or run `nsae bench --calibrate` first"
        )
    why = f"cuda: {dense}"
    if kernel == "auto" and has_triton:
        why += "; sparse steps only once `nsae bench --calibrate` has timed them on this GPU"
    return Choice("dense", why, device, None, False, True, matmul_dtype)


def _cpu_choice(
    kernel: KernelOption, why: str, device: torch.device, sparse: Literal["native", "torch"], certify: bool
) -> Choice:
    if kernel == "sparse":
        return Choice("sparse", f"asked for; {why}", device, sparse, certify, False, None)
    return Choice("auto", f"dense or sparse by density; {why}", device, sparse, certify, True, None)


class AdaptiveKernel:
    """A dense and a sparse step of one SAE, and which of them is next.

    Args:
        dense, sparse: at least one of them.
        crossover: density at which both take the same time; None where there is one kernel only.
        density: known before the first step (k/d_sae), or None.
    """

    def __init__(
        self, dense: DenseStep | None, sparse: SparseStep | None, crossover: float | None, density: float | None
    ) -> None:
        assert dense or sparse
        self._dense, self._sparse = dense, sparse
        self._crossover = crossover
        self._refused = 0
        # Before the first step about half of the features are active, unless the activation says otherwise.
        self._use_sparse = dense is None or (sparse is not None and density is not None and density < (crossover or 0))

    @property
    def name(self) -> str:
        """Of the step that is next."""
        return self._current().name

    def describe(self) -> dict[str, Any]:
        """For run.json: the steps that there are, and the density at which they change places."""
        return {
            "dense": self._dense.name if self._dense else None,
            "sparse": self._sparse.name if self._sparse else None,
            "crossover_density": self._crossover,
        }

    def _current(self) -> DenseStep | SparseStep:
        chosen = self._sparse if self._use_sparse else self._dense
        assert chosen is not None
        return chosen

    def backward(self, x: torch.Tensor, weights: Weights, into: GradientBuffer, **arguments: Any) -> Gradients:
        """Loss terms and gradients, see `SparseStep.backward`; chooses the next step's kernel by this one's density."""
        try:
            gradients: Gradients = self._current().backward(x, weights, into, **arguments)
        except TooManyEntriesError:
            if self._dense is None:
                raise
            self._use_sparse = False
            self._refused += 1
            gradients = self._dense.backward(x, weights, into, **arguments)
        # One that keeps giving batches back always does, as where batch-top-k has to look at all that is positive.
        if self._crossover is not None and len(x) and self._refused < _MOST_REFUSALS:
            density = float(gradients.result.l0.mean()) / len(weights.b_enc)
            if self._use_sparse and density > self._crossover * _HYSTERESIS:
                self._use_sparse = False
            elif not self._use_sparse and density < self._crossover / _HYSTERESIS:
                self._use_sparse = True
                into.release()
        return gradients

    def gradients(self, x: torch.Tensor, weights: Weights, gradients: Weights, **arguments: Any) -> StepResult:
        """Loss terms and gradients of other rows, by the kernel that is next; what the steps go by stays as it is.

        Args:
            x, weights, gradients, arguments: see `reference.step_gradients`.
        """
        try:
            return self._current()(x, weights, gradients, **arguments)
        except TooManyEntriesError:
            if self._dense is None:
                raise
            return self._dense(x, weights, gradients, **arguments)

    def state(self) -> dict[str, torch.Tensor]:
        """What the next step's choice depends on, for a checkpoint: a resumed run goes on with the same kernel."""
        crossover = torch.tensor(self._crossover or 0.0, dtype=torch.float64)
        return {
            "sparse": torch.tensor(self._use_sparse),
            "crossover": crossover,
            "refused": torch.tensor(self._refused),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from `state()`, as far as this installation has the kernels: else it keeps to its own."""
        if self._crossover is not None and float(state["crossover"]) > 0:
            self._use_sparse = bool(state["sparse"])
            self._crossover = float(state["crossover"])
            self._refused = int(state["refused"])

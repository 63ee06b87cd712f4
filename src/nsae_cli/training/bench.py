"""`nsae bench`: how fast this machine takes training steps, by kernel, and where dense and sparse steps change places.

Every side takes whole optimizer steps (forward, gradients, projection, Adam, unit rows) from the same weights on the
same synthetic rows: x ~ N(0, 1), unit encoder columns, and a bias per feature that makes it fire at a rate of its own,
log-normal with σ = 1.5 as trained SAEs' rates roughly are. Rounds alternate between the sides; the first is not
counted. The learning rate is so small that L0 stays what it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from nsae_cli import catalogue
from nsae_cli.device import DeviceOption, choose_device, one_thread_if_small
from nsae_cli.kernels import calibration, certified, scratch
from nsae_cli.kernels.native import library
from nsae_cli.kernels.options import KernelOption, PrecisionOption
from nsae_cli.kernels.select import Choice, choose
from nsae_cli.kernels.types import Weights
from nsae_cli.reporter import Reporter
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows
from nsae_cli.training.cell import Cell
from nsae_cli.training.options import TrainOptions, expand_cells
from nsae_cli.values import Size

_SPREAD = 1.5
_BETA = 0.1
_LR = 1e-7
_DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45)
_CALIBRATION_SHAPES = ((64, 512, 512), (768, 6144, 1024))
_CALIBRATION_ROUNDS = 3

Step = Callable[[], object]


class BenchOptions(BaseModel):
    """Options of `nsae bench`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    d_in: Size = Field(768, gt=0, description="width of the rows")
    d_sae: Size = Field(6144, gt=0, description="number of features")
    batch_size: Size = Field(1024, gt=0, description="rows per step")
    l0: Size = Field(64, gt=0, description="active features per row")
    rounds: Size = Field(5, gt=0, description="counted rounds")
    threads: Size | None = Field(None, gt=0, description="threads on the CPU; None takes torch's")
    device: DeviceOption = "auto"
    calibrate: bool = Field(False, description="measure cross-overs and keep them")


@dataclass(frozen=True)
class Synthetic:
    """Rows and weights of a known density, float32.

    Attributes:
        x: [B, d]
        weights: a relu SAE's
    """

    x: torch.Tensor
    weights: Weights

    @classmethod
    def make(cls, d_in: int, d_sae: int, rows: int, l0: float, device: torch.device) -> Synthetic:
        """Features fire at log-normal rates with mean l0/d_sae, none more often than in 9 of 10 rows."""
        generator = torch.Generator().manual_seed(0)
        W_dec = torch.randn(d_sae, d_in, generator=generator)
        W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
        rates = torch.exp(_SPREAD * torch.randn(d_sae, generator=generator, dtype=torch.float64))
        for _ in range(50):  # the cap takes some of the mean away; what is left is raised to make up for it
            rates = (rates * (l0 / rates.sum())).clamp_max(0.9)
        b_enc = torch.special.ndtri(rates).float()  # x·w ~ N(0, 1), so P(x·w > −b) = Φ(b)
        weights = Weights(W_dec.t(), b_enc, W_dec, torch.zeros(d_in))
        x = torch.randn(rows, d_in, generator=generator)
        return cls(x.to(device), Weights(*(t.to(device, copy=True) for t in weights.tensors())).by_feature())

    def rows(self) -> HookRows:
        """The rows as the trainer takes them."""
        norm = torch.linalg.vector_norm(self.x, dim=1)
        zero = torch.zeros(len(norm), dtype=torch.bool, device=norm.device)
        return HookRows(self.x, norm, zero.long(), zero)


class NsaeSide:
    """nsae's step as `nsae train` takes it.

    Args:
        data: rows and first weights.
        kernel: what to step with.
        lr: learning rate.
    """

    def __init__(self, data: Synthetic, kernel: Choice, lr: float = _LR) -> None:
        d_sae, d_in = data.weights.W_dec.shape
        options = TrainOptions.model_validate(
            {"d_sae": d_sae, "batch_size": len(data.x), "tokens": 10**15, "lr": lr, "lr_warm_up": 0, "alpha_warm_up": 0}
        )
        [config] = expand_cells(options, ["blocks.0.hook_resid_post"], d_in, 1).values()
        self._cell = Cell(
            config, Objective("relu", 0, 0, "l1", _BETA, 1.0), data.weights.to(torch.float32), kernel, 1.0
        )
        self._rows = data.rows()
        self._taken = 0
        self._l0 = torch.zeros(())

    def step(self) -> None:
        """Takes a step."""
        self._l0 = self._cell.train_step(self._rows, self._taken).result.l0.mean()
        self._taken += 1

    @property
    def l0(self) -> float:
        """Of the last step."""
        return float(self._l0)

    @property
    def weights(self) -> Weights:
        """As they are now."""
        return self._cell.weights


class AutogradSide:
    """The same algorithm as one would write it in plain torch: autograd, `torch.optim.Adam(fused=True)`.

    Args:
        data: rows and first weights.
        lr: learning rate.
    """

    def __init__(self, data: Synthetic, lr: float = _LR) -> None:
        self.weights = data.weights.to(torch.float32)
        self._x = data.x
        self._optimizer = torch.optim.Adam([t.requires_grad_() for t in self.weights.tensors()], lr=lr, fused=True)

    def step(self) -> None:
        """Takes a step."""
        W_enc, b_enc, W_dec, b_dec = self.weights.tensors()
        acts = torch.relu(self._x @ W_enc + b_enc)
        error = acts @ W_dec + b_dec - self._x
        loss = error.square().sum(dim=1).mean() + _BETA * acts.sum(dim=1).mean()
        self._optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad.sub_(torch.linalg.vecdot(W_dec.grad, W_dec)[:, None] * W_dec)
            self._optimizer.step()
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))


def bench(options: BenchOptions, reporter: Reporter) -> dict[str, Any]:
    """Measures; with `calibrate`, also keeps the cross-overs in the user's cache.

    Returns:
        What `--json` prints: {machine, device, torch, shape or points, sides or kinds}, seconds per step.

    Raises:
        UsageError: more active features than there are.
        ResourceError: the device is missing.
    """
    device, why = choose_device(options.device)
    if options.l0 > 0.9 * options.d_sae:
        raise catalogue.OPTION_DOES_NOT_FIT(
            f"--l0 {options.l0}: more than 9 of 10 of --d-sae {options.d_sae}; give a smaller one"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    product = options.batch_size * options.d_in * options.d_sae
    try:
        reporter.note(f"device {why}")
        if options.calibrate:
            return calibrate(device, reporter)
        # As in training: small steps take one thread, unless a number is asked for.
        with contextlib.nullcontext() if options.threads else one_thread_if_small(product, device):
            return compare(options, device, reporter)
    finally:
        torch.set_num_threads(before)
        scratch.clear()


def compare(options: BenchOptions, device: torch.device, reporter: Reporter) -> dict[str, Any]:
    """Seconds per step of every kernel that this installation has, beside plain torch and the bare encoder product."""
    data = Synthetic.make(options.d_in, options.d_sae, options.batch_size, options.l0, device)
    ours = {name: NsaeSide(data, kernel) for name, kernel in available(device).items()}
    sides: dict[str, Step] = {"plain torch autograd": AutogradSide(data).step}
    sides |= {name: side.step for name, side in ours.items()}
    sides |= encoder_products(data)
    seconds = interleaved(sides, options.rounds, device, reporter)
    base = statistics.median(seconds["plain torch autograd"])
    return {
        "machine": calibration.machine(device),
        "device": str(device),
        "shape": {name: getattr(options, name) for name in ("d_in", "d_sae", "batch_size")},
        "rounds": options.rounds,
        "sides": [
            {
                "side": name,
                "l0": ours[name].l0 if name in ours else None,
                **_spread(values),
                "rows_per_second": options.batch_size / statistics.median(values),
                "times_as_fast_as_autograd": base / statistics.median(values),
            }
            for name, values in seconds.items()
        ],
    }


def available(device: torch.device) -> dict[str, Choice]:
    """Every kernel that this installation has for a device, by a name for the table."""
    asked: list[tuple[str, KernelOption, PrecisionOption]] = [("nsae dense", "dense", "auto")]
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if device.type == "cpu" or has_triton:
        asked.append(("nsae sparse, fp32 encoder", "sparse", "fp32"))
    if has_triton or (device.type == "cpu" and library.load() is not None):
        asked.append(("nsae sparse, certified encoder", "sparse", "certified"))
    return {name: choose(kernel, precision, device) for name, kernel, precision in asked}


def encoder_products(data: Synthetic) -> dict[str, Step]:
    """The encoder's product alone, in float32 and, where the processor has it, in bfloat16."""
    x, encoder = data.x, data.weights.W_enc.t().contiguous()
    products: dict[str, Step] = {"encoder product alone, fp32": lambda: torch.mm(x, encoder.t())}
    if x.device.type != "cpu" or certified.has_bf16_products():
        x16, encoder16 = x.bfloat16(), encoder.bfloat16()
        products["encoder product alone, bf16"] = lambda: torch.mm(x16, encoder16.t())
    return products


def interleaved(
    sides: dict[str, Step], rounds: int, device: torch.device, reporter: Reporter
) -> dict[str, list[float]]:
    """Seconds per step of each side in rounds that alternate their order; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with reporter.task("measuring", rounds + 1, "rounds") as task:
        for number in range(rounds + 1):
            for name in sides if number % 2 else reversed(sides):
                _finish(device)
                began = time.perf_counter()
                sides[name]()
                _finish(device)
                if number:
                    seconds[name].append(time.perf_counter() - began)
            task.advance(1)
    return seconds


def calibrate(device: torch.device, reporter: Reporter) -> dict[str, Any]:
    """Measures the cross-over density of every sparse kernel at a small and a large shape and keeps it.

    Raises:
        UsageError: there is no sparse kernel for the device.
    """
    kernels = available(device)
    dense = kernels.pop("nsae dense")
    if not kernels:
        raise catalogue.KERNEL_MISSING(f"--calibrate: there is one kernel only on {device.type}; leave it out")
    points: list[calibration.Point] = []
    table = []
    for d_in, d_sae, batch in _CALIBRATION_SHAPES:
        # As in training: small steps take one thread, and what is measured holds for that number.
        with one_thread_if_small(batch * d_in * d_sae, device):
            here = calibration.machine(device)
            ratios = _ratios(d_in, d_sae, batch, dense, kernels, device, reporter)
        for name, kernel in kernels.items():
            found = crossing(_DENSITIES, ratios[name])
            points.append(calibration.Point(here, kernel.kind, d_in, d_sae, found))
            speedups = dict(zip(map(str, _DENSITIES), ratios[name], strict=True))
            table.append({"kernel": name, "d_in": d_in, "d_sae": d_sae, "batch_size": batch, "crossover": found,
                          "dense_over_sparse": speedups})  # fmt: skip
    calibration.save_points(points)
    reporter.note(f"kept in {calibration.cache_file()}; `nsae train` uses them from now on")
    return {"machine": calibration.machine(device), "device": str(device), "crossovers": table}


def _ratios(
    d_in: int,
    d_sae: int,
    batch: int,
    dense: Choice,
    kernels: dict[str, Choice],
    device: torch.device,
    reporter: Reporter,
) -> dict[str, list[float]]:
    """Dense step's time over each sparse step's, by density."""
    ratios: dict[str, list[float]] = {name: [] for name in kernels}
    for density in _DENSITIES:
        data = Synthetic.make(d_in, d_sae, batch, density * d_sae, device)
        sides: dict[str, Step] = {
            name: NsaeSide(data, kernel).step for name, kernel in {"dense": dense, **kernels}.items()
        }
        seconds = interleaved(sides, _CALIBRATION_ROUNDS, device, reporter)
        of_dense = statistics.median(seconds["dense"])
        for name in kernels:
            ratios[name].append(of_dense / statistics.median(seconds[name]))
    return ratios


def crossing(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """Where dense ÷ sparse falls through 1, between the measured densities (both logarithms interpolated linearly).

    The first or the last density where it never does: there is no telling beyond what was measured.
    """
    for low, high, above, below in zip(densities, densities[1:], ratios, ratios[1:], strict=False):
        if above >= 1 > below:
            share = math.log(above) / (math.log(above) - math.log(below))
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return densities[-1] if ratios[-1] >= 1 else densities[0]


def _spread(values: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else (values[0], values[0])
    return {"median_s": statistics.median(values), "p20_s": low, "p80_s": high}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

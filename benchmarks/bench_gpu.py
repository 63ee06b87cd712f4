"""The sparse step in Triton on a GPU: is it right, is it the same each time, and how fast is it next to dense steps?

    python benchmarks/bench_gpu.py                                   # three shapes, L0 32, 64 and 128
    python benchmarks/bench_gpu.py --tile 128,64,64,4,3              # another tile for the bfloat16 product
    python benchmarks/bench_gpu.py --device cpu --shape 24,96,40 --l0 6 --rounds 1 --repeats 2 --backend eager
                                    # without a GPU, in Triton's interpreter: shows that the script runs, no more

For every shape and L0, first the checks, on at most 2048 rows:
  values    entries, loss terms and gradients against plain autograd in float64: entries missed and added (a
            pre-activation within rounding of 0 may fall to either side), largest error relative to the largest value
  repeats   a step's entries and gradients, 50 times over: bit for bit the same? A race would show here
then the time of whole steps (forward, backward, projection, Adam, unit rows), in rounds that alternate, the first not
counted:
  products        the five products of a dense step alone, bfloat16, 10·B·d·F FLOP: the roofline of what is dense
  dense           nsae's dense step, bfloat16 products
  compiled        a plain autograd loop under torch.compile and autocast to bfloat16, with fused Adam
  triton fp32, triton certified, triton deterministic (certified, entries found without atomics)

Inputs are Gaussian rows of norm about √d; encoder rows are of length 1, and biases give each feature a firing rate of
its own, lognormal with σ = 1.5, whose mean is L0/F. Rows go to data/gpu.csv (on the CPU: nowhere).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nsae_cli
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.sparse import SparseStep
from nsae_cli.kernels.types import Weights
from nsae_cli.kernels.update import GradientBuffer, Updater
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.sae.penalty import PENALTIES

CSV = Path(__file__).parent / "data" / "gpu.csv"
HEAD = "date,device,torch,triton,nsae,tile,d_in,d_sae,batch,l0_asked,l0,what,rounds,median_s,p20_s,p80_s,tflops,note"
SHAPES = ["768,6144,4096", "768,24576,4096", "768,24576,16384"]
CHECKED_ROWS = 2048
#: So small that density stays what it was during the measurement.
LR = 1e-7
BETA = 0.5


class Problem:
    """Rows and weights of one shape and L0."""

    def __init__(self, d_in: int, d_sae: int, batch: int, l0: float, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, d_in, generator=generator).to(device)
        encoder = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator))
        rate = torch.exp(1.5 * torch.randn(d_sae, generator=generator, dtype=torch.float64))
        rate = (rate * (l0 / d_sae / rate.mean())).clamp(1e-6, 0.9)
        b_enc = torch.special.ndtri(rate).float()
        self.weights = Weights(encoder.t(), b_enc, encoder.clone(), torch.zeros(d_in)).to(torch.float32).by_feature()
        self.weights = Weights(*(tensor.to(device) for tensor in self.weights.tensors()))

    def arguments(self, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Of a step on the first rows."""
        share = torch.full((rows,), 1 / rows, dtype=dtype, device=self.x.device)
        return {
            "activation": NONLINEARITIES["relu"],
            "penalty": PENALTIES["l1"],
            "error_weight": share,
            "sparsity_weight": share * BETA,
        }

    def copy(self) -> Weights:
        """The weights anew, for one side to train."""
        return self.weights.to(torch.float32).by_feature()


def sparse_sides() -> dict[str, Callable[[], SparseStep]]:
    """The sparse steps by name. Imported here, since the interpreter is chosen when triton is imported."""
    from nsae_cli.kernels.triton_ops import TritonOps

    return {
        "triton fp32": lambda: SparseStep(TritonOps(certified=False)),
        "triton certified": lambda: SparseStep(TritonOps(certified=True)),
        "triton deterministic": lambda: SparseStep(TritonOps(certified=True, deterministic=True)),
    }


def check(problem: Problem, repeats: int) -> dict[str, tuple[float, str]]:
    """L0 and a sentence on values and repeats, for each sparse step."""
    rows = min(CHECKED_ROWS, len(problem.x))
    x, weights = problem.x[:rows].contiguous(), problem.weights
    wide = Weights(*(tensor.double() for tensor in weights.tensors()))
    exact_gradients = wide.zeros_like()
    exact = step_gradients(x.double(), wide, exact_gradients, **problem.arguments(rows, torch.float64))
    exact_active = x.double() @ wide.W_enc + wide.b_enc > 0
    notes = {}
    for name, make in sparse_sides().items():
        step, gradients = make(), weights.zeros_like()
        result = step(x, weights, gradients, **problem.arguments(rows))
        entries = step._ops.active(x, weights, weights.b_enc, noise=None, threshold=0.0, top_k=None)
        active = torch.zeros_like(exact_active)
        active[entries.rows(), entries.cols.long()] = True
        missed, added = int((exact_active & ~active).sum()), int((active & ~exact_active).sum())
        errors = {"error": relative_error(result.error, exact.error)}
        for parameter, gradient in gradients.named().items():
            errors[parameter] = relative_error(gradient, exact_gradients.named()[parameter])
        differing = 0
        for _ in range(repeats):
            again = weights.zeros_like()
            found = step(x, weights, again, **problem.arguments(rows))
            anew = step._ops.active(x, weights, weights.b_enc, noise=None, threshold=0.0, top_k=None)
            pairs = [*zip(gradients.tensors(), again.tensors(), strict=True), (result.error, found.error)]
            pairs += [(entries.row_ptr, anew.row_ptr), (entries.cols, anew.cols), (entries.pre_acts, anew.pre_acts)]
            differing += not all(torch.equal(a, b) for a, b in pairs)
        note = f"missed {missed} added {added}; " + " ".join(f"{key} {value:.1e}" for key, value in errors.items())
        notes[name] = (float(result.l0.mean()), f"{note}; {differing} of {repeats} repeats differ")
    return notes


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def nsae_side(step: SparseStep | DenseStep, problem: Problem) -> Callable[[], torch.Tensor]:
    """A function that takes the next whole step and returns its loss, on the device."""
    weights = problem.copy()
    updater, into, arguments = (
        Updater(weights, "unit", None),
        GradientBuffer(weights),
        problem.arguments(len(problem.x)),
    )

    def take() -> torch.Tensor:
        gradients = step.backward(problem.x, weights, into, **arguments)
        updater.step(gradients, LR)
        return (gradients.result.sq_error + BETA * gradients.result.penalty).mean()

    return take


def compiled_side(problem: Problem, backend: str) -> Callable[[], torch.Tensor]:
    """The same in plain torch: autograd, autocast, torch.compile, fused Adam."""
    parameters = [tensor.requires_grad_() for tensor in problem.copy().tensors()]
    W_enc, b_enc, W_dec, b_dec = parameters
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            acts = torch.relu(x @ W_enc + b_enc)
            x_hat = acts @ W_dec
        return (x_hat.float() + b_dec - x).pow(2).sum(1).mean() + BETA * acts.float().sum(1).mean()

    compiled = torch.compile(loss_of, backend=backend)

    def take() -> torch.Tensor:
        loss = compiled(problem.x)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss.detach()

    return take


def products_side(problem: Problem) -> Callable[[], torch.Tensor]:
    """The five products of a dense step and nothing else."""
    x, W_enc = problem.x.bfloat16(), problem.weights.W_enc.bfloat16()
    W_dec, acts = (
        problem.weights.W_dec.bfloat16(),
        torch.zeros(len(problem.x), W_enc.shape[1], device=x.device).bfloat16(),
    )

    def take() -> torch.Tensor:
        for a, b in ((x, W_enc), (acts, W_dec), (acts.t(), x), (x, W_dec.t())):
            torch.mm(a, b)
        return torch.mm(x.t(), acts)[0, 0]

    return take


def measure(problem: Problem, rounds: int, backend: str) -> dict[str, list[float]]:
    """Seconds per step of each side."""
    sides = {"products": products_side(problem), "dense": nsae_side(DenseStep(torch.bfloat16), problem)}
    sides["compiled"] = compiled_side(problem, backend)
    sides |= {name: nsae_side(make(), problem) for name, make in sparse_sides().items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    steps = 10 if problem.x.device.type == "cuda" else 1
    for number in range(rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            synchronize(problem.x.device)
            began = time.perf_counter()
            for _ in range(steps):
                loss = sides[name]()
            synchronize(problem.x.device)
            losses[name] = float(loss)
            if number:
                seconds[name].append((time.perf_counter() - began) / steps)
    del losses["products"]
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise SystemExit(f"the sides do not train alike: losses {losses}")
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def record(base: list[object], rows: list[list[object]]) -> None:
    """Appends rows to the table."""
    CSV.parent.mkdir(exist_ok=True)
    new = not CSV.exists()
    with CSV.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(HEAD.split(","))
        writer.writerows([*base, *row] for row in rows)


def main() -> None:
    """Checks, measures and prints."""
    parser = argparse.ArgumentParser(description="the Triton step against float64, itself, and dense steps")
    parser.add_argument("--shape", action="append", help="d_in,d_sae,batch; may be repeated")
    parser.add_argument("--l0", type=float, action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--tile", help="rows,features,depth,warps,stages of the bfloat16 product's tiles")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import triton

    from nsae_cli.kernels import triton_ops

    if arguments.tile:
        triton_ops._TILE_BF16 = tuple(map(int, arguments.tile.split(",")))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, Triton's interpreter"
    tile = "×".join(map(str, triton_ops._TILE_BF16))
    versions = (torch.__version__, triton.__version__, nsae_cli.__version__)
    for text in arguments.shape or SHAPES:
        d_in, d_sae, batch = map(int, text.split(","))
        for l0 in arguments.l0 or [32.0, 64.0, 128.0]:
            problem = Problem(d_in, d_sae, batch, l0, device)
            checked = check(problem, arguments.repeats)
            found_l0 = next(iter(checked.values()))[0]
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            base = [today, name, *versions, tile, d_in, d_sae, batch, l0, f"{found_l0:.1f}"]
            print(f"d_in {d_in}, d_sae {d_sae}, batch {batch}, L0 {found_l0:.1f}, {name}", flush=True)
            for side, (_, note) in checked.items():
                print(f"  {side}: {note}", flush=True)
            seconds = measure(problem, arguments.rounds, arguments.backend)
            rows: list[list[object]] = [
                [f"check {side}", "", "", "", "", "", note] for side, (_, note) in checked.items()
            ]
            for side, values in seconds.items():
                low, *_, high = statistics.quantiles(values, n=5) if len(values) > 1 else (values[0], values[0])
                median = statistics.median(values)
                tflops = 10 * batch * d_in * d_sae / median / 1e12  # of the dense count, also where less is computed
                rows.append(
                    [side, len(values), *(f"{value:.6f}" for value in (median, low, high)), f"{tflops:.1f}", ""]
                )
                ratio = statistics.median(seconds["dense"]) / median
                print(f"  {side}: {median * 1e3:.3f} ms, {tflops:.0f} TFLOP/s dense count, dense ÷ this {ratio:.2f}")
            if device.type == "cuda":
                record(base, rows)


if __name__ == "__main__":
    main()

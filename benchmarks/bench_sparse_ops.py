"""The sparse step's inner operations on active entries: compiled loops, torch's CSR products, numba; dense for scale.

    python benchmarks/bench_sparse_ops.py                        # needs numba: `make bench-setup`
    python benchmarks/bench_sparse_ops.py --shape 768,24576,1024 --density 0.003

Operations: `scan` (the active entries of a product in memory; for the dense side relu), `decode` (x̂ − x, ‖·‖² and
error·W_dec of every active entry) and `gradients` (both weight gradients). One
thread, CPU time, medians over rounds that alternate. It is what the choice of compiled loops rests on: they have to be
faster than what installs without a compiler anyhow. numba's functions are the same loops, written as one writes numba.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import nsae_cli
from nsae_cli.kernels.calibration import machine
from nsae_cli.kernels.native.library import NativeLibrary, load
from nsae_cli.kernels.native_ops import NativeOps
from nsae_cli.kernels.torch_ops import TorchOps
from nsae_cli.kernels.types import Weights
from nsae_cli.training.bench import Synthetic
from record import append_rows, today

CSV = Path(__file__).parent / "data" / "sparse_ops.csv"
OPERATIONS = ("scan", "decode", "gradients")
DENSITIES = [0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]

Operation = Callable[[], object]


def numba_operations(data: Synthetic, entries, columns, error: torch.Tensor) -> dict[str, Operation]:
    """The same loops in numba, compiled for this processor before the first round."""
    import numba
    import numpy as np

    @numba.njit(nogil=True)
    def scan(z, bias, row_ptr, cols, values):
        found = 0
        for i in range(z.shape[0]):
            for j in range(z.shape[1]):
                v = z[i, j] + bias[j]
                if v > 0:
                    cols[found] = j
                    values[found] = v
                    found += 1
            row_ptr[i + 1] = found

    @numba.njit(fastmath=True, nogil=True)
    def decode(row_ptr, cols, acts, W_dec, b_dec, x, error, sq_error, dots):
        for i in range(x.shape[0]):
            e = error[i]
            for k in range(x.shape[1]):
                e[k] = b_dec[k] - x[i, k]
            for q in range(row_ptr[i], row_ptr[i + 1]):
                w = W_dec[cols[q]]
                a = acts[q]
                for k in range(x.shape[1]):
                    e[k] += a * w[k]
            total = np.float32(0)
            for k in range(x.shape[1]):
                total += e[k] * e[k]
            sq_error[i] = total
            for q in range(row_ptr[i], row_ptr[i + 1]):
                w = W_dec[cols[q]]
                dot = np.float32(0)
                for k in range(x.shape[1]):
                    dot += e[k] * w[k]
                dots[q] = dot

    @numba.njit(fastmath=True, nogil=True)
    def gradients(col_ptr, rows, delta, pull, x, error, grad_enc, grad_dec):
        for j in range(grad_enc.shape[0]):
            g_enc, g_dec = grad_enc[j], grad_dec[j]
            for k in range(x.shape[1]):
                g_enc[k] = 0
                g_dec[k] = 0
            for q in range(col_ptr[j], col_ptr[j + 1]):
                xr, er = x[rows[q]], error[rows[q]]
                d, p = delta[q], pull[q]
                for k in range(x.shape[1]):
                    g_enc[k] += d * xr[k]
                    g_dec[k] += p * er[k]

    x, weights = data.x.numpy(), data.weights
    z, bias = product(data).numpy(), weights.b_enc.numpy()
    room = (np.zeros(len(x) + 1, np.int64), np.empty(z.size, np.int32), np.empty(z.size, np.float32))
    W_dec, b_dec = weights.W_dec.numpy(), weights.b_dec.numpy()
    out = (np.empty_like(x), np.empty(len(x), np.float32), np.empty(len(entries.cols), np.float32))
    by_row = (entries.row_ptr.numpy(), entries.cols.numpy(), entries.pre_acts.numpy())
    by_feature = tuple(t.numpy() for t in (columns.col_ptr, columns.rows, columns.delta, columns.pull))
    grads = (np.empty_like(W_dec), np.empty_like(W_dec))
    return {
        "scan": lambda: scan(z, bias, *room),
        "decode": lambda: decode(*by_row, W_dec, b_dec, x, *out),
        "gradients": lambda: gradients(*by_feature, x, error.numpy(), *grads),
    }


def product(data: Synthetic) -> torch.Tensor:
    """x @ W_enc, without the bias."""
    return data.x @ data.weights.W_enc


def scan_compiled(library: NativeLibrary, data: Synthetic, z: torch.Tensor) -> object:
    """nsae_collect on a product in float32."""
    (rows, width), d = z.shape, data.x.shape[1]
    counts, cols = torch.empty(rows, dtype=torch.int32), torch.empty(z.numel() + width, dtype=torch.int32)
    values, nothing = torch.empty(len(cols)), (None,) * 5
    return library.call(
        "collect",
        *(z, 0, rows, width, d, data.weights.b_enc, None, None, 0, data.x, None, None, *nothing, 0.0, len(cols)),
        *(counts, cols, values, torch.empty(width, dtype=torch.int32), torch.empty(width), torch.zeros(1).long()),
    )


def sides(data: Synthetic) -> tuple[dict[str, dict[str, Operation]], float]:
    """Operations by side and name, and the density."""
    x, weights = data.x, data.weights
    entries = TorchOps().active(x, weights, weights.b_enc, noise=None, threshold=0.0, top_k=None)
    along = torch.zeros(len(weights.b_enc))
    error, _, dots = TorchOps().decode(entries, entries.pre_acts, weights, x)
    columns = TorchOps().by_feature(entries, len(along), dots, entries.pre_acts, dots)
    gradients = weights.zeros_like()

    def of(ops) -> dict[str, Operation]:
        return {
            "decode": lambda: ops.decode(entries, entries.pre_acts, weights, x),
            "gradients": lambda: ops.gradients(columns, x, error, along, weights, gradients),
        }

    z = product(data)
    found = {
        "torch CSR": {"scan": lambda: ((above := z + weights.b_enc > 0).nonzero(), z[above]), **of(TorchOps())},
    }
    for isa in ("base", "avx2", "avx512"):
        library = load(isa)
        if library is not None:
            scan = partial(scan_compiled, library, data, z)
            found[f"compiled {isa}"] = {"scan": scan, **of(NativeOps(library, certified=False))}
    found["numba"] = numba_operations(data, entries, columns, error)
    acts = torch.relu(x @ weights.W_enc + weights.b_enc)
    found["dense products"] = dense_operations(data.weights, acts, error, x)
    return found, len(entries.cols) / (len(x) * len(along))


def dense_operations(
    weights: Weights, acts: torch.Tensor, error: torch.Tensor, x: torch.Tensor
) -> dict[str, Operation]:
    """The four matrix products that the operations stand for."""
    delta = torch.empty_like(acts)
    return {
        "scan": lambda: torch.relu(acts),
        "decode": lambda: (torch.mm(acts, weights.W_dec), torch.mm(error, weights.W_dec.t(), out=delta)),
        "gradients": lambda: (torch.mm(acts.t(), error), torch.mm(delta.t(), x)),
    }


def measure(operations: dict[str, dict[str, Operation]], rounds: int) -> dict[tuple[str, str], list[float]]:
    """CPU seconds of every operation, in rounds that alternate their order; the first warms up and compiles."""
    order = [(side, name) for side in operations for name in operations[side]]
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in order}
    for number in range(rounds + 1):
        for side, name in order if number % 2 else reversed(order):
            began = time.process_time()
            operations[side][name]()
            if number:
                seconds[side, name].append(time.process_time() - began)
    return seconds


def main() -> None:
    """Measures, prints and appends rows."""
    parser = argparse.ArgumentParser(description="the sparse step's inner operations")
    parser.add_argument("--shape", default="768,6144,1024", help="d_in,d_sae,batch")
    parser.add_argument("--density", type=float, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    d_in, d_sae, batch = map(int, arguments.shape.split(","))
    for density in arguments.density or DENSITIES:
        operations, found = sides(Synthetic.make(d_in, d_sae, batch, density * d_sae, torch.device("cpu")))
        medians = {key: statistics.median(v) for key, v in measure(operations, arguments.rounds).items()}
        append_rows(
            CSV,
            [
                {
                    "date": today(),
                    "machine": machine(torch.device("cpu")),
                    "nsae": nsae_cli.__version__,
                    "d_in": d_in,
                    "d_sae": d_sae,
                    "batch": batch,
                    "density": f"{found:.4f}",
                    "side": side,
                    "operation": name,
                    "rounds": arguments.rounds,
                    "median_cpu_s": f"{seconds:.5f}",
                    "times_as_fast_as_dense": f"{medians['dense products', name] / seconds:.2f}",
                }
                for (side, name), seconds in medians.items()
            ],
        )
        print(f"density {found:.2%}, times as fast as the dense operations (scan, decode, gradients, the last two):")
        for side in operations:
            here = [medians[side, name] for name in OPERATIONS]
            dense = [medians["dense products", name] for name in OPERATIONS]
            ratios = [d / h for d, h in zip(dense, here, strict=True)] + [sum(dense[1:]) / sum(here[1:])]
            print(f"  {side:16}" + "".join(f"{ratio:8.1f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()

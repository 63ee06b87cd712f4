"""A grid of six SAEs against one SAE: compute and reading.

    python benchmarks/bench_grid.py                       # d_in 768, d_sae 1536, 50k rows; some minutes
    python benchmarks/bench_grid.py --d-sae 512 --d-in 64 --batch 512

Both are `train()` as `nsae train` calls it, on the same synthetic store: one value of α, and six in one run. Measured
over the training steps alone, evaluation left out: CPU seconds, wall seconds, and how many rows were read from the
store. The grid is to take at most six times the compute and exactly the reading of one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import nsae_cli
from nsae_cli.kernels.calibration import machine
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Workspace
from nsae_cli.store.writer import StoreWriter
from nsae_cli.training.loop import train
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.source import StoreSource
from nsae_cli.training.steps import StepLoop
from record import append_rows, today

CSV = Path(__file__).parent / "data" / "grid.csv"
HOOK = "blocks.0.hook_resid_post"
ALPHAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
SHARD_ROWS = 8192


def make_store(folder: Path, rows: int, d_in: int) -> None:
    """Rows of a sparse planted dictionary in float16, in shards of 8192."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    writer = StoreWriter(folder, {"made by": "benchmark"})
    for index, first in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - first)
        active = torch.rand(count, 4 * d_in, generator=generator) < 12 / (4 * d_in)
        x = (active * torch.rand(count, 4 * d_in, generator=generator)) @ directions
        x = (x + 0.05 * torch.randn(count, d_in, generator=generator)).half()
        positions = torch.arange(first, first + count, dtype=torch.int32) % 128
        tensors = {
            HOOK: x,
            "tokens": positions.clone(),
            "positions": positions,
            "documents": torch.zeros(count, dtype=torch.int32),
            "norms": torch.linalg.vector_norm(x.float(), dim=1, keepdim=True),
        }
        writer.write(index, tensors, nonfinite_rows=0)
    writer.finish({"hooks": [HOOK], "norm_hooks": [HOOK], "d_in": d_in, "dtype": "float16"})


class Meter:
    """Counts, while training steps are taken, CPU and wall seconds and rows read from the store."""

    def __init__(self) -> None:
        self.rows = 0
        self.cpu = self.wall = 0.0
        self._stepping = False

    def __enter__(self) -> Meter:
        self._run, self._read = StepLoop.run, ActivationStore.read_rows
        meter = self

        def run(loop: StepLoop, first_step: int) -> None:
            wall, cpu, meter._stepping = time.perf_counter(), time.process_time(), True
            meter._run(loop, first_step)
            meter.wall, meter.cpu = time.perf_counter() - wall, time.process_time() - cpu
            meter._stepping = False

        def read(store: ActivationStore, *arguments: object) -> torch.Tensor:
            found = meter._read(store, *arguments)
            meter.rows += len(found) * meter._stepping
            return found

        StepLoop.run, ActivationStore.read_rows = run, read
        return self

    def __exit__(self, *_: object) -> None:
        StepLoop.run, ActivationStore.read_rows = self._run, self._read


def measure(store: Path, alphas: list[float], options: dict[str, object]) -> Meter:
    """One training into a fresh workspace."""
    with tempfile.TemporaryDirectory() as folder, Meter() as meter:
        given = TrainOptions.model_validate(options | {"alpha": alphas})
        source = StoreSource(open_activations(store), given)
        train(given, source, Workspace(Path(folder)), "sae", SilentReporter())
    return meter


def main() -> None:
    """Measures, prints and appends a row."""
    parser = argparse.ArgumentParser(description="a grid of six against one SAE")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = {
        "d_sae": arguments.d_sae,
        "batch_size": arguments.batch,
        "tokens": arguments.steps * arguments.batch,
        "buffer": 32_768,
    }
    found: dict[int, list[Meter]] = {1: [], 6: []}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        make_store(store, arguments.rows, arguments.d_in)
        for _ in range(arguments.rounds):
            for count in found:
                found[count].append(measure(store, ALPHAS[:count], options))
    cpu = statistics.median(six.cpu / one.cpu for one, six in zip(found[1], found[6], strict=True))
    wall = statistics.median(six.wall / one.wall for one, six in zip(found[1], found[6], strict=True))
    reading = found[6][0].rows / found[1][0].rows
    print(f"six SAEs ÷ one: CPU {cpu:.2f}, wall {wall:.2f}, rows read {reading:.2f} ({found[1][0].rows:,})")
    row = {
        "date": today(),
        "machine": machine(torch.device("cpu")),
        "nsae": nsae_cli.__version__,
        "d_in": arguments.d_in,
        "d_sae": arguments.d_sae,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "cpu_ratio": f"{cpu:.3f}",
        "wall_ratio": f"{wall:.3f}",
        "rows_read_ratio": f"{reading:.3f}",
    }
    append_rows(CSV, [row])


if __name__ == "__main__":
    main()

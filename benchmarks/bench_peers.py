"""One optimizer step of nsae against the training steps of other SAE packages, side by side in one process.

    make bench-setup
    .venv-bench/bin/python benchmarks/bench_peers.py
    .venv-bench/bin/python benchmarks/bench_peers.py --shape 6144,4096 --rounds 9 --threads 2 --sides nsae,sae-lens
    .venv-bench/bin/python benchmarks/bench_peers.py --synthetic       # no SAE is trained first

All sides start from the same relu SAE (d_in 768, L0 about 64 on ordinary rows, trained or, with --synthetic, with
thresholds set to it) and see the same rows, sinks among them (planted.py says what they are). Peers are called through
their own classes (peers.py) and get float32 rows; nsae gets float16 rows as from a store and converts them in its step.

| side | objective | update |
|---|---|---|
| sae-lens | ‖x̂ − x‖² + β·Σf‖d‖, encodes x − b_dec (its default) | clip 1, torch Adam |
| sae-lens-bf16 | the same under its `autocast` | |
| sae-lens-equal | the same with `apply_b_dec_to_input=False`: exactly nsae-equal | |
| nsae-equal | --decoder free --sparsity l1-decoder-norm --clip 1 | |
| nsae | ‖x̂ − x‖² + β·Σf, --decoder unit (nsae's default), no clip | |
| nsae-fp32, nsae-torch, nsae-dense | the same with an fp32 encoder, without compiled loops, and dense | |
| nsae-topk | --act topk --k 64 --aux-k off, ‖x̂ − x‖² | unit rows, Adam, no clip |
| dictionary-learning | its StandardTrainer: the same on x − b_dec | ConstrainedAdam |
| sparsify-topk | TopK 64, FVU | signum |
| sae-lens-topk | TopK 64, ‖x̂ − x‖² | clip 1, torch Adam |
| product-fp32, product-bf16 | x @ W_enc alone, no step at all | |

sae-lens-equal does not subtract b_dec but 0 · b_dec, so it forms the same six matrix products as sae-lens.

Compared are steps, not results: the TopK sides train another SAE. Equality of nsae-equal and sae-lens-equal is checked
before anything is timed: after one step from the same weights they may differ by rounding only (agreement.py).
Learning rates are small (1e-6) while steps are timed, so that L0 stays what it was; that changes no side's work.

Rounds alternate in order, the first is not counted. Rows of data/peers.csv: wall seconds, and CPU seconds of all
threads, each median, 20th and 80th percentile, and `ratio`: sae-lens' median in the same run divided by this one.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import agreement
import nsae_cli
import peers
import planted
from nsae_cli.kernels.types import Weights
from nsae_side import as_rows, first_moments_of, nsae_cell, stepper, weights_of
from record import append_rows, describe, spread, today

CSV = Path(__file__).parent / "data" / "peers.csv"
D_IN = 768
SHAPES = ["6144,4096", "24576,1024", "24576,4096"]
K = 64
LR = 1e-6
CHECK_ROWS, CHECK_LR = 512, 1e-4
ADAM_BETA1 = 0.9


@dataclass(frozen=True)
class Task:
    """What all sides are given."""

    start: planted.Start
    rows: planted.Planted
    kernel: str
    precision: str

    @property
    def x(self) -> torch.Tensor:
        """The rows in float32, as peers expect them."""
        return self.rows.x.float()


@dataclass(frozen=True)
class Run:
    """A side at work: takes its next step, and names the kernel it took it with, where there are several."""

    step: Callable[[], object]
    kernel: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Side:
    """A side: its package, what sets it to work, and its options for the table."""

    package: str
    make: Callable[[Task], Run]
    options: str


def nsae_side(task: Task, **options: object) -> Run:
    kernel = {"kernel": task.kernel, "precision": task.precision}
    cell = nsae_cell(task.start.weights, batch_size=len(task.rows.x), beta=task.start.beta, lr=LR, **(kernel | options))
    return Run(stepper(cell, as_rows(task.rows.x)), lambda: cell.kernel.name)


def sae_lens_side(task: Task, **options: object) -> Run:
    step, _ = peers.sae_lens(task.start.weights, l1=task.start.beta, lr=LR, batch_size=len(task.rows.x), **options)
    return on_rows(step, task)


def on_rows(step: peers.Step, task: Task) -> Run:
    x = task.x
    return Run(lambda: step(x))


def product(task: Task, dtype: torch.dtype) -> Run:
    x, W_enc = task.rows.x.to(dtype), task.start.weights.W_enc.to(dtype)
    return Run(lambda: x @ W_enc)


EQUAL = {"decoder": "free", "sparsity": "l1-decoder-norm", "clip": 1.0}
SIDES = {
    "sae-lens": Side("sae-lens", sae_lens_side, "standard fp32"),
    "sae-lens-bf16": Side("sae-lens", lambda task: sae_lens_side(task, autocast=True), "standard autocast"),
    "sae-lens-equal": Side(
        "sae-lens", lambda task: sae_lens_side(task, centre=False), "standard fp32 apply_b_dec_to_input=False"
    ),
    "nsae-equal": Side("nsae", lambda task: nsae_side(task, **EQUAL), "relu free l1-decoder-norm clip 1"),
    "nsae": Side("nsae", nsae_side, "relu unit l1"),
    "nsae-fp32": Side("nsae", lambda task: nsae_side(task, kernel="sparse", precision="fp32"), "relu unit l1"),
    "nsae-torch": Side("nsae", lambda task: nsae_side(task, kernel="torch"), "relu unit l1"),
    "nsae-dense": Side("nsae", lambda task: nsae_side(task, kernel="dense", precision="fp32"), "relu unit l1"),
    "nsae-topk": Side("nsae", lambda task: nsae_side(task, act="topk", k=K, aux_k="off"), "topk 64 unit"),
    "dictionary-learning": Side(
        "dictionary-learning",
        lambda task: on_rows(peers.dictionary_learning(task.start.weights, l1=task.start.beta, lr=LR), task),
        "StandardTrainer",
    ),
    "sparsify-topk": Side(
        "eai-sparsify", lambda task: on_rows(peers.sparsify(task.start.weights, k=K, lr=LR), task), "topk 64 signum"
    ),
    "sae-lens-topk": Side("sae-lens", lambda task: sae_lens_side(task, k=K), "topk 64 fp32"),
    "product-fp32": Side("torch", lambda task: product(task, torch.float32), "x @ W_enc"),
    "product-bf16": Side("torch", lambda task: product(task, torch.bfloat16), "x @ W_enc"),
}


def check_equality(task: Task) -> None:
    """One step of nsae-equal and of sae-lens-equal from the same weights on the same rows.

    With ``--kernel auto`` nsae's dense and its sparse step are checked, since a run uses both.
    """
    start = task.start.weights
    x = task.rows.x[:CHECK_ROWS]
    tried = len(x)
    x = x[agreement.safe_rows(start, x)]
    exact = agreement.exact_step(start, x, task.start.beta, clip=1.0)
    step, trainer = peers.sae_lens(start, l1=task.start.beta, lr=CHECK_LR, batch_size=len(x), centre=False)
    step(x.float())
    sae, moments = trainer.sae, trainer.optimizer.state
    theirs = agreement.Taken(
        Weights(*(getattr(sae, name).detach() for name in start.named())),
        {name: moments[getattr(sae, name)]["exp_avg"] / (1 - ADAM_BETA1) for name in start.named()},
    )
    checked = (
        [("dense", "fp32"), ("sparse", task.precision)] if task.kernel == "auto" else [(task.kernel, task.precision)]
    )
    for kernel, precision in checked:
        cell = nsae_cell(
            start,
            batch_size=len(x),
            beta=task.start.beta,
            lr=CHECK_LR,
            kernel=kernel,
            precision=precision,
            **EQUAL,
        )
        cell.train_step(as_rows(x), 0)
        ours = agreement.Taken(weights_of(cell), {n: m / (1 - ADAM_BETA1) for n, m in first_moments_of(cell).items()})
        line = agreement.check(start, ours, theirs, exact, CHECK_LR)
        print(f"  {len(x)} of {tried} rows, nsae {cell.kernel.name}: {line}", flush=True)


@dataclass(frozen=True)
class Timed:
    """A side's rounds: wall and CPU seconds of each, and the kernel of the last."""

    seconds: list[tuple[float, float]]
    kernel: str

    def spread(self, clock: int) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile by the wall clock (0) or in CPU seconds (1)."""
        return spread([pair[clock] for pair in self.seconds])


def measure(task: Task, names: list[str], rounds: int) -> dict[str, Timed]:
    """Times each side's steps, in rounds that alternate in order."""
    runs = {name: SIDES[name].make(task) for name in names}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name].step()
            if task.start.weights.b_enc.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Timed(seconds[name], run.kernel()) for name, run in runs.items()}


def table(task: Task, timed: dict[str, Timed]) -> list[dict[str, object]]:
    """A row per side."""
    l0, l0_ns, l0_sink = planted.measure_l0(task.start.weights, task.rows)
    base = [timed["sae-lens"].spread(clock)[0] for clock in (0, 1)]
    rows = []
    for name, side_timed in timed.items():
        wall, cpu = (side_timed.spread(clock) for clock in (0, 1))
        side = SIDES[name]
        rows.append(
            {
                "date": today(),
                "device": describe(task.start.weights.b_enc.device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "nsae": nsae_cli.__version__,
                "package": side.package,
                "version": nsae_cli.__version__ if side.package == "nsae" else peers.version(side.package),
                "d_in": D_IN,
                "d_sae": task.start.weights.b_enc.shape[0],
                "batch": len(task.rows.x),
                "start": task.start.kind,
                "l0": f"{l0:.1f}",
                "l0_ns": f"{l0_ns:.1f}",
                "l0_sink": f"{l0_sink:.0f}",
                "side": name,
                "options": side.options,
                "kernel": side_timed.kernel,
                "rounds": len(side_timed.seconds),
                **{f"wall_{key}": f"{value:.5f}" for key, value in zip(("median", "p20", "p80"), wall, strict=True)},
                **{f"cpu_{key}": f"{value:.5f}" for key, value in zip(("median", "p20", "p80"), cpu, strict=True)},
                "ratio_wall": f"{base[0] / wall[0]:.3f}",
                "ratio_cpu": f"{base[1] / cpu[0]:.3f}",
            }
        )
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """Prints the table, and each step in units of the two bare products."""
    products = {row["side"]: float(str(row["cpu_median"])) for row in rows if str(row["side"]).startswith("product")}
    print(
        f"  {'side':20} {'wall ms':>9} {'CPU ms':>9} {'sae-lens / it: wall':>20} {'CPU':>7}   CPU / product fp32, bf16"
    )
    for row in rows:
        wall, cpu = float(str(row["wall_median"])), float(str(row["cpu_median"]))
        units = "  ".join(
            f"{cpu / products[name]:8.2f}" for name in ("product-fp32", "product-bf16") if name in products
        )
        print(
            f"  {row['side']:20} {wall * 1e3:9,.0f} {cpu * 1e3:9,.0f} {row['ratio_wall']:>20} {row['ratio_cpu']:>7}"
            f"   {units}  {row['kernel']}",
            flush=True,
        )


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="d_sae,batch; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", help=f"commas between some of: {', '.join(SIDES)}; sae-lens is always among them")
    parser.add_argument("--synthetic", action="store_true", help="set thresholds instead of training an SAE first")
    parser.add_argument("--train-steps", type=int, default=600, help="of the SAE that the steps start from")
    parser.add_argument("--kernel", default="auto", help="of nsae's step")
    parser.add_argument("--precision", default="auto", help="of nsae's step")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    names = args.sides.split(",") if args.sides else list(SIDES)
    if unknown := set(names) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(unknown))} not among {', '.join(SIDES)}")
    if "sae-lens" not in names:
        names.insert(0, "sae-lens")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    for shape in args.shape or SHAPES:
        d_sae, batch = map(int, shape.split(","))
        training = planted.planted_rows(D_IN, d_sae, planted.TRAINING_ROWS, seed=0)
        start = planted.make_start(D_IN, d_sae, training, synthetic=args.synthetic, steps=args.train_steps)
        del training
        timed = planted.planted_rows(D_IN, d_sae, batch, seed=1)
        task = Task(start.to(device), timed.to(device), args.kernel, args.precision)
        l0, l0_ns, l0_sink = planted.measure_l0(task.start.weights, task.rows)
        print(
            f"d_sae {d_sae}, batch {batch}, {start.kind}: L0 {l0:.1f}, ordinary {l0_ns:.1f}, sinks {l0_sink:.0f}",
            flush=True,
        )
        if "nsae-equal" in names and device.type == "cpu":
            check_equality(task)
        result = table(task, measure(task, names, args.rounds))
        append_rows(CSV, result)
        show(result)


if __name__ == "__main__":
    main()

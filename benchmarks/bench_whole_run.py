"""A whole training run from step 0, nsae against SAELens: seconds to the same loss on held-out rows.

    make bench-setup
    .venv-bench/bin/python benchmarks/bench_whole_run.py                              # 2,000 steps; an hour on one core
    .venv-bench/bin/python benchmarks/bench_whole_run.py --steps 20 --rows 20k        # to try it

Rows: `nsae collect` of a random full-size GPT-2 small over the built-in corpus, resid_pre of layer 6, float16. A random
model's activations hold little that is sparse: this compares the time of a run, not the quality of an SAE.

Both sides begin with the same weights (nsae's initialisation), see the same rows in the same order and minimise the
same function with the same optimizer: relu, free decoder, ‖x̂ − x‖² + β·Σf‖d‖, Adam, gradient norm clipped to 1, equal
warm-ups of learning rate and β, equal decay; SAELens with `apply_b_dec_to_input=False` (no faster than its default).
Its β starts its warm-up one step earlier than by itself, to fall on nsae's. Learning rate and β of every step are
compared while it runs. `sae-lens-bf16` is the same under its `autocast`.

Timed is training alone: steps by the wall clock and in CPU seconds of all threads. Not timed: collecting, reading and
shuffling (the same for all), evaluating, and the peers' conversion to scaled float32 rows; nsae converts in its step.
Sides take turns, --every steps each in alternating order, so that a machine that slows down favours nobody.

data/whole_run.csv: a row per side and evaluation. data/whole_run_summary.csv: seconds to `target`, the highest of the
sides' final losses, by linear interpolation of each curve.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import nsae_cli
import peers
from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.groups import SINKS
from nsae_cli.sae.init import geometric_median, initialise
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.store.batches import BatchStream, HookRows, held_out_rows
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import profile_hook
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.training.options import LR_DECAY, default_lr
from nsae_cli.values import parse_size
from nsae_side import nsae_cell, weights_of
from record import append_rows, describe, today

DATA = Path(__file__).parent / "data"
LAYER = 6
LR_WARM_UP, BETA_WARM_UP = 0.05, 0.2
INIT_ROWS = 8192
EVALUATED_ROWS = 8192


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    step: int
    wall: float
    cpu: float
    loss: float
    sq_error: float
    l0: float


@dataclass
class Side:
    """A side of the race: its step, its weights, its clock, its curve.

    Attributes:
        prepare: what is done to a batch before the clock starts.
        step: takes the prepared batch and the number of the step; returns learning rate and β of it.
    """

    prepare: Callable[[HookRows], object]
    step: Callable[[object, int], tuple[float, float]]
    weights: Callable[[], Weights]
    wall: float = 0.0
    cpu: float = 0.0
    curve: list[Point] = field(default_factory=list)


def collect_rows(folder: Path, rows: int) -> ActivationStore:
    """The store, made by nsae's own collect; one that is there already is used."""
    import transformers
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from nsae_cli.assets import model_dir
    from nsae_cli.lm.collect import collect
    from nsae_cli.lm.config import CollectConfig
    from nsae_cli.reporter import SilentReporter
    from nsae_cli.store.workspace import Workspace

    transformers.utils.logging.disable_progress_bar()
    model = folder / "random-gpt2"
    if not (model / "config.json").exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(model)
        AutoTokenizer.from_pretrained(model_dir("mini")).save_pretrained(model)
    name = f"rows-{rows}"
    config = CollectConfig(
        model=str(model),
        corpus="builtin",
        layers=str(LAYER),
        site="resid_pre",
        norms="stored",
        tokens=rows,
        device="cpu",
        name=name,
    )
    collect(config, Workspace(folder), SilentReporter())
    return open_activations(folder / "activations" / name)


@torch.no_grad()
def evaluate(weights: Weights, x: torch.Tensor, beta: float) -> tuple[float, float, float]:
    """Loss at full β, squared error and L0, means over the rows."""
    norms = torch.linalg.vector_norm(weights.W_dec, dim=1)
    sums = torch.zeros(3, dtype=torch.float64)
    for part in x.split(512):
        acts = torch.relu(part @ weights.W_enc + weights.b_enc)
        sq_error = (acts @ weights.W_dec + weights.b_dec - part).square().sum(dim=1)
        loss = sq_error + beta * (acts @ norms)
        sums += torch.stack([loss.double().sum(), sq_error.double().sum(), (acts > 0).double().sum()])
    loss_mean, error_mean, l0 = (sums / len(x)).tolist()
    return loss_mean, error_mean, l0


def nsae_side(start: Weights, beta: float, scale: float, args: argparse.Namespace) -> Side:
    """nsae, by `Cell.train_step`."""
    cell = nsae_cell(
        start,
        batch_size=args.batch,
        beta=beta,
        input_scale=scale,
        kernel=args.kernel,
        precision=args.precision,
        steps=args.steps,
        lr_warm_up=LR_WARM_UP,
        alpha_warm_up=BETA_WARM_UP,
        decoder="free",
        sparsity="l1-decoder-norm",
        clip=1.0,
    )

    def step(rows: object, number: int) -> tuple[float, float]:
        assert isinstance(rows, HookRows)
        log = cell.train_step(rows, number)
        return log.lr, beta * log.alpha / cell.config.alpha

    return Side(lambda rows: rows, step, lambda: weights_of(cell))


def sae_lens_side(start: Weights, beta: float, scale: float, args: argparse.Namespace, *, autocast: bool) -> Side:
    """SAELens, by `SAETrainer.step`."""
    warm_up = round(LR_WARM_UP * args.steps)
    train_step, trainer = peers.sae_lens(
        start,
        l1=beta,
        lr=default_lr(args.d_sae),
        batch_size=args.batch,
        autocast=autocast,
        centre=False,
        steps=args.steps,
        lr_warm_up=warm_up if warm_up > 1 else 0,
        lr_decay=round(LR_DECAY * args.steps),
        l1_warm_up=round(BETA_WARM_UP * args.steps),
    )
    trainer.coefficient_schedulers["l1"].step()

    def step(x: object, _number: int) -> tuple[float, float]:
        assert isinstance(x, torch.Tensor)
        used = trainer.optimizer.param_groups[0]["lr"], trainer.get_coefficients()["l1"]
        train_step(x)
        return used

    def weights() -> Weights:
        return Weights(*(getattr(trainer.sae, name).detach() for name in start.named()))

    return Side(lambda rows: rows.x.float() * scale, step, weights)


SIDES: dict[str, Callable[[Weights, float, float, argparse.Namespace], Side]] = {
    "nsae": nsae_side,
    "sae-lens": lambda *task: sae_lens_side(*task, autocast=False),
    "sae-lens-bf16": lambda *task: sae_lens_side(*task, autocast=True),
}


def train_for(side: Side, batches: list[HookRows], first: int) -> list[tuple[float, float]]:
    """Takes a step on each batch by the side's own clock; the learning rate and β of each."""
    used = []
    for number, rows in enumerate(batches, start=first):
        prepared = side.prepare(rows)
        wall, cpu = time.perf_counter(), time.process_time()
        used.append(side.step(prepared, number))
        side.wall += time.perf_counter() - wall
        side.cpu += time.process_time() - cpu
    return used


def require_equal(number: int, settings: dict[str, tuple[float, float]]) -> None:
    """Ends the benchmark if a step's learning rate or β is not the same for all sides."""
    first, *others = settings.values()
    if not all(math.isclose(a, b, rel_tol=1e-6) for other in others for a, b in zip(first, other, strict=True)):
        raise SystemExit(f"step {number}: learning rate and beta differ: {settings}")


def race(
    sides: dict[str, Side], stream: BatchStream, held_out: torch.Tensor, beta: float, args: argparse.Namespace
) -> None:
    """Trains all sides, `--every` steps each in turn, and fills their curves."""

    def note(step: int) -> None:
        for name, side in sides.items():
            side.curve.append(Point(step, side.wall, side.cpu, *evaluate(side.weights(), held_out, beta)))
            point = side.curve[-1]
            print(f"step {step:5} {name:14} {side.wall:8.1f} s  loss {point.loss:.3f}  L0 {point.l0:.0f}", flush=True)

    hook = stream.profiles[0].hook
    batches = stream.batches(0)
    note(0)
    for turn, first in enumerate(range(0, args.steps, args.every)):
        chunk = [batch[hook] for batch in itertools.islice(batches, min(args.every, args.steps - first))]
        used = {}
        for name in sides if turn % 2 else reversed(sides):
            used[name] = train_for(sides[name], chunk, first)
        for number, settings in enumerate(zip(*used.values(), strict=True), start=first):
            require_equal(number, dict(zip(used, settings, strict=True)))
        note(first + len(chunk))


def seconds_to(curve: list[Point], target: float) -> tuple[float, float]:
    """Wall and CPU seconds at which a curve first reaches the target, linear between evaluations."""
    if curve[0].loss <= target:
        return 0.0, 0.0
    for before, after in itertools.pairwise(curve):
        if after.loss <= target:
            share = (before.loss - target) / (before.loss - after.loss)
            return before.wall + share * (after.wall - before.wall), before.cpu + share * (after.cpu - before.cpu)
    return math.nan, math.nan


def record(sides: dict[str, Side], args: argparse.Namespace, rows: int) -> None:
    """Writes both tables and prints the summary."""
    common = {
        "date": today(),
        "device": describe(torch.device("cpu")),
        "threads": args.threads,
        "torch": torch.__version__,
        "nsae": nsae_cli.__version__,
        "sae_lens": peers.version("sae-lens"),
        "d_sae": args.d_sae,
        "batch": args.batch,
        "steps": args.steps,
        "rows": rows,
        "alpha": args.alpha,
        "kernel": f"{args.kernel} {args.precision}",
    }
    target = max(side.curve[-1].loss for side in sides.values())
    times = {name: seconds_to(side.curve, target) for name, side in sides.items()}
    base = times.get("sae-lens", (math.nan, math.nan))
    points, summary = [], []
    for name, side in sides.items():
        for point in side.curve:
            row = {"step": point.step, "wall_s": f"{point.wall:.2f}", "cpu_s": f"{point.cpu:.2f}"}
            row |= {"loss": f"{point.loss:.5f}", "sq_error": f"{point.sq_error:.5f}", "l0": f"{point.l0:.1f}"}
            points.append({**common, "side": name, **row})
        wall, cpu = times[name]
        ratios = [theirs / mine if mine else math.nan for mine, theirs in ((wall, base[0]), (cpu, base[1]))]
        summary.append(
            {
                **common,
                "side": name,
                "final_loss": f"{side.curve[-1].loss:.5f}",
                "wall_s": f"{side.wall:.2f}",
                "cpu_s": f"{side.cpu:.2f}",
                "target": f"{target:.5f}",
                "wall_to_target_s": f"{wall:.2f}",
                "cpu_to_target_s": f"{cpu:.2f}",
                "ratio_wall": f"{ratios[0]:.3f}",
                "ratio_cpu": f"{ratios[1]:.3f}",
            }
        )
        print(
            f"{name:14} final loss {side.curve[-1].loss:.4f} in {side.wall:.1f} s ({side.cpu:.1f} CPU-s); loss "
            f"{target:.4f} after {wall:.1f} s; sae-lens / it {ratios[0]:.2f} wall, {ratios[1]:.2f} CPU"
        )
    append_rows(DATA / "whole_run.csv", points)
    append_rows(DATA / "whole_run_summary.csv", summary)


def main() -> None:
    """Collects, trains, records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="a multiple of 20, so that schedules are equal")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--rows", type=parse_size, default=300_000, help="of the store, held-out ones included")
    parser.add_argument("--alpha", type=float, default=0.2, help="sparsity coefficient; beta is alpha times sqrt(d_in)")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations, and a side's turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", default="nsae,sae-lens", help=f"commas between some of: {', '.join(SIDES)}")
    parser.add_argument("--kernel", default="auto", help="of nsae's step")
    parser.add_argument("--precision", default="auto", help="of nsae's step")
    parser.add_argument(
        "--workspace", type=Path, help="where the rows stay for the next time; a temporary folder if left out"
    )
    args = parser.parse_args()
    names = args.sides.split(",")
    if args.steps % 20 or not set(names) <= set(SIDES):
        parser.error(f"--steps is to be a multiple of 20, --sides of {', '.join(SIDES)}")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        store = collect_rows(args.workspace or Path(temporary), args.rows)
        hook = f"blocks.{LAYER}.hook_resid_pre"
        contexts = Contexts(store)
        profile = profile_hook(store, hook, contexts)
        stream = BatchStream(store, [profile], contexts, args.batch, seed=0, buffer_rows=524_288, drop_sinks=False)
        d_in = store.manifest.d_in
        scale, beta = d_in**0.5 / profile.norm_scale, args.alpha * d_in**0.5
        first = stream.first_rows(INIT_ROWS)[hook]
        centre = geometric_median(first.x[first.group != SINKS])
        generator = torch.Generator().manual_seed(0)
        start = initialise(
            NONLINEARITIES["relu"], "free", args.d_sae, first.x.float() * scale, centre * scale, generator
        )
        held_out = torch.cat([rows.x.float() * scale for rows, _ in held_out_rows(store, profile, contexts, 4096)])
        print(
            f"{store.manifest.rows:,} rows, {profile.training_rows:,} to train on, {profile.training_sinks:,} sinks "
            f"among them; evaluated on {min(len(held_out), EVALUATED_ROWS):,}",
            flush=True,
        )
        sides = {name: SIDES[name](start, beta, scale, args) for name in names}
        race(sides, stream, held_out[:EVALUATED_ROWS], beta, args)
        record(sides, args, store.manifest.rows)


if __name__ == "__main__":
    main()

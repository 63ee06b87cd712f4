"""What the training log and the probes of the gradient cost, as a share of the time of a step.

    python benchmarks/bench_metrics.py                              # d_sae 6144, batch 4096; a minute on two cores
    python benchmarks/bench_metrics.py --shape 64,512,2048 --rounds 30

The cell is that of a run of `--steps` steps as `nsae train` makes it, begun at an SAE in late training
(`planted.py`), where steps are fast and the same overhead weighs most. Timed in rounds: a plain step; a step that is
logged, with its line (shares, exponents, gradient norms of all rows); a probe (G and Adam's share of sinks). With the
intervals that such a run has,

    share = (logged − plain) / (log interval · plain) + probe / (probe interval · plain)

A row of `data/metrics.csv`: medians, the two shares and their sum, which is to be 0.02 at most at d_sae 6,144 and batch
4,096 with a line every 10th step, as in a run of 2,000 steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import nsae_cli
from nsae_cli.metrics.groups import N_BINS, SINKS, norm_groups
from nsae_cli.store.batches import HookRows
from nsae_cli.training.probe import CellProbe, probe_rows
from nsae_cli.training.records import step_record
from nsae_cli.training.schedule import log_interval, probe_interval
from nsae_side import as_rows, nsae_cell
from planted import TRAINING_ROWS, Planted, make_start, planted_rows
from record import append_rows, describe, spread, today

CSV = Path(__file__).parent / "data" / "metrics.csv"
MOST = 0.02


def grouped(planted: Planted) -> HookRows:
    """The rows with their norm bins and sinks, as a store's profile gives them."""
    rows = as_rows(planted.x)
    levels = torch.arange(1, N_BINS, device=rows.norm.device, dtype=torch.float64) / N_BINS
    edges = torch.quantile(rows.norm[~planted.is_sink].double(), levels)
    return HookRows(rows.x, rows.norm, norm_groups(rows.norm, edges, planted.is_sink), rows.zero)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(
    d_in: int, d_sae: int, batch: int, steps: int, rounds: int, synthetic: bool, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a plain step, of a logged one with its line, and of a probe, in rounds."""
    planted = planted_rows(d_in, d_sae, TRAINING_ROWS, seed=1)
    start = make_start(d_in, d_sae, planted, synthetic=synthetic).to(device)
    rows = grouped(planted).to(device)
    first, probed = rows.select(slice(batch)), rows.select(slice(batch, batch + probe_rows(batch)))
    cell = nsae_cell(start.weights, batch_size=batch, beta=start.beta, steps=steps)
    probe, every = CellProbe(probed, probe_interval(steps)), probe_interval(steps)
    interval = log_interval(steps)

    def logged(step: int) -> None:
        record = step_record(cell, first, cell.train_step(first, step), step)
        assert record["grad_share"]["W_dec"]["sinks"] > 0

    def probes(step: int) -> None:
        assert probe.measure(cell, step) is not None

    found: dict[str, list[float]] = {"plain": [], "logged": [], "probe": []}
    for number in range(rounds + 1):
        step = (number + 1) * every - 1  # logged, probed
        sides = {
            "plain": lambda step=step: cell.train_step(first, step - interval + 1 if interval > 1 else step),
            "logged": lambda step=step: logged(step),
            "probe": lambda step=step: probes(step),
        }
        for name in sides if number % 2 else reversed(sides):
            taken = seconds(sides[name], device)
            if number:
                found[name].append(taken)
    assert int((first.group == SINKS).sum()) > 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="768,6144,4096", help="d_in,d_sae,batch")
    parser.add_argument("--steps", type=int, default=2000, help="of the run whose intervals count (2000: a line in 10)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--synthetic", action="store_true", help="an SAE that was not trained: quicker to make")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    d_in, d_sae, batch = map(int, arguments.shape.split(","))
    rounds = min(arguments.rounds, arguments.steps // probe_interval(arguments.steps) - 1)
    found = measure(d_in, d_sae, batch, arguments.steps, rounds, arguments.synthetic, device)
    plain, logged, probe = (statistics.median(found[name]) for name in ("plain", "logged", "probe"))
    # Of each round: what happens to the machine in between happens to both.
    extra = statistics.median(b - a for a, b in zip(found["plain"], found["logged"], strict=True))
    log_share = extra / (log_interval(arguments.steps) * plain)
    probe_share = probe / (probe_interval(arguments.steps) * plain)
    append_rows(
        CSV,
        [
            {
                "date": today(),
                "nsae": nsae_cli.__version__,
                "torch": torch.__version__,
                "device": describe(device),
                "threads": arguments.threads,
                "d_in": d_in,
                "d_sae": d_sae,
                "batch": batch,
                "steps": arguments.steps,
                "probe_rows": probe_rows(batch),
                "plain_s": round(plain, 5),
                "plain_p20_s": round(spread(found["plain"])[1], 5),
                "plain_p80_s": round(spread(found["plain"])[2], 5),
                "logged_s": round(logged, 5),
                "probe_s": round(probe, 5),
                "log_share": round(log_share, 5),
                "probe_share": round(probe_share, 5),
                "share": round(log_share + probe_share, 5),
            }
        ],
    )
    total = log_share + probe_share
    print(f"step {1000 * plain:.1f} ms, logged {1000 * (plain + extra):.1f} ms, probe {1000 * probe:.1f} ms")
    print(f"log {log_share:.2%} + probes {probe_share:.2%} = {total:.2%} of the time of steps")
    print(f"{'within' if total <= MOST else 'above'} {MOST:.0%}")


if __name__ == "__main__":
    main()

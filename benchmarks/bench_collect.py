"""How fast `nsae collect` is, side by side with the usual way, and how much memory it takes.

    OMP_NUM_THREADS=1 python benchmarks/bench_collect.py [--rounds 5] [--tokens 8192] [--threads 1] [--clock wall]

Speed: a random full-size GPT-2 small on the CPU, ``resid_pre`` of layer 6 (six blocks run), contexts of 256 and 1024,
batches of 1024 tokens, float32. Each round times, one after the other on the same number of tokens,

- ``usual``: `GPT2LMHeadModel(..., output_hidden_states=True)`, the whole model with logits;
- ``stopped``: nsae's forward with a hook, ended after the sixth block;
- ``command``: `collect` from text to durable shards (tokenise, forward, norms, hash, write), after its first batch.

The medians over the rounds, and the median of each round's ratio, go to benchmarks/data/collect.csv as rows.
On a machine that does other work, ``--clock cpu`` counts the processor time of all threads, the writer's included.
Memory: peak resident size of collecting `mini` at 1× and 8× the tokens, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nsae_cli.assets import model_dir
from nsae_cli.lm.collect import collect
from nsae_cli.lm.config import CollectConfig
from nsae_cli.lm.families import FAMILIES
from nsae_cli.lm.harvest import ResidualReader
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.workspace import Workspace

LAYER = 6
CONTEXTS = (256, 1024)
BATCH_TOKENS = 1024
MEMORY_TOKENS = 200_000
CSV = Path(__file__).parent / "data" / "collect.csv"
FIELDS = [
    *("date", "measure", "variant", "context", "tokens", "threads", "device", "torch", "transformers"),
    *("rounds", "median", "p20", "p80", "unit", "ratio", "ratio_to", "load"),
]


#: Reads the clock chosen with --clock.
clock_now: Callable[[], float] = time.perf_counter


class SteadyClock(SilentReporter):
    """Notes when the first batch of a collection has landed."""

    def __init__(self) -> None:
        self.started = 0.0
        self.first_rows = 0

    def advance(self, amount: int, **fields: str) -> None:
        if amount and not self.first_rows:
            self.started, self.first_rows = clock_now(), amount

    @contextlib.contextmanager
    def task(self, description: str, total: int | None, unit: str) -> Iterator[SteadyClock]:
        yield self


def usual_rate(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Tokens per second of the whole model with all hidden states. `ids` is [batches, batch, context]."""
    started = clock_now()
    with torch.inference_mode():
        for batch in ids:
            model(batch, output_hidden_states=True, use_cache=False).hidden_states[LAYER]
    return ids.numel() / (clock_now() - started)


def stopped_rate(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Tokens per second of the forward that ends before block 6."""
    reader = ResidualReader(model, FAMILIES["gpt2"], "resid_pre", [LAYER])
    started = clock_now()
    for batch in ids:
        reader.run(batch, lambda _layer, _residual: None)
    return ids.numel() / (clock_now() - started)


def command_rate(folder: Path, context: int, tokens: int) -> float:
    """Rows per second of the whole command once its first batch has landed, until the manifest is written."""
    clock = SteadyClock()
    with tempfile.TemporaryDirectory() as runs:
        config = CollectConfig(
            model=str(folder),
            corpus="builtin",
            layers=str(LAYER),
            site="resid_pre",
            norms="stored",
            context=context,
            batch_size=BATCH_TOKENS // context,
            tokens=tokens + BATCH_TOKENS,
            device="cpu",
        )
        rows = collect(config, Workspace(Path(runs)), clock).manifest.rows
        return (rows - clock.first_rows) / (clock_now() - clock.started)


def measure_speed(rounds: int, tokens: int, unit: str) -> list[dict[str, object]]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(GPT2Config(), attn_implementation="sdpa").eval()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "random-gpt2"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model_dir("mini")).save_pretrained(folder)
        for context in CONTEXTS:
            ids = torch.randint(0, 50257, (tokens // BATCH_TOKENS, BATCH_TOKENS // context, context))
            variants: dict[str, Callable[[], float]] = {
                "usual": lambda ids=ids: usual_rate(model, ids),  # type: ignore[misc]
                "stopped": lambda ids=ids: stopped_rate(model, ids),  # type: ignore[misc]
                "command": lambda context=context: command_rate(folder, context, tokens),  # type: ignore[misc]
            }
            usual_rate(model, ids[:1])  # warm up
            rates: dict[str, list[float]] = {name: [] for name in variants}
            for number in range(rounds):
                # Back and forth, so that a machine that slows down or speeds up favours nobody.
                for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
                    rates[name].append(variants[name]())
                print(f"context {context} round {number + 1}:", {name: round(r[-1]) for name, r in rates.items()})
            against = {"usual": "usual", "stopped": "usual", "command": "stopped"}
            for name, values in rates.items():
                others = rates[against[name]]
                ratio = statistics.median(mine / other for mine, other in zip(values, others, strict=True))
                row = {"measure": "speed", "variant": name, "context": context, "tokens": tokens, "unit": unit}
                rows.append({**row, **spread(values), "ratio": round(ratio, 3), "ratio_to": against[name]})
    return rows


def measure_memory() -> list[dict[str, object]]:
    peaks = {factor: peak_megabytes(MEMORY_TOKENS * factor) for factor in (1, 8)}
    return [
        {
            "measure": "memory",
            "variant": f"{factor}x",
            "context": 128,
            "tokens": MEMORY_TOKENS * factor,
            **spread([peak]),
            "unit": "MiB",
            "ratio": round(peak / peaks[1], 3),
            "ratio_to": "1x",
        }
        for factor, peak in peaks.items()
    ]


def peak_megabytes(tokens: int) -> float:
    """Peak resident size of a process that collects `mini`."""
    script = (
        "import json, resource, sys, tempfile\n"
        "from pathlib import Path\n"
        "from nsae_cli.lm.collect import collect\n"
        "from nsae_cli.lm.config import CollectConfig\n"
        "from nsae_cli.reporter import SilentReporter\n"
        "from nsae_cli.store.workspace import Workspace\n"
        "with tempfile.TemporaryDirectory() as runs:\n"
        f"    config = CollectConfig(model='mini', layers='all', tokens={tokens}, device='cpu')\n"
        "    collect(config, Workspace(Path(runs)), SilentReporter())\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps(peak / (2**20 if sys.platform == 'darwin' else 2**10)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout))


def spread(values: list[float]) -> dict[str, object]:
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    median = statistics.median(ordered)
    return {"rounds": len(ordered), "median": round(median, 1), "p20": round(low, 1), "p80": round(high, 1)}


def processor() -> str:
    """The processor's name; never the host's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192, help="per measurement, a multiple of 1024")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: all threads, other work left out"
    )
    args = parser.parse_args()
    global clock_now
    clock_now = time.perf_counter if args.clock == "wall" else time.process_time
    unit = "tokens/s" if args.clock == "wall" else "tokens/cpu-s"
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    common = {
        "date": datetime.date.today().isoformat(),
        "threads": args.threads,
        "device": processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    # Memory first: on Linux a child's peak begins at what its parent held when it was forked.
    rows = [*measure_memory(), *measure_speed(args.rounds, args.tokens, unit)]
    # Other work on the machine shows in the load average beside the numbers.
    load = round(os.getloadavg()[1], 1)
    CSV.parent.mkdir(exist_ok=True)
    is_new = not CSV.exists()
    with CSV.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow({**common, **row, "load": load})
            print(
                f"{row['measure']:7} {row['variant']:8} context {row['context']:5} {row['median']:>9} {row['unit']:12}"
                f" = {row['ratio']} × {row['ratio_to']}"
            )


if __name__ == "__main__":
    main()

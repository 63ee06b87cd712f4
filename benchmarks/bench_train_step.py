"""One training step of nsae against a minimal torch loop of the same algorithm, side by side in one process.

    python benchmarks/bench_train_step.py                       # d_sae 512, 6144 and 24576, a few minutes on one core
    python benchmarks/bench_train_step.py --shape 768,6144,2048 --rounds 9 --threads 2

nsae: `Cell.train_step` as `nsae train` calls it: conversion from float16 rows, loss weights, closed-form gradients, the
decoder's projection, the check for non-finite values, Adam, row norms, statistics.
torch: forward, `loss.backward()`, the same projection and row norms, `torch.optim.Adam(fused=True)`; no statistics.

Both start from the same weights and see the same rows; rounds alternate, and the first is not counted. A row of
`data/train_step.csv` per shape and side: median, 20th and 80th percentile of the seconds per step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import nsae_cli
from nsae_cli.kernels.types import Weights
from nsae_cli.store.batches import HookRows
from nsae_side import as_rows, nsae_cell, stepper
from record import append_rows, describe, spread, today

CSV = Path(__file__).parent / "data" / "train_step.csv"
SHAPES = ["64,512,2048", "768,6144,2048", "768,24576,2048"]
BETA = 0.5


def make_rows(d_in: int, count: int) -> HookRows:
    """Rows of norm about √d_in, float16 as in a store."""
    return as_rows(torch.randn(count, d_in, generator=torch.Generator().manual_seed(0)).half())


def make_weights(d_in: int, d_sae: int) -> Weights:
    """Unit decoder rows, the encoder its transpose, and a threshold that leaves some 7 % of the features active."""
    W_dec = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(1))
    W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    return Weights(W_dec.t().contiguous(), torch.full((d_sae,), -1.5), W_dec, torch.zeros(d_in))


def torch_step(weights: Weights, rows: HookRows, lr: float) -> Callable[[], float]:
    """The same algorithm as one would write it in plain torch."""
    W_enc, b_enc, W_dec, b_dec = parameters = [tensor.requires_grad_() for tensor in weights.tensors()]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    x = rows.x.float()

    def step() -> float:
        acts = torch.relu(x @ W_enc + b_enc)
        x_hat = acts @ W_dec + b_dec
        loss = (x_hat - x).pow(2).sum(1).mean() + BETA * acts.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss.item()

    return step


def compare(d_in: int, d_sae: int, batch: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each side, in rounds that alternate."""
    rows = make_rows(d_in, batch).to(device)
    start = Weights(*(tensor.to(device) for tensor in make_weights(d_in, d_sae).tensors()))
    cell = nsae_cell(start, batch_size=batch, beta=BETA)
    sides = {"nsae": stepper(cell, rows), "torch": torch_step(start.to(torch.float32), rows, cell.config.lr)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    for number in range(rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            began = time.perf_counter()
            losses[name] = sides[name]()
            if number:
                seconds[name].append(time.perf_counter() - began)
    gap = abs(losses["nsae"] / losses["torch"] - 1)
    if gap > (1e-3 if device.type == "cpu" else 0.05):
        raise SystemExit(f"the two sides do not train alike: losses {losses}")
    return seconds


def record(shape: tuple[int, int, int], seconds: dict[str, list[float]], device: torch.device) -> None:
    """Appends a row per side."""
    base = statistics.median(seconds["torch"])
    rows = []
    for name, values in seconds.items():
        median, low, high = spread(values)
        rows.append(
            {
                "date": today(),
                "device": describe(device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "nsae": nsae_cli.__version__,
                **dict(zip(("d_in", "d_sae", "batch"), shape, strict=True)),
                "side": name,
                "rounds": len(values),
                "median_s": f"{median:.5f}",
                "p20_s": f"{low:.5f}",
                "p80_s": f"{high:.5f}",
                "ratio_to_torch": f"{base / median:.2f}",
            }
        )
    append_rows(CSV, rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="nsae's training step against plain torch")
    parser.add_argument("--shape", action="append", help="d_in,d_sae,batch; may be repeated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    for text in arguments.shape or SHAPES:
        d_in, d_sae, batch = map(int, text.split(","))
        seconds = compare(d_in, d_sae, batch, arguments.rounds, device)
        record((d_in, d_sae, batch), seconds, device)
        ours, theirs = (statistics.median(seconds[name]) for name in ("nsae", "torch"))
        print(
            f"d_in {d_in}, d_sae {d_sae}, batch {batch}: nsae {ours * 1e3:,.1f} ms, torch {theirs * 1e3:,.1f} ms, "
            f"torch / nsae = {theirs / ours:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

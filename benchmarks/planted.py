"""Rows with planted sparse features, and a relu SAE trained on them: where the benchmarks of one step begin.

Activations of a randomly initialised language model have no features to find, and those of a trained one cannot be
had offline. Here a row is a sum of random unit directions: 3·d_sae of them, with firing rates that are lognormal
(σ = 1.5, so that a few fire often and most seldom), 40 a row on average, coefficients lognormal (σ = 0.5), plus a
constant direction (a third of a row's length) and Gaussian noise (a tenth). Rows are scaled to a geometric mean norm
of √d_in. Then 0.8 % of them become sinks: one constant direction, 20 times as long as a typical row. Everything
follows from the seed. Rows are float16, as in a store.

The SAE is trained by nsae itself, from its own initialisation, with a penalty that is steered until ordinary rows have
about 64 active features; it is kept in `.cache/`. Its L0 on the very rows of a benchmark is measured again each time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nsae_cli.kernels.types import Weights
from nsae_cli.sae.init import initialise
from nsae_side import as_rows, nsae_cell, weights_of

CACHE = Path(__file__).parent / ".cache"
TARGET_L0 = 64.0
DIRECTIONS_PER_FEATURE = 3
ACTIVE = 40.0
SINKS = 0.008
SINK_FACTOR = 20.0
TRAINING_ROWS = 32_768


@dataclass(frozen=True)
class Planted:
    """Rows [N, d] in float16 and which of them are sinks."""

    x: torch.Tensor
    is_sink: torch.Tensor

    def to(self, device: torch.device) -> Planted:
        """The rows on a device."""
        return Planted(self.x.to(device), self.is_sink.to(device))


@dataclass(frozen=True)
class Start:
    """An SAE with unit decoder rows, the penalty it was trained with, and where it came from."""

    weights: Weights
    beta: float
    kind: str

    def to(self, device: torch.device) -> Start:
        """The SAE on a device."""
        return Start(Weights(*(tensor.to(device) for tensor in self.weights.tensors())), self.beta, self.kind)


def planted_rows(d_in: int, d_sae: int, count: int, seed: int) -> Planted:
    """`count` rows; `seed` is of the draw, the directions are always the same."""
    world = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS_PER_FEATURE * d_sae, d_in, generator=world)
    directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    rates = torch.exp(1.5 * torch.randn(len(directions), generator=world))
    constant, sink = torch.nn.functional.normalize(torch.randn(2, d_in, generator=world))

    draw = torch.Generator().manual_seed(seed)
    active = torch.poisson(torch.full((count,), ACTIVE), generator=draw).long().clamp_min(1)
    features = torch.multinomial(rates, int(active.sum()), replacement=True, generator=draw)
    sizes = torch.exp(0.5 * torch.randn(len(features), generator=draw))
    starts = active.cumsum(0) - active
    x = torch.nn.functional.embedding_bag(features, directions, starts, mode="sum", per_sample_weights=sizes)
    length = torch.linalg.vector_norm(x, dim=1).log().mean().exp()
    x += constant * (length / 3) + torch.randn(count, d_in, generator=draw) * (0.1 * length / d_in**0.5)
    x *= d_in**0.5 / torch.linalg.vector_norm(x, dim=1).log().mean().exp()
    is_sink = torch.rand(count, generator=draw) < SINKS
    x[is_sink] = sink * (SINK_FACTOR * d_in**0.5)
    return Planted(x.half(), is_sink)


@torch.no_grad()
def measure_l0(weights: Weights, rows: Planted) -> tuple[float, float, float]:
    """Mean number of active features of all rows, of ordinary rows, of sinks."""
    counts = []
    for part in rows.x.split(512):
        counts.append(((part.float() @ weights.W_enc + weights.b_enc) > 0).sum(dim=1))
    l0 = torch.cat(counts).float()
    return float(l0.mean()), float(l0[~rows.is_sink].mean()), float(l0[rows.is_sink].mean())


def make_start(d_in: int, d_sae: int, rows: Planted, *, synthetic: bool, steps: int = 600) -> Start:
    """The SAE of a benchmark, from the cache if it has been made before."""
    if synthetic:
        return _thresholded(d_in, d_sae, rows)
    path = CACHE / f"planted-{d_in}-{d_sae}-{steps}.safetensors"
    if not path.exists():
        start = _train(d_in, d_sae, rows, steps)
        CACHE.mkdir(exist_ok=True)
        save_file(start.weights.named() | {"beta": torch.tensor(start.beta)}, path)
    saved = load_file(path)
    beta = float(saved.pop("beta"))
    return Start(Weights(**saved), beta, f"trained {steps} steps")


def _train(d_in: int, d_sae: int, rows: Planted, steps: int) -> Start:
    """An SAE trained for `steps` steps, with the penalty steered to an L0 of 64 on ordinary rows."""
    batch_size = 512
    generator = torch.Generator().manual_seed(1)
    ordinary = rows.x[~rows.is_sink].float()
    weights = initialise("relu", "unit", d_sae, ordinary[:2048], ordinary.mean(dim=0), generator)
    cell = nsae_cell(weights, batch_size=batch_size, beta=0.3, steps=steps, lr=1e-3, lr_warm_up=0.05)
    smooth = None
    for step in range(steps):
        chosen = torch.randint(0, len(rows.x), (batch_size,), generator=generator)
        log = cell.train_step(as_rows(rows.x[chosen]), step)
        l0 = float(log.result.l0[~rows.is_sink[chosen]].mean())
        smooth = l0 if smooth is None else 0.8 * smooth + 0.2 * l0
        change = max(0.97, min(1.03, (smooth / TARGET_L0) ** 0.03))
        cell.objective = replace(cell.objective, beta=cell.objective.beta * change)
        if step % 50 == 0 or step == steps - 1:
            error = float(log.result.sq_error[~rows.is_sink[chosen]].mean()) / d_in
            print(
                f"  training the SAE of the benchmark, step {step}: L0 {l0:.0f}, relative squared error {error:.3f}, "
                f"beta {cell.objective.beta:.3f}",
                flush=True,
            )
    return Start(weights_of(cell), cell.objective.beta, f"trained {steps} steps")


def _thresholded(d_in: int, d_sae: int, rows: Planted) -> Start:
    """Random unit decoder rows, the encoder its transpose, thresholds at which each feature has an equal share."""
    W_dec = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(1))
    W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    W_enc = W_dec.t().contiguous()
    sample = rows.x[~rows.is_sink][:2048].float()
    rank = max(1, round(len(sample) * TARGET_L0 / d_sae))
    b_enc = torch.cat([-(sample @ part).topk(rank, dim=0).values[-1] for part in W_enc.split(4096, dim=1)])
    return Start(Weights(W_enc, b_enc, W_dec, sample.mean(dim=0)), 1.0, "synthetic thresholds")

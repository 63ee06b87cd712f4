"""Make `mini-sink`: `mini` with a first-position norm spike of GPT-2's size *placed* into it. Nothing is learned here.

    python make_sink.py [--source DIR] [--out DIR] [--ratio 19] [--last-ratio 1]

Two hidden units of the MLPs, each the least used of its block, are rewritten:

- one in block 1 becomes a detector of position 0 that adds a multiple of the mean residual found there, so that the
  norm at position 0 is `ratio` times the median norm of all other positions after blocks 1 and 2;
- one in the last block detects position 0 again and takes away what was added and most of the spike that `mini`
  learned by itself, so that the last block's output is ordinary again, as in GPT-2.

This changes little else since LayerNorm hides scale: the blocks between read nearly the same vector as before.

With causal attention the residual at position 0 depends on the first token alone, so the detectors are fitted to
every token of the vocabulary in that place, not to a sample.
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from train_model import END_OF_TEXT_ID, SHAPE, rows_at, token_stream
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nsae_cli.assets import model_dir

SPIKE_BLOCK = 1
LAST_BLOCK = SHAPE.n_layer - 1
ACTIVATION = 40.0  # of a detector at position 0, mean over first tokens
SILENCE = -6.0  # largest pre-activation elsewhere, on the rows of the fit; gelu(-6) is 0 in float32
EVENNESS = 10.0  # how much more an even activation over first tokens counts than an even silence elsewhere
N_ROWS = 512  # training rows that stand for all other positions


@dataclass(frozen=True)
class Probe:
    """One block at position 0, for every first token, and at the other positions of some training rows."""

    mlp_in_first: Tensor  # [n_vocab, d_model], input of the MLP (after ln_2)
    mlp_in_other: Tensor  # [n_tokens, d_model]
    resid_first: Tensor  # [n_vocab, d_model], output of the block
    resid_other: Tensor  # [n_tokens, d_model]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=model_dir("mini"), help="folder of the model to change")
    parser.add_argument("--out", type=Path, default=model_dir("mini-sink"), help="folder of the changed model")
    parser.add_argument("--ratio", type=float, default=19.0, help="norm at position 0 in medians, after block 1")
    parser.add_argument("--last-ratio", type=float, default=1.0, help="the same after the last block")
    args = parser.parse_args()

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.source).eval()
    stream = token_stream(AutoTokenizer.from_pretrained(args.source), "train")
    place_sink(model, stream, args.ratio, args.last_ratio)
    model.save_pretrained(args.out)
    for path in args.source.glob("tokenizer*"):
        shutil.copyfile(path, args.out / path.name)


@torch.no_grad()
def place_sink(model: PreTrainedModel, stream: Tensor, ratio: float, last_ratio: float) -> None:
    """Rewrite one unit of block 1's MLP and one of the last block's, in place."""
    weights = first_token_weights(stream)

    before = probe_block(model, SPIKE_BLOCK, stream)
    learned = weights @ before.resid_first
    spike = (ratio * median_norm(before.resid_other) / learned.norm() - 1) * learned
    learned_last = weights @ probe_block(model, LAST_BLOCK, stream).resid_first
    rewrite_unit(model, SPIKE_BLOCK, before, spike - spike.mean())  # LayerNorm subtracts the mean over dimensions

    after = probe_block(model, LAST_BLOCK, stream)
    kept = last_ratio * median_norm(after.resid_other) / learned_last.norm() * learned_last
    rewrite_unit(model, LAST_BLOCK, after, kept - weights @ after.resid_first)


def first_token_weights(stream: Tensor) -> Tensor:
    """Weights [n_vocab] that sum to 1: one half for `<|endoftext|>`, one half for text tokens by frequency."""
    counts = torch.bincount(stream, minlength=SHAPE.n_vocab).float()
    counts[END_OF_TEXT_ID] = 0
    weights = counts / counts.sum() / 2
    weights[END_OF_TEXT_ID] = 0.5
    return weights


def probe_block(model: PreTrainedModel, layer: int, stream: Tensor) -> Probe:
    """Run the model on every token as a first token, and on training rows with and without `<|endoftext|>` first."""
    block = model.transformer.h[layer]
    seen: dict[str, Tensor] = {}
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.update(mlp_in=inputs[0])),
        block.register_forward_hook(lambda _, __, output: seen.update(resid=output)),
    ]
    model(torch.arange(SHAPE.n_vocab)[:, None])
    mlp_in_first, resid_first = seen["mlp_in"][:, 0], seen["resid"][:, 0]
    starts = torch.linspace(1, len(stream) - SHAPE.n_context - 1, N_ROWS).long()
    model(rows_at(stream, starts, torch.arange(N_ROWS) % 2 == 0)[:, :-1])
    mlp_in_other, resid_other = (seen[name][:, 1:].flatten(0, 1) for name in ("mlp_in", "resid"))
    for hook in hooks:
        hook.remove()
    return Probe(mlp_in_first, mlp_in_other, resid_first, resid_other)


def rewrite_unit(model: PreTrainedModel, layer: int, probe: Probe, output: Tensor) -> None:
    """Make the least used hidden unit of a block's MLP add `output` [d_model] at position 0 and nothing elsewhere."""
    mlp = model.transformer.h[layer].mlp
    unit = least_used_unit(mlp, probe.mlp_in_other)
    weight, bias = fit_detector(probe.mlp_in_first, probe.mlp_in_other)
    mlp.c_fc.weight[:, unit] = weight
    mlp.c_fc.bias[unit] = bias
    mlp.c_proj.weight[unit] = output / ACTIVATION

    first, other = (x @ weight + bias for x in (probe.mlp_in_first, probe.mlp_in_other))
    print(
        f"block {layer}, unit {unit}: pre-activation {first.min():.1f} to {first.max():.1f} at position 0, "
        f"at most {other.max():.1f} elsewhere; writes {output.norm():.1f}"
    )


def least_used_unit(mlp: torch.nn.Module, mlp_in: Tensor) -> int:
    """The hidden unit with the smallest mean contribution |activation| x |output weight|."""
    activations = mlp.act(mlp.c_fc(mlp_in))
    return int((activations.abs().mean(dim=0) * mlp.c_proj.weight.norm(dim=1)).argmin())


def fit_detector(first: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Input weight [d_model] and bias of a unit that fires for all rows of `first` and for none of `other`.

    A linear discriminant whose within-class covariance is mostly that of `first`, so that the activation there is as
    even as possible; then scaled such that it is `ACTIVATION` there on average and below `SILENCE` elsewhere.
    """
    covariance = EVENNESS * torch.cov(first.T) + torch.cov(other.T)
    direction = torch.linalg.solve(covariance + 1e-3 * torch.eye(len(covariance)), first.mean(0) - other.mean(0))
    top, bottom = (first @ direction).mean(), (other @ direction).max()
    scale = (ACTIVATION - SILENCE) / (top - bottom)
    return scale * direction, SILENCE - scale * bottom


def median_norm(x: Tensor) -> Tensor:
    """Median of the L2 norms of the rows of x [n, d_model]."""
    return x.norm(dim=1).median()


if __name__ == "__main__":
    main()

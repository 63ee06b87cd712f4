"""How fast nsae reads a residual stream, side by side with TransformerLens as SAELens calls it.

    make bench-setup
    .venv-bench/bin/python benchmarks/bench_collect_peers.py [--rounds 5] [--tokens 8192] [--threads 1]

A random full-size GPT-2 small on the CPU, ``resid_pre`` of layer 6, contexts of 256 and 1024, batches of 1024 tokens.
Both sides hold the same weights: TransformerLens is built from its own configuration and given the weights by its own
conversion for GPT-2, nothing folded or centred, as SAELens loads it. That both give the same residuals is checked
before anything is timed. Each round times, one after the other on the same tokens,

- ``sae-lens-way``: `HookedTransformer.run_with_cache(names_filter=[hook], stop_at_layer=7, prepend_bos=False)`, what
  SAELens' ActivationsStore calls for this hook: a block more than resid_pre needs;
- ``transformer-lens``: the same ended after the sixth block (`stop_at_layer=6`), whose output is the residual;
- ``nsae``: nsae's forward with a hook, float32, ended after the sixth block;
- ``nsae-bf16``: the same in bfloat16: another rounding, not another way of reading (recorded by `nsae collect`).

Forward passes only: no tokenising, shuffling or writing on any side. Rows of data/collect_peers.csv: tokens a second
by the wall clock and per CPU second of all threads, and `ratio`: the median over rounds of this side's rate divided by
that of ``sae-lens-way``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

import nsae_cli
from nsae_cli.lm.families import FAMILIES
from nsae_cli.lm.harvest import ResidualReader
from peers import version
from record import append_rows, describe, spread, today

CSV = Path(__file__).parent / "data" / "collect_peers.csv"
LAYER = 6
HOOK = f"blocks.{LAYER}.hook_resid_pre"
CONTEXTS = (256, 1024)
BATCH_TOKENS = 1024


def transformer_lens_model(model: GPT2LMHeadModel) -> torch.nn.Module:
    """The same model in TransformerLens, no processing of the weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = model.config
    hooked_config = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=config.layer_norm_epsilon,
        original_architecture="GPT2LMHeadModel",
        device="cpu",
    )
    with warnings.catch_warnings():  # it announces its successor
        warnings.simplefilter("ignore", DeprecationWarning)
        hooked = HookedTransformer(hooked_config)
    hooked.load_and_process_state_dict(
        convert_gpt2_weights(model, hooked_config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked.eval()


def nsae_residuals(model: GPT2LMHeadModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from token ids to nsae's residuals."""
    reader = ResidualReader(model, FAMILIES["gpt2"], "resid_pre", [LAYER])

    def read(ids: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        reader.run(ids, lambda _layer, residual: found.append(residual))
        return found[0]

    return read


def make_sides(
    model: GPT2LMHeadModel, model_bf16: GPT2LMHeadModel
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions from token ids [batch, context] to residuals [batch, context, d]."""
    hooked = transformer_lens_model(model)

    @torch.no_grad()
    def sae_lens_way(ids: torch.Tensor) -> torch.Tensor:
        return hooked.run_with_cache(ids, names_filter=[HOOK], stop_at_layer=LAYER + 1, prepend_bos=False)[1][HOOK]

    @torch.no_grad()
    def equal_blocks(ids: torch.Tensor) -> torch.Tensor:
        return hooked.run_with_cache(ids, names_filter=[HOOK], stop_at_layer=LAYER, prepend_bos=False)[0]

    return {
        "sae-lens-way": sae_lens_way,
        "transformer-lens": equal_blocks,
        "nsae": nsae_residuals(model),
        "nsae-bf16": nsae_residuals(model_bf16),
    }


def check_equality(sides: dict[str, Callable[[torch.Tensor], torch.Tensor]], ids: torch.Tensor) -> None:
    """All float32 sides give the same residuals up to rounding; bfloat16's distance is printed.

    Per block a residual passes four chained products of at most 4·d terms, so relative errors of about
    6 blocks · 4 · √(4·768) · 2⁻²⁴ = 8e-5 of the residual's norm are what rounding explains.
    """
    tolerance = LAYER * 4 * math.sqrt(4 * 768) * 2.0**-24
    reference = sides["nsae"](ids).float()
    for name, side in sides.items():
        distance = float(torch.linalg.vector_norm(side(ids).float() - reference) / torch.linalg.vector_norm(reference))
        print(f"residuals of {name} differ from nsae's by {distance:.1e} of their norm", flush=True)
        if name != "nsae-bf16" and not distance <= tolerance:
            raise SystemExit(f"{name} does not read the same residuals: {distance:.1e} > {tolerance:.1e}")


def rates(side: Callable[[torch.Tensor], torch.Tensor], batches: torch.Tensor) -> tuple[float, float]:
    """Tokens per second and per CPU second. `batches` is [number, batch, context]."""
    wall, cpu = time.perf_counter(), time.process_time()
    for ids in batches:
        side(ids)
    return batches.numel() / (time.perf_counter() - wall), batches.numel() / (time.process_time() - cpu)


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192, help="per measurement, a multiple of 1024")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(GPT2Config(), attn_implementation="sdpa").eval()
    model_bf16 = GPT2LMHeadModel._from_config(GPT2Config(), attn_implementation="sdpa").eval()
    model_bf16.load_state_dict(model.state_dict())
    model_bf16.to(torch.bfloat16)
    sides = make_sides(model, model_bf16)
    check_equality(sides, torch.randint(0, 50257, (1, 1024)))
    for context in CONTEXTS:
        batches = torch.randint(0, 50257, (args.tokens // BATCH_TOKENS, BATCH_TOKENS // context, context))
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name in sides if number % 2 else reversed(sides):
                pair = rates(sides[name], batches if number else batches[:1])  # the first round warms up
                if number:
                    measured[name].append(pair)
        rows = []
        for name, pairs in measured.items():
            others = measured["sae-lens-way"]
            ratio = [statistics.median(a[c] / b[c] for a, b in zip(pairs, others, strict=True)) for c in (0, 1)]
            wall, cpu = (spread([pair[clock] for pair in pairs]) for clock in (0, 1))
            rows.append(
                {
                    "date": today(),
                    "device": describe(torch.device("cpu")),
                    "threads": args.threads,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "transformer_lens": version("transformer-lens"),
                    "nsae": nsae_cli.__version__,
                    "side": name,
                    "blocks": LAYER + 1 if name == "sae-lens-way" else LAYER,
                    "context": context,
                    "tokens": args.tokens,
                    "rounds": len(pairs),
                    **{f"wall_{k}": f"{value:.1f}" for k, value in zip(("median", "p20", "p80"), wall, strict=True)},
                    **{f"cpu_{k}": f"{value:.1f}" for k, value in zip(("median", "p20", "p80"), cpu, strict=True)},
                    "ratio_wall": f"{ratio[0]:.3f}",
                    "ratio_cpu": f"{ratio[1]:.3f}",
                }
            )
            print(
                f"context {context:5} {name:17} {wall[0]:8,.0f} tokens/s, {cpu[0]:8,.0f} tokens/CPU-s; ÷ sae-lens-way "
                f"{ratio[0]:.2f} wall, {ratio[1]:.2f} CPU",
                flush=True,
            )
        append_rows(CSV, rows)


if __name__ == "__main__":
    main()

"""Measure the embedded models on held-out text; every number in this folder's README comes from here.

    python measure.py [NAME=DIR ...] [--out FILE]

`mini`, `mini-sink` and any further NAME=DIR see 512 held-out contexts of 128 tokens, with `<|endoftext|>` in front
("eot") and without, cut anywhere in the text ("text"); and 512 contexts of the train split ("train", with
`<|endoftext|>`), whose loss shows what the split costs. Results go to `results.json`, the README's tables to stdout.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from train_model import END_OF_TEXT_ID, HERE, SHAPE, rows_at, token_stream
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nsae_cli.assets import BUILTIN_SPLITS, EMBEDDED_MODELS, builtin_documents, model_dir

N_ROWS = 512
FIRST_QUERY = 16  # attention to position 0 is averaged over later queries: early ones have little else to attend to
HOOKS = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(SHAPE.n_layer))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME=DIR", help="further models to measure")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    folders = {name: model_dir(name) for name in EMBEDDED_MODELS}
    folders |= {name: Path(folder) for name, folder in (item.split("=", 1) for item in args.models)}

    torch.set_num_threads(1)
    results = {"corpus": measure_corpus(), "models": {}}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        streams = {split: token_stream(tokenizer, split) for split in BUILTIN_SPLITS}
        results["models"][name] = measure_model(model, streams)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_tables(results["models"])


def measure_corpus() -> dict[str, dict[str, float]]:
    """Size of each split, in documents, bytes and tokens of the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir("mini"))
    sizes = {}
    for split in BUILTIN_SPLITS:
        documents = list(builtin_documents(split))
        n_tokens = len(token_stream(tokenizer, split))
        sizes[split] = {
            "documents": len(documents),
            "bytes": sum(len(text.encode()) for text in documents),
            "tokens": n_tokens,
            "chars_per_token": round(sum(map(len, documents)) / (n_tokens - len(documents)), 3),
        }
    return sizes


def measure_model(model: PreTrainedModel, streams: dict[str, Tensor]) -> dict[str, dict]:
    """All figures of a model on each kind of context, cut evenly spaced from the token streams of the splits."""
    kinds = {"eot": ("heldout", True), "text": ("heldout", False), "train": ("train", True)}
    figures = {}
    for kind, (split, with_end_of_text) in kinds.items():
        starts = torch.linspace(1, len(streams[split]) - SHAPE.n_context - 1, N_ROWS).long()
        rows = rows_at(streams[split], starts, torch.full((N_ROWS,), with_end_of_text))
        figures[kind] = measure_rows(model, rows)
    return figures


@torch.no_grad()
def measure_rows(model: PreTrainedModel, rows: Tensor) -> dict:
    """Figures on rows [n_rows, n_context + 1]."""
    ids = rows[:, :-1]
    with recording(model) as seen:
        output = model(ids, output_attentions=True)
    loss = F.cross_entropy(output.logits.transpose(1, 2), rows[:, 1:], reduction="none")  # [row, position], nats
    return {
        "loss": round(loss.mean().item(), 4),
        "loss_position_0": round(loss[:, 0].mean().item(), 4),
        "norms": {hook: norm_figures(seen[hook], ids) for hook in HOOKS},
        "attention_to_0": [rounded(pattern[:, :, FIRST_QUERY:, 0].mean(dim=(0, 2))) for pattern in output.attentions],
        "value_norm_ratio_0": [rounded(value_ratio(seen[f"c_attn.{layer}"])) for layer in range(SHAPE.n_layer)],
    }


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """While open, forward passes fill the dict with residuals (by `HOOKS`) and queries, keys, values (`c_attn.l`).

    Block outputs come from hooks: the last entry of transformers' `hidden_states` has gone through ln_f already.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda _module, _inputs, output: seen.update({name: output})

    blocks = model.transformer.h
    handles = [blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.update({HOOKS[0]: inputs[0]}))]
    for layer, block in enumerate(blocks):
        handles.append(block.register_forward_hook(keep(HOOKS[layer + 1])))
        handles.append(block.attn.c_attn.register_forward_hook(keep(f"c_attn.{layer}")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def norm_figures(x: Tensor, ids: Tensor) -> dict[str, float]:
    """Norms of residuals x [row, position, d_model] at position 0 and elsewhere; a ratio is to the median elsewhere."""
    norms = x.norm(dim=-1)
    first, other = norms[:, 0], norms[:, 1:]
    p1, median, p99 = other.flatten().quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
    in_top = norms >= norms.flatten().topk(norms.numel() // 100).values[-1]
    squares = x[:, 0].square()
    return {
        "p1": round(p1, 3),
        "median": round(median, 3),
        "p99": round(p99, 3),
        "max_ratio_elsewhere": round(other.max().item() / median, 3),
        "ratio_0": round(first.mean().item() / median, 3),
        "ratio_0_min": round(first.min().item() / median, 3),
        "ratio_0_max": round(first.max().item() / median, 3),
        "ratio_mid_text_eot": round(other[ids[:, 1:] == END_OF_TEXT_ID].mean().item() / median, 3),
        "share_of_position_0_in_top_1_percent": round(in_top[:, 0].float().mean().item(), 4),
        "energy_share_of_position_0": round((first.square().sum() / norms.square().sum()).item(), 4),
        "energy_share_of_largest_dimension_at_0": round((squares.sum(0).max() / squares.sum()).item(), 4),
    }


def value_ratio(qkv: Tensor) -> Tensor:
    """Per head, mean norm of values at position 0 over the median elsewhere; qkv is [row, position, 3 d_model]."""
    values = qkv[..., 2 * SHAPE.d_model :].unflatten(-1, (SHAPE.n_head, -1)).norm(dim=-1)  # [row, position, head]
    return values[:, 0].mean(dim=0) / values[:, 1:].flatten(0, 1).median(dim=0).values


def rounded(x: Tensor) -> list[float]:
    return [round(value, 3) for value in x.tolist()]


def print_tables(models: dict[str, dict]) -> None:
    """The tables of the README, as Markdown."""
    print("| model | loss, eot first | of it at 0 | loss, text first | of it at 0 | loss on train text |")
    print("|---|---|---|---|---|---|")
    for name, kinds in models.items():
        cells = [f"{kinds[kind][key]:.3f}" for kind in ("eot", "text") for key in ("loss", "loss_position_0")]
        print(f"| {name} | {' | '.join(cells)} | {kinds['train']['loss']:.3f} |")
    for name, kinds in models.items():
        print(f"\n**{name}**\n")
        print("| hook | p1 | median | p99 | max elsewhere | 0, eot first | 0, text first | mid-text eot | energy 0 |")
        print("|---|---|---|---|---|---|---|---|---|")
        for hook in HOOKS:
            eot, text = kinds["eot"]["norms"][hook], kinds["text"]["norms"][hook]
            print(
                f"| `{hook}` | {eot['p1']:.2f} | {eot['median']:.2f} | {eot['p99']:.2f} "
                f"| {eot['max_ratio_elsewhere']:.2f} x | {eot['ratio_0']:.2f} x "
                f"| {text['ratio_0']:.2f} x ({text['ratio_0_min']:.2f} to {text['ratio_0_max']:.2f}) "
                f"| {eot['ratio_mid_text_eot']:.2f} x | {eot['energy_share_of_position_0']:.0%} |"
            )
        print("\n| block | attention to 0, eot first | text first | value norm at 0, eot first | text first |")
        print("|---|---|---|---|---|")
        for layer in range(SHAPE.n_layer):
            cells = (
                " ".join(f"{value:.2f}" for value in kinds[kind][key][layer])
                for key in ("attention_to_0", "value_norm_ratio_0")
                for kind in ("eot", "text")
            )
            print(f"| {layer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""Train `mini`, a GPT-2 of 0.34 M parameters, on the built-in corpus.

    python train_model.py [--seed 0] [--steps 12000] [--out DIR] [--curve FILE]

One CPU thread, float32. Two choices are meant to bring the first-position sink of larger models early in a model
this small: a share of the training rows repeats one passage, which teaches induction (the curve shows both coming
together), and the position embedding starts as sinusoids. Nothing in the loss or in the weights asks for a sink.

Every second row starts with `<|endoftext|>`, the others anywhere in the text, so that position 0 is seen with any
first token.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from nsae_cli.assets import builtin_documents, model_dir

HERE = Path(__file__).resolve().parent
END_OF_TEXT_ID = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    n_vocab: int = 2048
    n_context: int = 128
    d_model: int = 64
    n_layer: int = 4
    n_head: int = 4


@dataclass(frozen=True)
class Recipe:
    """Everything else that decides the weights."""

    seed: int = 0
    steps: int = 12_000
    rows_per_step: int = 8
    repeat_share: float = 0.3  # chance that a row repeats one passage until it is full
    repeat_min_tokens: int = 12
    lr: float = 3e-3
    lr_end: float = 3e-4  # end of the cosine
    warmup_steps: int = 200
    embedding_lr_factor: float = 3.0
    weight_decay: float = 0.3  # hidden matrices only
    beta2: float = 0.98
    clip: float = 1.0
    init_std: float = 0.1
    sinusoid_amplitude: float = 0.2


SHAPE = Shape()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--out", type=Path, default=model_dir("mini"), help="folder of the tokenizer, then the model")
    parser.add_argument("--curve", type=Path, default=HERE / "curve.csv", help="where the training curve goes")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    train_ids = token_stream(tokenizer, "train")
    heldout_ids = token_stream(tokenizer, "heldout")

    recipe = Recipe(seed=args.seed, steps=args.steps)
    model = train(recipe, train_ids, heldout_ids, args.curve)
    save(model, args.out)


# --- data -------------------------------------------------------------------------------------------------------------


def token_stream(tokenizer: PreTrainedTokenizerBase, split: str) -> Tensor:
    """All documents of a split as one int64 stream [n_tokens], `<|endoftext|>` in front of each."""
    stream = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(builtin_documents(split))):
        stream += [END_OF_TEXT_ID, *encoding.ids]
    return torch.tensor(stream)


def rows_at(stream: Tensor, starts: Tensor, with_end_of_text: Tensor, n_context: int = SHAPE.n_context) -> Tensor:
    """Rows [n_rows, n_context + 1] of consecutive tokens: inputs `[:, :-1]`, targets `[:, 1:]`.

    Where `with_end_of_text` [n_rows] is true, the row is `<|endoftext|>` followed by the text at its start.
    """
    offsets = torch.arange(n_context + 1)
    rows = stream[(starts[:, None] + offsets - with_end_of_text[:, None].long()).clamp(min=0)]
    rows[with_end_of_text, 0] = END_OF_TEXT_ID
    return rows


def training_rows(stream: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches [rows_per_step, n_context + 1]; even rows start with `<|endoftext|>`, odd ones do not."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    n_rows, n_context = recipe.rows_per_step, SHAPE.n_context
    with_end_of_text = torch.arange(n_rows) % 2 == 0
    while True:
        starts = torch.randint(0, len(stream) - n_context - 1, (n_rows,), generator=generator)
        rows = rows_at(stream, starts, with_end_of_text)
        repeats = torch.rand(n_rows, generator=generator) < recipe.repeat_share
        periods = torch.randint(recipe.repeat_min_tokens, n_context // 2, (n_rows,), generator=generator)
        for i in repeats.nonzero().flatten().tolist():
            first = int(with_end_of_text[i])  # `<|endoftext|>` is not part of the repeated passage
            positions = torch.arange(n_context + 1 - first)
            rows[i, first:] = rows[i, first + positions % periods[i]]
        yield rows


# --- model ------------------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """Affine map whose weight is stored [n_in, n_out], as GPT-2 does."""

    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Causal self-attention; with `keep`, the pattern [row, head, query, key] stays in `self.pattern`."""

    def __init__(self, shape: Shape, std: float, std_out: float) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.c_attn = Conv1D(shape.d_model, 3 * shape.d_model, std)
        self.c_proj = Conv1D(shape.d_model, shape.d_model, std_out)

    def forward(self, x: Tensor, keep: bool = False) -> Tensor:
        n_row, n_pos, d_model = x.shape
        q, k, v = self.c_attn(x).view(n_row, n_pos, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        if keep:
            scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            future = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
            self.pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(n_row, n_pos, d_model))


class MLP(nn.Module):
    def __init__(self, shape: Shape, std: float, std_out: float) -> None:
        super().__init__()
        self.c_fc = Conv1D(shape.d_model, 4 * shape.d_model, std)
        self.c_proj = Conv1D(4 * shape.d_model, shape.d_model, std_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, shape: Shape, std: float, std_out: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.d_model)
        self.attn = Attention(shape, std, std_out)
        self.ln_2 = nn.LayerNorm(shape.d_model)
        self.mlp = MLP(shape, std, std_out)

    def forward(self, x: Tensor, keep: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x), keep)
        return x + self.mlp(self.ln_2(x))


class LeanGPT2(nn.Module):
    """The mathematics and the parameter names of `GPT2LMHeadModel`, without its overhead."""

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        super().__init__()
        std, std_out = recipe.init_std, recipe.init_std / math.sqrt(2 * shape.n_layer)
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(shape.n_vocab, shape.d_model)
        self.transformer.wpe = nn.Embedding(shape.n_context, shape.d_model)
        self.transformer.h = nn.ModuleList(Block(shape, std, std_out) for _ in range(shape.n_layer))
        self.transformer.ln_f = nn.LayerNorm(shape.d_model)
        nn.init.normal_(self.transformer.wte.weight, std=std)
        with torch.no_grad():
            self.transformer.wpe.weight.copy_(sinusoids(shape) * recipe.sinusoid_amplitude)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [row, position, vocabulary] of token ids [row, position]."""
        return self.head(self.residuals(ids)[-1])

    def residuals(self, ids: Tensor, keep: bool = False) -> list[Tensor]:
        """The residual stream before the first block and after each one, each [row, position, d_model]."""
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[: ids.shape[1]]
        stream = [x]
        for block in self.transformer.h:
            x = block(x, keep)
            stream.append(x)
        return stream

    def head(self, x: Tensor) -> Tensor:
        return F.linear(self.transformer.ln_f(x), self.transformer.wte.weight)


def sinusoids(shape: Shape) -> Tensor:
    """Sinusoidal positions [n_context, d_model]; a start that is meant to help previous-token heads form."""
    frequencies = torch.exp(-torch.arange(0, shape.d_model, 2) / shape.d_model * math.log(2000.0))
    angles = torch.arange(shape.n_context)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# --- training ---------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, train_ids: Tensor, heldout_ids: Tensor, curve: Path, log_every: int = 250) -> LeanGPT2:
    """Train a model from scratch and write one line of `curve` every `log_every` steps."""
    torch.manual_seed(recipe.seed)
    model = LeanGPT2(SHAPE, recipe)
    optimizer = make_optimizer(model, recipe)
    factors = [group["lr"] / recipe.lr for group in optimizer.param_groups]
    batches = training_rows(train_ids, recipe)
    started = time.perf_counter()
    with curve.open("w", newline="") as file:
        writer = None
        for step in range(recipe.steps + 1):
            if step % log_every == 0 or step == recipe.steps:
                line = {"step": step, "seconds": round(time.perf_counter() - started), **probe(model, heldout_ids)}
                if writer is None:
                    writer = csv.DictWriter(file, line)
                    writer.writeheader()
                writer.writerow(line)
                file.flush()
                print(line, flush=True)
            if step == recipe.steps:
                break
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = factor * learning_rate(step, recipe)
            rows = next(batches)
            loss = next_token_loss(model(rows[:, :-1]), rows)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def make_optimizer(model: LeanGPT2, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in three groups: hidden matrices (with decay), vectors, embeddings (at a higher rate)."""
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    blocks = list(model.transformer.h.parameters())
    groups = [
        {"params": [p for p in blocks if p.dim() == 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in blocks if p.dim() == 1] + list(model.transformer.ln_f.parameters())},
        {"params": embeddings, "lr": recipe.lr * recipe.embedding_lr_factor},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=0.0, fused=True)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from `lr` to `lr_end`."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return recipe.lr_end + (recipe.lr - recipe.lr_end) * (1 + math.cos(math.pi * progress)) / 2


def next_token_loss(logits: Tensor, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [row, position, vocabulary] on rows [row, position + 1]."""
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def probe(model: LeanGPT2, stream: Tensor, n_rows: int = 64) -> dict[str, float]:
    """Held-out losses, norm ratios of position 0 after each block, and attention to position 0.

    `ratio_blocks.l` is the mean norm at position 0 divided by the median norm elsewhere, `attention_blocks.l` the
    attention of the best head to position 0, averaged over queries from position 16 on. `_text` marks rows without
    the leading `<|endoftext|>`.
    """
    starts = torch.arange(n_rows) * ((len(stream) - SHAPE.n_context - 1) // n_rows) + 1
    figures: dict[str, float] = {}
    for suffix, flag in (("", True), ("_text", False)):
        rows = rows_at(stream, starts, torch.full((n_rows,), flag))
        residuals = model.residuals(rows[:, :-1], keep=True)
        figures[f"loss{suffix}"] = next_token_loss(model.head(residuals[-1]), rows).item()
        for layer, (block, x) in enumerate(zip(model.transformer.h, residuals[1:], strict=True)):
            norms = x.norm(dim=-1)
            figures[f"median_blocks.{layer}{suffix}"] = norms[:, 1:].median().item()
            figures[f"ratio_blocks.{layer}{suffix}"] = (norms[:, 0].mean() / norms[:, 1:].median()).item()
            to_first = block.attn.pattern[:, :, 16:, 0].mean(dim=(0, 2))
            figures[f"attention_blocks.{layer}{suffix}"] = to_first.max().item()
    figures["loss_repeated"] = repeated_loss(model, stream, starts)
    return {name: round(value, 4) for name, value in figures.items()}


def repeated_loss(model: LeanGPT2, stream: Tensor, starts: Tensor, period: int = 48) -> float:
    """Loss on the second and later copies of a held-out passage of `period` tokens: low where induction works."""
    rows = rows_at(stream, starts, torch.ones(len(starts), dtype=torch.bool))
    rows[:, 1:] = rows[:, 1 + torch.arange(SHAPE.n_context) % period]
    second = period + 12  # a few tokens into the second copy, where the repetition can be known
    return next_token_loss(model(rows[:, :-1])[:, second:], rows[:, second:]).item()


# --- saving -----------------------------------------------------------------------------------------------------------


def save(model: LeanGPT2, out: Path) -> None:
    """Write the files of a `GPT2LMHeadModel` to `out`, after checking that both models agree."""
    config = GPT2Config(
        vocab_size=SHAPE.n_vocab,
        n_positions=SHAPE.n_context,
        n_embd=SHAPE.d_model,
        n_layer=SHAPE.n_layer,
        n_head=SHAPE.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    exported = GPT2LMHeadModel(config).eval()
    missing, unexpected = exported.load_state_dict(model.state_dict(), strict=False)
    assert not [*unexpected, *(name for name in missing if name != "lm_head.weight")]  # the head is tied
    exported.tie_weights()
    ids = torch.arange(SHAPE.n_context)[None] * 7 % SHAPE.n_vocab
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    exported.save_pretrained(out)


if __name__ == "__main__":
    main()

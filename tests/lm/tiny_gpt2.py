"""A tiny random GPT-2, a byte-level tokenizer for it, and a reporter that remembers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

N_LAYERS, D_MODEL, MAX_CONTEXT = 3, 16, 32


def build_model(seed: int = 0) -> GPT2LMHeadModel:
    """Random weights, large enough that layers differ well."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=N_LAYERS,
        n_embd=D_MODEL,
        n_head=2,
        n_positions=MAX_CONTEXT,
        vocab_size=257,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; ``<|endoftext|>`` is token 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{character: i for i, character in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


class RecordingReporter:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.advanced = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def advance(self, amount: int, **fields: str) -> None:
        self.advanced += amount

    @contextlib.contextmanager
    def task(self, description: str, total: int | None, unit: str) -> Iterator[RecordingReporter]:
        yield self

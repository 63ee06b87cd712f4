"""The options of `nsae collect`: as given (`CollectConfig`), and with every default resolved (`ResolvedConfig`).

`HarvestOptions` are those that `nsae train --from-model` has too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from nsae_cli import catalogue
from nsae_cli.device import DeviceOption
from nsae_cli.errors import UsageError
from nsae_cli.lm.corpus import BUILTIN, Corpus, CorpusChoice, default_corpus
from nsae_cli.lm.layers import Site, parse_layers
from nsae_cli.lm.loading import DTypeName, ModelInfo, choose_model_dtype
from nsae_cli.lm.packing import Layout
from nsae_cli.store.workspace import check_name
from nsae_cli.values import Size, parse_size

DEFAULT_TOKENS = 2_000_000
DEFAULT_CONTEXT = 128

# Tokens per forward pass: about where more brings no more speed (benchmarks/bench_collect.py).
_BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 32768}

#: Largest shard. A shard is also the unit of resuming, and up to three of them are in memory.
MAX_SHARD_ROWS = 65_536


def _tokens(value: Any) -> Any:
    return value if value == "all" or value is None else parse_size(value)


def _layers_text(value: Any) -> Any:
    """YAML writes a layer as a number and layers as a list."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class HarvestOptions(BaseModel):
    """What text the model reads and what is kept of it, as given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    corpus: str | None = Field(None, min_length=1, description="builtin, a file, a folder, or a hub data set")
    corpus_config: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of the built-in corpus or of a hub data set")
    text_column: str | None = Field(None, description="column that holds the text (default text)")
    chat_column: str | None = Field(None, description="column that holds messages, for the model's chat template")
    tokens_column: str | None = Field(None, description="column that holds token ids, used as they are")
    site: Site = Field("resid_post", description="where in the block to read")
    context: Size | None = Field(None, ge=2, description="tokens per context (default 128, or the row's length)")
    packing: bool = Field(True, description="documents share contexts")
    bos: bool = Field(True, description="each context starts with the beginning-of-text token")
    dtype: DTypeName = Field("fp16", description="storage")
    model_dtype: Literal["auto"] | DTypeName = Field("auto", description="computation")


class CollectConfig(HarvestOptions):
    """Options as given. None stands for a default that depends on the model, the corpus or the device."""

    model: str = Field("gpt2", min_length=1, description="mini, mini-sink, a folder, or a hub id")
    layers: Annotated[str | None, BeforeValidator(_layers_text)] = Field(
        None, description="layers whose vectors are stored: all, 6, 0,3, 0-3 (default the middle one)"
    )
    norms: Literal["all", "stored"] = Field("all", description="layers whose norms are stored")
    tokens: Annotated[int | Literal["all"] | None, BeforeValidator(_tokens)] = Field(
        None, description="most rows to store, or all (default 2M; all of the built-in corpus for embedded models)"
    )
    batch_size: Size | None = Field(None, ge=1, description="contexts per forward pass")
    device: DeviceOption = Field("auto", description="where to compute")
    seed: Size = Field(0, description="recorded; collecting draws nothing at random")
    name: str | None = Field(None, description="of the store")

    @field_validator("tokens")
    @classmethod
    def _some_tokens(cls, tokens: int | str | None) -> int | str | None:
        if isinstance(tokens, int) and tokens < 1:
            raise ValueError("expected at least 1")
        return tokens

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        try:
            return name if name is None else check_name(name)
        except UsageError as error:
            raise ValueError("expected letters, digits, '.', '_' and '-', at most 120") from error

    def corpus_choice(self, embedded_model: bool) -> CorpusChoice:
        """The corpus and its companions, the default one where none is given."""
        default = default_corpus(embedded_model)
        name, config = self.corpus, self.corpus_config
        if name is None:
            name, config = default.name, config or default.config
        return CorpusChoice(name, config, self.split, self.text_column, self.chat_column, self.tokens_column)


class ResolvedConfig(BaseModel):
    """Everything that determines a store's content, and nothing else; `command.options` of its manifest.

    The device is left out: it decides where the same numbers are computed (but for rounding), not which.
    Local files are known by base name and hash, so that no path is recorded and changed content is noticed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    revision: str | None
    model_sha256: str | None
    corpus: str
    corpus_config: str | None
    split: str | None
    corpus_revision: str | None
    corpus_sha256: str | None
    text_column: str | None
    layers: list[int]
    site: Site
    norms: Literal["all", "stored"]
    tokens: int | Literal["all"]
    context: int
    packing: bool
    bos: bool
    batch_size: int
    dtype: DTypeName
    model_dtype: DTypeName
    seed: int
    chat_column: str | None = None
    tokens_column: str | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Text has neither of these columns, and its stores are named and described as before there were any."""
        options: dict[str, Any] = serialize(self)
        unused = [key for key in ("chat_column", "tokens_column") if options.get(key) is None]
        return {key: value for key, value in options.items() if key not in unused}

    def layout(self, separator: int, tokens: int | None) -> Layout:
        """How documents become contexts.

        Args:
            separator: the tokenizer's beginning-of-text token.
            tokens: most rows to make; None for the whole corpus.
        """
        as_they_are = self.tokens_column is not None and not self.packing
        return Layout(self.context, self.packing, self.bos, separator, tokens, as_they_are)

    def norm_layers(self, n_layers: int) -> list[int]:
        """Layers whose norms are stored."""
        return list(range(n_layers)) if self.norms == "all" else self.layers

    @property
    def row_limit(self) -> int | None:
        """Most rows to store; None for the whole corpus."""
        return None if self.tokens == "all" else self.tokens


@dataclass(frozen=True)
class BatchRoom:
    """What a batch of contexts must fit into.

    Attributes:
        rows: most rows of a batch.
        holder: what holds so many, for messages.
    """

    rows: int = MAX_SHARD_ROWS
    holder: str = "a shard"


def resolve(
    config: CollectConfig, info: ModelInfo, corpus: Corpus, device: torch.device, room: BatchRoom = BatchRoom()
) -> ResolvedConfig:
    """Fills in every default.

    Raises:
        UsageError: layers that the model lacks, a context that it cannot read, fewer tokens than a context, a batch
            that does not fit; every problem at once.
    """
    problems: list[str] = []
    layers: list[int] = []
    try:
        layers = parse_layers(config.layers, info.n_layers, info.name)
    except UsageError as error:
        problems.append(str(error))
    if config.site not in info.sites:
        problems.append(f"--site {config.site}: {info.name} has {', '.join(info.sites)} only")
    context = config.context or min(_usual_context(config, corpus), info.max_context)
    if context > info.max_context:
        problems.append(f"--context {context}: {info.name} reads at most {info.max_context} tokens")
    whole_corpus = config.tokens is None and info.embedded and corpus.name == BUILTIN
    tokens = "all" if whole_corpus else config.tokens or DEFAULT_TOKENS
    if isinstance(tokens, int) and tokens < context and config.packing:
        problems.append(f"--tokens {tokens}: expected at least one context ({context} tokens)")
    most = max(1, room.rows // context)
    batch_size = config.batch_size or max(1, min(_BATCH_TOKENS[device.type] // context, most))
    if context > room.rows:
        problems.append(f"--context {context}: {room.holder} holds {room.rows:,} rows, expected a whole context")
    elif batch_size > most:
        problems.append(f"--batch-size {batch_size}: expected at most {most} ({room.holder} holds {room.rows:,} rows)")
    if problems:
        raise catalogue.OPTION_DOES_NOT_FIT(*problems)
    return ResolvedConfig(
        model=info.name,
        revision=info.revision,
        model_sha256=info.model_sha256,
        corpus=corpus.name,
        corpus_config=corpus.config,
        split=corpus.split,
        corpus_revision=corpus.revision,
        corpus_sha256=corpus.sha256,
        text_column=corpus.column.name if corpus.content == "text" else None,
        layers=layers,
        site=config.site,
        norms=config.norms,
        tokens=tokens,
        context=context,
        packing=config.packing,
        bos=config.bos,
        batch_size=batch_size,
        dtype=config.dtype,
        model_dtype=choose_model_dtype(config.model_dtype, device),
        seed=config.seed,
        chat_column=config.chat_column,
        tokens_column=config.tokens_column,
    )


def _usual_context(config: CollectConfig, corpus: Corpus) -> int:
    """The length of the first row where rows are contexts already, else `DEFAULT_CONTEXT`."""
    if corpus.content != "tokens" or config.packing:
        return DEFAULT_CONTEXT
    first = next((len(document) for document in corpus.documents() if len(document)), DEFAULT_CONTEXT)
    return max(2, first)

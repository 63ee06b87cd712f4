"""The options of `nsae audit`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nsae_cli.device import DeviceOption
from nsae_cli.lm.loading import DTypeName
from nsae_cli.values import Fraction, Size, parse_size


def _tokens(value: Any) -> Any:
    return value if value == "all" or value is None else parse_size(value)


_ONLY_OF_A_TEXT = (
    "corpus", "corpus_config", "split", "text_column", "chat_column", "tokens_column", "context", "bos",
)  # fmt: skip


class AuditOptions(BaseModel):
    """Options of audit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activations: str | None = Field(None, description="measure on this store instead of running the model on a text")
    model: str | None = Field(None, min_length=1, description="the model it reads, where it does not say or says wrong")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    hook: str | None = Field(None, description="where it reads, where it does not say or says otherwise")
    corpus: str | None = Field(None, min_length=1, description="builtin, a file, a folder, or a hub data set")
    corpus_config: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of the built-in corpus or of a hub data set")
    text_column: str | None = Field(None, description="column that holds the text (default text)")
    chat_column: str | None = Field(None, description="column that holds messages, for the model's chat template")
    tokens_column: str | None = Field(None, description="column that holds token ids, used as they are")
    tokens: Annotated[int | Literal["all"], BeforeValidator(_tokens)] = Field(
        100_000, description="most rows to measure, or all"
    )
    context: Size | None = Field(None, ge=2, description="tokens per context (default that of the SAE)")
    bos: bool | None = Field(
        None, description="each context starts with the beginning-of-text token (default as the SAE's)"
    )
    top: Fraction = Field(0.01, gt=0, le=0.5, description="share of the rows in the top and in the bottom group")
    behaviour: bool = Field(True, description="measure what splicing it in costs the model")
    bins: bool = Field(False, description="measure that per norm bin too: eleven more passes of the model")
    centre: bool | None = Field(
        None, description="take each row's mean away before and put it back (default: found out)"
    )
    reference: str | None = Field(None, description="an SAE on the same hook that nbi is compared with")
    model_dtype: Literal["auto"] | DTypeName = Field("fp32", description="computation of the model")
    device: DeviceOption = Field("auto", description="where the model runs")

    @model_validator(mode="after")
    def _one_source_of_rows(self) -> AuditOptions:
        clash = [key for key in _ONLY_OF_A_TEXT if getattr(self, key) is not None]
        if self.activations is not None and clash:
            raise ValueError(
                f"--{clash[0].replace('_', '-')} says how to run the model on a text, --activations not to; "
                f"leave one out"
            )
        if self.bins and not self.behaviour:
            raise ValueError("--bins is about the model's behaviour, which --no-behaviour leaves out; give one of them")
        return self

    @property
    def row_limit(self) -> int | None:
        """Most rows; None for all."""
        return None if self.tokens == "all" else self.tokens

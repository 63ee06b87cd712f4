"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nsae_cli.store.workspace import check_name


def _checked(name: str | None) -> str | None:
    return None if name is None else check_name(name)


Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", callback=_checked, help="Name of the result [default: made from the input and the options]."
    ),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub model.")]
#: What is read of a corpus.
CorpusConfig = Annotated[str | None, typer.Option(metavar="NAME", help="Configuration of a hub data set.")]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="Split of a hub data set or of builtin [default: train].")
]
TextColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Column that holds the text [default: text].")]
ChatColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of messages, for the model's chat template.")
]
TokensColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of token ids; with --no-packing each row is a context.")
]
ContextsPerPass = Annotated[
    str | None, typer.Option(metavar="INT", help="Contexts per forward pass [default: by the device].")
]
#: Of commands that compare predictions, for which the default is fp32.
ModelDType = Annotated[
    str, typer.Option(metavar="auto|fp16|bf16|fp32", help="Computation of the model; auto is bf16 on CUDA.")
]


def given(context: typer.Context, without: Sequence[str]) -> dict[str, Any]:
    """The command's options by name, for a configuration to validate; those that are None take its defaults."""
    return {key: value for key, value in context.params.items() if key not in without and value is not None}

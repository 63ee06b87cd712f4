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


def given(context: typer.Context, without: Sequence[str]) -> dict[str, Any]:
    """The command's options by name, for a configuration to validate; those that are None take its defaults."""
    return {key: value for key, value in context.params.items() if key not in without and value is not None}

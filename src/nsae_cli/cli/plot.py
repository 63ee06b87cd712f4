"""`nsae plot`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nsae_cli.cli.options import Name
from nsae_cli.cli.session import session_of


class What(StrEnum):
    """What can be drawn."""

    activation = "activation"
    training = "training"


def command(
    context: typer.Context,
    what: Annotated[
        What, typer.Argument(help="activation: relu and tanh-relu with their derivatives; training: curves.")
    ],
    saes: Annotated[
        list[str] | None, typer.Argument(metavar="[SAE]...", help="For training: SAEs or groups [default: the newest].")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write [default: plots/WHAT.png in the workspace].")
    ] = None,
    name: Name = None,
) -> None:
    """Draw a figure that is not part of another artifact."""
    from nsae_cli.analysis.plots import draw_activation, draw_training

    session = session_of(context)
    path = output or session.workspace.root / "plots" / f"{name or what.value}.png"
    if what is What.activation:
        draw_activation(path)
    else:
        draw_training(saes or [], session.workspace, path, session.reporter)
    session.finish_file("plot", path)

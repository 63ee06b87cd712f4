"""`nsae plot`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from nsae_cli.cli.options import Name
from nsae_cli.cli.session import session_of
from nsae_cli.errors import UsageError


class What(StrEnum):
    """What can be drawn."""

    activation = "activation"
    training = "training"


def command(
    context: typer.Context,
    what: Annotated[
        What,
        typer.Argument(
            metavar="WHAT",
            help="activation: relu and tanh-relu with their derivatives; training: curves of SAEs.",
        ),
    ],
    saes: Annotated[
        list[str] | None, typer.Argument(metavar="SAE", help="For training: SAEs or groups [default: the newest].")
    ] = None,
    name: Name = None,
) -> None:
    """Draw a figure that belongs to no other artifact.

    Writes plots/NAME.png in the workspace; without --name NAME is activation, or the SAE's or group's name.
    """
    from nsae_cli.analysis.plots import draw_activation, draw_training

    session = session_of(context)
    if what is What.activation:
        if saes:
            raise UsageError(f"plot activation draws no SAE; did you mean `nsae plot training {' '.join(saes)}`?")
        path = draw_activation(session.workspace, name)
    else:
        path = draw_training(saes or [], session.workspace, name, session.reporter)
    session.finish_file("plot", path)

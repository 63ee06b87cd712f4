"""`nsae plot`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from nsae_cli import catalogue
from nsae_cli.cli.options import Name
from nsae_cli.cli.session import session_of


class What(StrEnum):
    """What can be drawn; `analysis.plots.SUBJECTS` draws it."""

    activation = "activation"
    training = "training"
    bias = "bias"
    pareto = "pareto"
    norms = "norms"
    top_norms = "top-norms"


def command(
    context: typer.Context,
    what: Annotated[
        What,
        typer.Argument(
            metavar="WHAT",
            help="activation: relu and tanh-relu with their derivatives; training: curves of SAEs; bias: norm bias per "
            "bin over training; pareto: L0 against errors; norms: heat maps; top-norms: L0 and L1 histograms.",
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="SAEs or groups, for norms what nsae norms made [default: the newest]."),
    ] = None,
    format: Annotated[str, typer.Option("--format", metavar="png|svg|pdf", help="File formats, a comma list.")] = "png",
    name: Name = None,
) -> None:
    """Draw figures for papers and talks.

    Writes plots/NAME.png in the workspace and prints its path; norms and top-norms are two figures each. Without
    --name NAME is made from what is drawn. The same data give the same bytes.
    """
    from nsae_cli.analysis.plots import draw
    from nsae_cli.report.figures import FORMATS
    from nsae_cli.values import split_list

    session = session_of(context)
    try:
        formats = split_list(format)
        unknown = next((one for one in formats if one not in FORMATS), None)
    except ValueError as error:
        raise catalogue.OPTION_VALUE(f"--format {format}: {error}") from error
    if unknown is not None:
        raise catalogue.OPTION_VALUE(f"--format {unknown}: expected {', '.join(FORMATS)}, or several of these")
    paths = draw(what.value, names or [], formats, session.workspace, name, session.reporter)
    session.finish_files("plot", paths)

"""`nsae norms`."""

from __future__ import annotations

from typing import Annotated

import typer

from nsae_cli.cli.options import Device, Name, given
from nsae_cli.cli.session import session_of
from nsae_cli.store.workspace import Kind


def command(
    context: typer.Context,
    activations: Annotated[
        str | None, typer.Argument(metavar="ACTIVATIONS", help="Store: a name or a path [default: the newest].")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Rerun the model with other first tokens and another first positional embedding."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the model is, for --probe, if it is not found by its name.")
    ] = None,
    device: Device = "auto",
    name: Name = None,
) -> None:
    """Measure norms and sinks, and what they do to a loss.

    Writes norms/NAME: norms.json, norms.safetensors and the figures norms.png and norms-position0.png.
    """
    from nsae_cli.analysis.norms_artifact import NormsOptions, run_norms
    from nsae_cli.report.tables import norms_table
    from nsae_cli.store.shards import open_activations
    from nsae_cli.values import validate_options

    session = session_of(context)
    options = validate_options(NormsOptions, given(context, without=("activations", "name")))
    [store] = session.choose(Kind.ACTIVATIONS, activations)
    result = run_norms(open_activations(store.path), options, session.workspace, name, session.reporter)
    session.say_where([result.artifact], result.already_complete)
    for figure in result.figures:
        session.reporter.note(f"figure: {session.workspace.shown(figure)}")
    session.finish("norms", [result.artifact], [result.document], lambda: norms_table(result.document))

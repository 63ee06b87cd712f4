"""`nsae alter`."""

from __future__ import annotations

from typing import Annotated

import typer

from nsae_cli.cli.options import Name, given
from nsae_cli.cli.session import session_of
from nsae_cli.store.workspace import Kind


def command(
    context: typer.Context,
    activations: Annotated[
        str | None, typer.Argument(metavar="ACTIVATIONS", help="Store: a name or a path [default: the newest].")
    ] = None,
    permute_norms: Annotated[
        bool, typer.Option("--permute-norms", help="Permute the norms of non-sinks over their directions, per hook.")
    ] = False,
    stretch_norms: Annotated[
        str | None,
        typer.Option(
            metavar="K",
            help="Stretch the logarithms of non-sinks' norms about their mean by K: 0 makes them equal, 1 changes "
            "nothing.",
        ),
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="INT", help="Seed of the permutation [default: 0].")] = None,
    name: Name = None,
) -> None:
    """Write a store with altered norms, as a control.

    Writes activations/NAME: the same rows, tokens, positions and documents; sinks stay as they are. What an effect of
    norms is, and what goes with norm by content, differ between a store and its permuted twin.
    """
    from nsae_cli.assets import embedded_note
    from nsae_cli.report.store_summary import store_summary
    from nsae_cli.store.alter import AlterOptions, alter_store
    from nsae_cli.store.shards import open_activations
    from nsae_cli.values import validate_options

    session = session_of(context)
    options = validate_options(AlterOptions, given(context, without=("activations", "name")))
    [store] = session.choose(Kind.ACTIVATIONS, activations)
    result = alter_store(open_activations(store.path), options, session.workspace, name, session.reporter)
    session.say_where([result.artifact], result.already_complete)
    manifest = result.manifest.model_dump()
    shown = {**manifest, "embedded_note": embedded_note(manifest["model"])}
    session.finish("alter", [result.artifact], [manifest], lambda: store_summary(result.artifact.name, shown))

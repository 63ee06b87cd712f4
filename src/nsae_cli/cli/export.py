"""`nsae export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    sae: Annotated[
        str, typer.Argument(metavar="SAE", help="An SAE or a group: name, folder, or org/repo[:folder] on the hub.")
    ],
    to: Annotated[Literal["saelens", "sparsify", "dictionary-learning", "saebench"], typer.Option(help="The package.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to make [default: exports/SAE-TO in the workspace].")
    ] = None,
) -> None:
    """Write SAEs as other packages read them.

    What a package cannot compute is refused with the reason, never written as something else. Says how exact the result
    is and what to type to open it.
    """
    from nsae_cli.interop.exporting import export
    from nsae_cli.report.hub_tables import files_table

    session = session_of(context)
    made = export(sae, to, out, session.workspace, session.reporter)
    if all(one.already_there for one in made):
        session.reporter.note("already exported")
    rows = [
        {"sae": one.sae, "format": to, "path": str(one.path), "bytes": one.size, "exactness": one.exactness,
         "code": one.code}
        for one in made
    ]  # fmt: skip

    def show() -> RenderableType:
        sentences = [Text(f"Exact: {exactness}.") for exactness in dict.fromkeys(one.exactness for one in made)]
        codes = {one.way: Text(one.code) for one in reversed(made)}  # one of each kind
        return Group(files_table(rows), "", *sentences, "", *reversed(codes.values()))

    session.finish_measurement("export", {"to": to, "saes": rows}, show)

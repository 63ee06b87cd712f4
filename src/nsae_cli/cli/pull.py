"""`nsae pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from nsae_cli.cli.options import Name
from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/repo, org/repo:folder or hf://org/repo/folder.")],
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit [default: the newest].")
    ] = None,
    name: Name = None,
) -> None:
    """Get SAEs from the Hugging Face hub into the workspace.

    An SAE that nsae trained comes back byte by byte, its hashes checked; a folder of several of them comes as a group.
    One of another package is kept as it is, for `nsae audit`. Writes saes/NAME.
    """
    from nsae_cli.interop.pull import pull
    from nsae_cli.report.hub_tables import files_table

    session = session_of(context)
    pulled = pull(repo, revision, name, session.workspace, session.reporter)
    artifacts = [sae.artifact for sae in pulled.saes]
    session.say_where(artifacts, pulled.already_complete)
    rows = [
        {
            "sae": sae.artifact.name,
            "format": sae.found.format,
            "bytes": sae.size,
            "path": str(sae.artifact.path),
            "hook": sae.found.hook,
            "model": sae.found.model,
            "commit": pulled.commit,
        }
        for sae in pulled.saes
    ]
    session.finish("pull", artifacts, rows, lambda: files_table(rows))

"""`nsae verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARTIFACT", help="Names (of any kind) or paths [default: the whole workspace]."),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Drop what is damaged, so that the command that made it makes that part again."),
    ] = False,
) -> None:
    """Check artifacts again, byte by byte.

    Ends with exit code 3 if something is damaged and not repaired. What is only unfinished is no damage.
    """
    from nsae_cli.analysis.verify import refuse_damage, verify
    from nsae_cli.report.verify_table import verify_table

    session = session_of(context)
    results = verify(artifacts or [], session.workspace, repair=repair, reporter=session.reporter)
    rows = [result.to_json() for result in results]
    session.finish_rows("verify", rows, lambda: verify_table(rows))
    refuse_damage(results)

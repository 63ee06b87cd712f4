"""`nsae list`."""

from __future__ import annotations

import typer

from nsae_cli.cli.session import session_of


def command(context: typer.Context) -> None:
    """Show what the workspace holds."""
    from nsae_cli.analysis.inventory import take_inventory
    from nsae_cli.report.tables import workspace_table

    session = session_of(context)
    session.reporter.note(f"workspace: {session.workspace.place}")
    rows = take_inventory(session.workspace)
    session.finish_rows("list", rows, lambda: workspace_table(rows))

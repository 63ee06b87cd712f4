"""`nsae compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from nsae_cli.cli.options import Name, given
from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    saes: Annotated[
        list[str] | None,
        typer.Argument(metavar="SAE", help="SAEs or groups: names or paths [default: the newest group]."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="ARM", help="Compare every arm with this one too, such as 'relu p=0'."),
    ] = None,
    evals: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use evaluations NAME and NAME-… only [default: all].")
    ] = None,
    fvu_margin: Annotated[
        str, typer.Option(metavar="SHARE", help="Relative difference in FVU and MRE that counts as none.")
    ] = "2%",
    ce_margin: Annotated[str, typer.Option(metavar="NATS", help="Difference in ΔCE that counts as none.")] = "0.005",
    name: Name = None,
) -> None:
    """Compare SAEs at matched L0, seed by seed.

    Table, paired differences with two intervals, predictions checked, a conclusion. Reads what nsae eval found where
    it was run. Writes tables/NAME: table.md, table.json and figures.
    """
    from nsae_cli.analysis.comparison import CompareOptions
    from nsae_cli.analysis.comparison_artifact import run_compare
    from nsae_cli.report.tables import comparison_table
    from nsae_cli.values import validate_options

    session = session_of(context)
    options = validate_options(CompareOptions, given(context, without=("saes", "name")))
    result = run_compare(saes or [], options, session.workspace, name, session.reporter)
    session.say_where([result.artifact], result.already_complete)
    for figure in result.figures:
        session.reporter.note(f"figure: {figure}")
    session.finish("compare", [result.artifact], [result.document], lambda: comparison_table(result.document))

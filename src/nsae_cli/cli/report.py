"""`nsae report`."""

from __future__ import annotations

from typing import Annotated

import typer

from nsae_cli.cli.options import Name
from nsae_cli.cli.session import session_of
from nsae_cli.errors import UsageError


def command(
    context: typer.Context,
    saes: Annotated[
        list[str] | None,
        typer.Argument(metavar="SAE", help="SAEs or groups: names or paths [default: the whole workspace]."),
    ] = None,
    browse: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SAE|none",
            help="SAE or group for the feature browser; may be repeated [default: up to three, one per method].",
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Measure features on this store [default: the one it was trained on]."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Held-out rows to measure features on [default: 500k at most].")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(metavar="INT", help="Strongest contexts kept per feature [default: 10].")
    ] = None,
    name: Name = None,
) -> None:
    """Show everything in one HTML page.

    Writes reports/NAME/report.html: one file of at most 8 MB that fetches nothing, with norms, top-norm histograms,
    training curves, Pareto fronts, tables and a feature browser. Without --name NAME is the SAE's or group's name, or
    workspace. Features that were not measured yet are measured first and kept in features/.
    """
    from nsae_cli.analysis.report import ReportOptions, run_report
    from nsae_cli.values import validate_options

    session = session_of(context)
    given = {"rows": rows, "contexts": contexts}
    options = validate_options(ReportOptions, {key: value for key, value in given.items() if value is not None})
    if browse and "none" in browse and len(browse) > 1:
        raise UsageError(f"--browse none and --browse {next(one for one in browse if one != 'none')}: give one")
    chosen = "none" if browse == ["none"] else browse or []
    report = run_report(saes or [], chosen, activations, options, session.workspace, name, session.reporter)
    left_out = [f"{count:,} {what}" for what, count in report.left_out.items() if count]
    session.reporter.note(
        f"{report.size / 1e6:.1f} MB" + (f"; left out to keep it below 8 MB: {', '.join(left_out)}" if left_out else "")
    )
    session.finish_file("report", report.path)

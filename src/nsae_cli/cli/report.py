"""`nsae report`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli import catalogue
from nsae_cli.cli.options import Name
from nsae_cli.cli.session import Session, session_of

if TYPE_CHECKING:
    from nsae_cli.report.page_content import ReportContent


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
    text: Annotated[
        bool, typer.Option("--text", help="Print sentences and tables instead, and write no page.")
    ] = False,
    name: Name = None,
) -> None:
    """Show everything in one HTML page.

    Writes reports/NAME/report.html: one file of at most 8 MB that fetches nothing, with norms, top-norm histograms,
    training curves, Pareto fronts, tables and a feature browser. Without --name NAME is the SAE's or group's name, or
    workspace. Features that were not measured yet are measured first and kept in features/.
    """
    from nsae_cli.analysis.report import ReportOptions, collect_report, default_name, write_report
    from nsae_cli.values import validate_options

    session = session_of(context)
    given = {"rows": rows, "contexts": contexts}
    options = validate_options(ReportOptions, {key: value for key, value in given.items() if value is not None})
    if browse and "none" in browse and len(browse) > 1:
        raise catalogue.REFUSED_COMBINATION(
            f"--browse none and --browse {next(one for one in browse if one != 'none')}: give one"
        )
    if text and name is not None:
        raise catalogue.OPTION_WITHOUT_EFFECT(
            f"--text writes no page, so that --name {name} names nothing; leave one out"
        )
    chosen: list[str] | Literal["none"] = "none" if browse == ["none"] else browse or []
    content = collect_report(saes or [], chosen, activations, options, session.workspace, session.reporter)
    if text:
        _print(session, content)
        return
    report = write_report(content, session.workspace, name or default_name(saes or [], content))
    left_out = [f"{count:,} {what}" for what, count in report.left_out.items() if count]
    session.reporter.note(
        f"{report.size / 1e6:.1f} MB" + (f"; left out to keep it below 8 MB: {', '.join(left_out)}" if left_out else "")
    )
    session.finish_file("report", report.path)


def _print(session: Session, content: ReportContent) -> None:
    from nsae_cli.report.summary import summarise
    from nsae_cli.report.tables import features_table, norms_table, train_table

    sentences = summarise(content)

    def show() -> RenderableType:
        parts: list[RenderableType] = [Text(content.title, style="bold"), *(Text(one) for one in sentences)]
        if content.missing:
            parts += ["", Text("Not shown", style="bold"), *(Text(one) for one in content.missing)]
        for norms in content.norms:
            parts += ["", norms_table(norms.document)]
        if content.saes:
            runs = [sae.run for sae in content.saes]
            parts += ["", train_table(runs, [sae.name for sae in content.saes], runs[0])]
        for features in content.features:
            parts += ["", features_table(features)]
        return Group(*parts)

    session.finish_measurement("report", {"summary": sentences, "missing": list(content.missing)}, show)

"""`nsae analyze-top-norms`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.cli.options import Name
from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    saes: Annotated[
        list[str] | None,
        typer.Argument(metavar="SAE", help="SAEs or groups: names or paths [default: the newest]."),
    ] = None,
    top: Annotated[
        str, typer.Option(metavar="SHARE", help="Share of the rows in the top group, and in the bottom.")
    ] = "1%",
    activations: Annotated[
        str | None, typer.Option(metavar="STORE", help="Measure on this store [default: the one it was trained on].")
    ] = None,
    rows: Annotated[str | None, typer.Option(metavar="SIZE", help="Held-out rows to use [default: all].")] = None,
    name: Name = None,
) -> None:
    """Compare what SAEs do on high-norm and low-norm tokens.

    Writes top-norms/NAME per SAE: top_norms.json, top_norms.safetensors and the histograms l0.png and l1.png.
    """
    from nsae_cli.analysis.top_norms_artifact import TopNormsOptions, run_top_norms
    from nsae_cli.report.tables import top_norms_findings, top_norms_table
    from nsae_cli.values import validate_options

    session = session_of(context)
    given = {"top": top, "rows": rows}
    options = validate_options(TopNormsOptions, {key: value for key, value in given.items() if value is not None})
    analysis = run_top_norms(saes or [], activations, options, session.workspace, name, session.reporter)
    artifacts = [result.artifact for result in analysis.results]
    session.say_where(artifacts, analysis.already_complete)
    for figure in analysis.figures:
        session.reporter.note(f"figure: {session.workspace.shown(figure)}")
    documents = [result.document for result in analysis.results]

    def show() -> RenderableType:
        parts: list[RenderableType] = [top_norms_table(documents)]
        for document in documents:
            parts.append("")
            if len(documents) > 1:
                parts.append(Text(document["sae"]["name"], style="bold"))
            parts += [Text(sentence) for sentence in top_norms_findings(document)]
        return Group(*parts)

    session.finish("analyze-top-norms", artifacts, documents, show)

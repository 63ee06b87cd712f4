"""`nsae run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Stages and grids; see docs/configuration.md.")],
) -> None:
    """Chain commands from a YAML file.

    What is finished is reused; if a stage fails, what was made before it stays. Ends with the tables of what was made
    and the paths of all figures.
    """
    from nsae_cli.experiment.run import run_config
    from nsae_cli.report.tables import (
        audit_table,
        comparison_table,
        eval_findings,
        eval_table,
        norms_table,
        top_norms_findings,
        top_norms_table,
        train_table,
    )

    session = session_of(context)
    results = run_config(config, session.workspace, session.reporter)

    def show() -> RenderableType:
        parts: list[RenderableType] = []
        for result in results:
            names = [artifact.name for artifact in result.artifacts]
            if result.command == "norms":
                parts += [norms_table(document) for document in result.documents]
            elif result.command == "train":
                parts.append(train_table(result.documents, names, result.documents[0]))
            elif result.command == "analyze-top-norms":
                parts.append(top_norms_table(result.documents))
                for document in result.documents:
                    parts += [Text(document["sae"]["name"], style="bold")]
                    parts += [Text(sentence) for sentence in top_norms_findings(document)]
            elif result.command == "audit":
                for document in result.documents:
                    parts += [audit_table(document), ""]
            elif result.command == "eval":
                parts.append(eval_table(result.documents))
                parts += [Text(sentence) for sentence in eval_findings(result.documents)]
            elif result.command == "compare":
                parts += [comparison_table(document) for document in result.documents]
            parts.append("")
        figures = [figure for result in results for figure in result.figures]
        if figures:
            parts += [
                Text("Figures", style="bold"),
                *(Text(f"  {session.workspace.shown(figure)}") for figure in figures),
            ]
        return Group(*parts)

    session.finish(
        "run",
        [artifact for result in results for artifact in result.artifacts],
        [document for result in results for document in result.documents],
        show,
    )

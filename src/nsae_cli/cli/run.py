"""`nsae run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli import catalogue
from nsae_cli.cli.session import session_of

if TYPE_CHECKING:
    from nsae_cli.experiment.launcher import SubmititLauncher


def command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Stages and grids; see docs/configuration.md.")],
    launcher: Annotated[
        str, typer.Option(metavar="local|submitit", help="Here, or as jobs of a SLURM cluster; see docs/sweeps.md.")
    ] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Of submitit's jobs: partition, time, gpus, cpus, mem, account, qos, parallel, …; may be repeated.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="cells|stages", help="A job for each cell of a grid, or for each stage [default: cells]."),
    ] = None,
    stage: Annotated[
        int | None, typer.Option(metavar="N", help="Carry out only stage N, from 1, and what it reads.")
    ] = None,
    cell: Annotated[
        str | None, typer.Option(metavar="CELL", help="With --stage: only this cell of a grid of train.")
    ] = None,
) -> None:
    """Chain commands from a YAML file.

    What is finished is reused; if a stage fails, what was made before it stays. Ends with the tables of what was made
    and the paths of all figures.
    """
    from nsae_cli.experiment.run import run_config, run_stage
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
    chosen = _launcher(context, config, launcher, slurm or [], split, stage, cell)
    if stage is not None:
        results = [run_stage(config, stage, cell, session.workspace, session.reporter)]
    else:
        results = run_config(config, session.workspace, session.reporter, chosen)

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


def _launcher(
    context: typer.Context,
    config: Path,
    launcher: str,
    slurm: list[str],
    split: str | None,
    stage: int | None,
    cell: str | None,
) -> SubmititLauncher | None:
    """What carries out the stages elsewhere; None where they are carried out here."""
    from nsae_cli.experiment.launcher import SubmititLauncher
    from nsae_cli.experiment.launcher_options import parse_slurm_options

    if launcher not in ("local", "submitit"):
        raise catalogue.OPTION_VALUE(f"--launcher {launcher[:60]}: expected local or submitit")
    if cell is not None and stage is None:
        raise catalogue.OPTION_WITHOUT_EFFECT("--cell is of a stage; give --stage N with it")
    if launcher == "local":
        for given, option in ((slurm, "--slurm"), (split, "--split")):
            if given:
                raise catalogue.OPTION_WITHOUT_EFFECT(
                    f"{option} is for jobs; give --launcher submitit, or leave it out"
                )
        return None
    if stage is not None:
        raise catalogue.REFUSED_COMBINATION("--stage carries out one stage here; leave --launcher submitit out")
    if split not in (None, "cells", "stages"):
        raise catalogue.OPTION_VALUE(f"--split {split[:60]}: expected cells or stages")
    session = session_of(context)
    options = parse_slurm_options(slurm)
    return SubmititLauncher(config, session.workspace, options, split != "stages", session.reporter)

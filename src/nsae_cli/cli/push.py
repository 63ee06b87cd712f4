"""`nsae push`."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from nsae_cli import catalogue
from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    sae: Annotated[str, typer.Argument(metavar="SAE", help="An SAE or a group that `nsae train` made: name or path.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="org/repo, or org/repo:folder [default folder: the SAE's name].")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public, or upload to one that is.")
    ] = False,
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence for the model card, as mit [default: none is named]."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and end.")] = False,
) -> None:
    """Upload SAEs to the Hugging Face hub.

    In SAELens' layout, each SAE in a folder, with run.json and a model card. Shows first what would be uploaded and
    where, and asks. Only complete SAEs whose bytes are what was written; everything becomes visible in one commit. The
    repository is private unless --public is given. Log in with `hf auth login`.
    """
    from rich.console import Console

    from nsae_cli.interop.push import plan_push, send
    from nsae_cli.report.hub_tables import push_table

    session = session_of(context)
    if not (yes or dry_run or sys.stdin.isatty()):
        raise catalogue.REFUSED_COMBINATION(
            "nothing is uploaded without being asked, and there is no terminal to ask on; give --yes, or --dry-run"
        )
    plan = plan_push(
        sae,
        repo,
        session.workspace,
        public=public,
        license_=license_,
        must_ask=not dry_run,
        reporter=session.reporter,
    )
    described = plan.to_json()
    if dry_run:
        session.reporter.note("dry run: nothing is uploaded")
        session.finish_measurement("push", {**described, "uploaded": False}, lambda: push_table(described))
        return
    if not yes:
        Console(stderr=True, highlight=False).print(push_table(described))
        if not _confirmed():
            session.reporter.note("nothing was uploaded")
            session.finish_measurement("push", {**described, "uploaded": False}, lambda: "")
            return
    pushed = send(plan, session.reporter)
    session.reporter.note("already there, unchanged" if pushed.already_there else f"commit {pushed.commit[:12]}")
    result = {**described, "uploaded": True, "url": pushed.url, "commit": pushed.commit}
    session.finish_measurement("push", result, lambda: pushed.url)


def _confirmed() -> bool:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C answers at once
    try:
        return typer.confirm("Upload?", err=True)
    finally:
        signal.signal(signal.SIGINT, before)

"""`nsae`: the Typer application and the process's entry point."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nsae_cli import __version__, interrupt
from nsae_cli.cli import analyze, collect, failures, list_, norms, plot, run, train
from nsae_cli.cli.session import Session
from nsae_cli.store.workspace import Workspace

app = typer.Typer(
    name="nsae",
    help="Train sparse autoencoders on a GPT-2's residual stream and measure what high-norm tokens do to them.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("collect")(collect.command)
app.command("norms")(norms.command)
app.command("train")(train.command)
app.command("analyze-top-norms")(analyze.command)
app.command("run")(run.command)
app.command("plot")(plot.command)
app.command("list")(list_.command)


def _version(asked: bool) -> None:
    if asked:
        print(f"nsae {__version__}")
        raise typer.Exit


@app.callback()
def _before_the_command(
    context: typer.Context,
    workspace: Annotated[
        Path | None, typer.Option(help="Folder of all artifacts (else $NSAE_WORKSPACE, else ./nsae-runs).")
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Warnings and errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit
    context.obj = Session(Workspace.at(workspace), verbosity=int(verbose) - int(quiet), json=json)


def invoke(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; every failure ends with one line on stderr."""
    debug = "--debug" in arguments
    try:
        app(args=arguments, prog_name="nsae", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, BrokenPipeError):
            failures.silence_stdout()
        failures.save_traceback(error, Path(os.environ.get("NSAE_WORKSPACE") or "nsae-runs"))
        return failures.report(error, debug)
    return failures.EXIT_DONE


def main() -> None:
    """Entry point of the `nsae` command."""
    interrupt.install_handlers()
    code = invoke(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        failures.silence_stdout()
        code = code or failures.report(error, False)
    # Daemon threads of the libraries must not delay or disturb the exit code.
    sys.exit(code)

"""`nsae`: the Typer application and the process's entry point."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, TextIO

import typer

from nsae_cli import __version__, catalogue, interrupt
from nsae_cli.cli import (
    alter,
    analyze,
    audit,
    bench,
    collect,
    compare,
    completion,
    doctor,
    eval_,
    export,
    failures,
    list_,
    norms,
    plot,
    pull,
    push,
    report,
    run,
    train,
    verify,
)
from nsae_cli.cli.console import print_text
from nsae_cli.cli.group import CommandGroup
from nsae_cli.cli.ranks import speaks_of
from nsae_cli.cli.session import Session

_CHAIN = """
\b
Four steps, each on the newest result of the one before (mini needs no network):
  nsae collect --model mini
  nsae norms
  nsae train --act tanh-relu --l2-norm sq
  nsae analyze-top-norms
"""

# Plain help: rich's boxes cut option values short and swallow everything in square brackets.
app = typer.Typer(
    name="nsae",
    cls=CommandGroup,
    help="Train sparse autoencoders on a language model's activations; measure what high-norm tokens do to them.",
    epilog=_CHAIN,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("collect")(collect.command)
app.command("norms")(norms.command)
app.command("alter")(alter.command)
app.command("train")(train.command)
app.command("analyze-top-norms")(analyze.command)
app.command("eval")(eval_.command)
app.command("audit")(audit.command)
app.command("compare")(compare.command)
app.command("run")(run.command)
app.command("plot")(plot.command)
app.command("report")(report.command)
app.command("push")(push.command)
app.command("pull")(pull.command)
app.command("export")(export.command)
app.command("bench")(bench.command)
app.command("list")(list_.command)
app.command("doctor")(doctor.command)
app.command("verify")(verify.command)
app.command("completion")(completion.command)


def _version(asked: bool) -> None:
    if asked:
        print_text(f"nsae {__version__}")
        raise typer.Exit


@app.callback()
def _before_the_command(
    context: typer.Context,
    workspace: Annotated[
        str | None,
        typer.Option(metavar="DIR|URL", help="Place of all artifacts (else $NSAE_WORKSPACE, else ./nsae-runs)."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Progress every second, remarks with the time elapsed.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Warnings and errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
    break_lock: Annotated[
        bool, typer.Option("--break-lock", help="Take over a folder that another machine has left locked.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print_text(context.get_help())
        raise typer.Exit
    session: Session = context.obj
    session.begin(workspace, break_lock, verbosity=int(verbose) - int(quiet), json=json)
    if context.invoked_subcommand != "doctor":  # which reports it with everything else
        session.open_workspace()


def invoke(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; every failure ends with one line on stderr."""
    session = Session()
    try:
        _refuse_what_is_no_text(arguments)
        if completion.answers():
            return _answer_the_shell()
        app(args=arguments, prog_name="nsae", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except BaseException as error:
        if failures.is_closed_pipe(error):
            silence_stdout()
        if not speaks_of(error, arguments):
            return failures.describe(error)[0]
        log = failures.save_traceback(error, session.workspace.root)
        return failures.report(error, debug="--debug" in arguments, log=log)
    return failures.EXIT_DONE


def _answer_the_shell() -> int:
    """Completes the line that the shell has put into the environment."""
    try:
        app(args=[], prog_name="nsae", standalone_mode=False)
    except SystemExit as done:
        return int(done.code or 0)
    return failures.EXIT_DONE


def _refuse_what_is_no_text(arguments: list[str]) -> None:
    """Artifacts record options and print paths as UTF-8, which cannot hold any byte or half a surrogate pair."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = argument.encode("utf-8", "backslashreplace").decode("utf-8")
            raise catalogue.COMMAND_LINE(f"argument '{shown[:60]}' is not UTF-8 text; rename what it names") from None


def main() -> None:
    """Entry point of the `nsae` command."""
    _repair_standard_streams()
    interrupt.install_handlers()
    code = invoke(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()  # reported already, or the reader has gone
    # Daemon threads of the libraries must not delay or disturb the exit code.
    sys.exit(code)


def silence_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's own flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):  # no real file, as under a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _repair_standard_streams() -> None:
    """Opens closed standard streams on nothing, and lets none of them fail on a character that it cannot show."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, so that no artifact gets it
    sys.stdout = _shown(sys.stdout or open(1, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 - to the end
    sys.stderr = _shown(sys.stderr or open(2, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def _shown(stream: TextIO) -> TextIO:
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream

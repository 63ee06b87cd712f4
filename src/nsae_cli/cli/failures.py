"""The one table from error type to exit code, and the one line that a failure ends with."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path

import typer

from nsae_cli import errors

EXIT_DONE, EXIT_BUG, EXIT_USAGE, EXIT_ARTIFACT, EXIT_RESOURCE, EXIT_NUMERICAL, EXIT_BUSY = range(7)

EXIT_CODES: dict[type[BaseException], int] = {
    errors.UsageError: EXIT_USAGE,
    errors.ArtifactError: EXIT_ARTIFACT,
    errors.ResourceError: EXIT_RESOURCE,
    errors.NumericalError: EXIT_NUMERICAL,
    errors.BusyError: EXIT_BUSY,
}

# Typer carries its own copy of Click's exceptions; this is the base of everything that it says about wrong usage.
_TYPER_USAGE = typer.BadParameter.__mro__[1]
_ISSUES = "please report it with the output of the same command under --debug"


def describe(error: BaseException) -> tuple[int, str | None]:
    """Exit code and message of whatever ended a command; no message where nothing is to be said."""
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, errors.Interrupted):
        return 128 + error.signum, str(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130, "interrupted"
    if isinstance(error, typer.Exit):
        return error.exit_code, None
    if isinstance(error, _TYPER_USAGE):
        return EXIT_USAGE, _usage_message(error)
    if isinstance(error, BrokenPipeError):
        return EXIT_DONE, None
    if isinstance(error, OSError):
        return EXIT_RESOURCE, _os_message(error)
    if isinstance(error, MemoryError):
        return EXIT_RESOURCE, "out of memory; lower --batch-size or --buffer"
    first = str(error).strip().splitlines()[:1]
    return EXIT_BUG, f"a bug in nsae ({type(error).__name__}: {first[0] if first else 'no message'}); {_ISSUES}"


def _usage_message(error: BaseException) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "nsae"
    return f"{message.rstrip('.')}; see `{command} --help`"


def _os_message(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"disk full{where}; free space and run the same command again"
    return f"{error.strerror or error}{where}; check the path and its permissions"


def report(error: BaseException, debug: bool) -> int:
    """Prints the failure's one line on stderr (after the traceback, with --debug) and returns the exit code."""
    code, message = describe(error)
    if debug and not isinstance(error, typer.Exit):
        traceback.print_exception(error, file=sys.stderr)
    if message is not None:
        print("nsae: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def save_traceback(error: BaseException, folder: Path) -> None:
    """Keeps the traceback of an unexpected error in `folder`/error.log for a bug report."""
    if describe(error)[0] != EXIT_BUG:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.log").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        pass  # The line on stderr says what happened; a log that cannot be written must not hide it.


def silence_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's own flush at exit cannot fail on a closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""The one table from error type to exit code, and the one line that a failure ends with."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from pathlib import Path

import typer

from nsae_cli import catalogue, errors
from nsae_cli.doctor.redaction import without_tokens

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

#: A failure with several problems is one line up to this length; a longer one lists them above its last line.
_ONE_LINE = 200
_SESSION_OPTIONS = ("--workspace", "--verbose", "-v", "--quiet", "-q", "--json", "--debug", "--break-lock", "--version")


def describe(error: BaseException, log: Path | None = None) -> tuple[int, str | None]:
    """Exit code and message of whatever ended a command; no message where nothing is to be said.

    Args:
        error: what was raised.
        log: where the traceback was saved.
    """
    error = translated(error)
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, errors.RankEnded):
        return error.code, error.said
    if isinstance(error, errors.Interrupted):
        return 128 + error.signum, str(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130, "interrupted"
    if isinstance(error, typer.Exit):
        return error.exit_code, None
    if is_closed_pipe(error):
        return EXIT_DONE, None
    first = str(error).strip().splitlines()[:1]
    where = "report it with the output of the same command under --debug" if log is None else f"report it with {log}"
    return EXIT_BUG, f"a bug in nsae ({type(error).__name__}: {first[0][:120] if first else 'no message'}); {where}"


def translated(error: BaseException) -> BaseException:
    """The catalogue's error for what Typer, the operating system and torch raise; anything else as it is."""
    if isinstance(error, _TYPER_USAGE):
        return _of_the_command_line(error)
    if isinstance(error, OSError) and not is_closed_pipe(error):
        return _of_the_system(error)
    if _is_out_of_memory(error):
        return catalogue.OUT_OF_MEMORY("out of memory; lower --batch-size, --buffer or --d-sae")
    return error


def is_closed_pipe(error: BaseException) -> bool:
    """Whether the reader of stdout has gone, as in ``nsae list | head -1``. Typer makes a SystemExit of it."""
    cause = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(cause, BrokenPipeError)


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's (a RuntimeError of that name) and torch's own on the CPU (a RuntimeError with that text)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _of_the_command_line(error: BaseException) -> errors.UsageError:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = message.replace("Value error, ", "").rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "nsae"
    option = getattr(error, "option_name", None)
    if option in _SESSION_OPTIONS and command != "nsae":
        name = command.removeprefix("nsae ")
        return catalogue.COMMAND_LINE(f"{option} stands before the command: nsae {option} ... {name}")
    if message.startswith("No such command") and context is not None:
        if "Did you mean" not in message:
            known = ", ".join(context.command.commands)
            return catalogue.COMMAND_LINE(f"{message[:1].lower()}{message[1:]}; known are {known}")
        message = message.removesuffix("?")
    complaint = message[:1].lower() + message[1:]
    return catalogue.COMMAND_LINE(f"{complaint}; see `{command} --help`")


def _of_the_system(error: OSError) -> errors.NsaeError:
    if error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)[:60]
        return catalogue.NAME_INVALID(f"a name is too long for the file system: {name}...; give a shorter one")
    where = f": {error.filename}" if error.filename else ""
    reason = error.strerror or error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return catalogue.DISK_FULL(f"no space left to write to{where}; free space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return catalogue.NO_PERMISSION(f"{reason}{where}; check the path and its permissions")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return catalogue.FOLDER_MISSING(f"{reason}{where}; check the path and its permissions")
    return catalogue.SYSTEM_ERROR(f"{reason}{where}; check the path and its permissions")


def report(error: BaseException, debug: bool, log: Path | None = None) -> int:
    """Prints the failure's one line on stderr and returns the exit code.

    With --debug the traceback and the entry of the catalogue stand above it. So do many problems, with and without it:
    then the line names the first and their number.
    """
    code, message = describe(error, log)
    with contextlib.suppress(OSError, ValueError):  # a stderr that has gone changes no exit code
        if debug and message is not None:
            print(_traceback(error), end="", file=sys.stderr)
            if (entry := getattr(translated(error), "entry", None)) is not None:
                print(f"docs/errors.md: {entry.name}", file=sys.stderr)
        if message is not None:
            problems = [_one_line(problem) for problem in getattr(error, "problems", [])]
            if len(problems) > 1 and len(message) > _ONE_LINE:
                print(*problems, sep="\n", file=sys.stderr)
                message = f"{problems[0]} (and {len(problems) - 1} more, listed above)"
            print(f"nsae: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


def _traceback(error: BaseException) -> str:
    """The traceback; a server may have quoted the token that it was sent."""
    return without_tokens("".join(traceback.format_exception(error)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def save_traceback(error: BaseException, workspace: Path) -> Path | None:
    """Keeps the traceback of a bug in the workspace's error.log; returns where, or None where there is none."""
    if describe(error)[0] != EXIT_BUG:
        return None
    log = workspace / "error.log"
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        log.write_text(_traceback(error), encoding="utf-8")
    except OSError:
        return None  # The line on stderr says what happened; a log that cannot be written must not hide it.
    return log

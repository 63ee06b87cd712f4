"""The reporter where stderr is no terminal, and the table from error type to exit code."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path

import pytest

from nsae_cli import errors
from nsae_cli.cli import console, failures
from nsae_cli.cli.console import ConsoleReporter, print_result


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize(("verbosity", "every"), [(0, 10.0), (1, 1.0)])
def test_plain_progress(
    verbosity: int, every: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with ConsoleReporter(verbosity).task("working", 1000, "rows") as task:
        task.advance(100)
        clock.now += every / 2
        task.advance(100)
        clock.now += every / 2
        task.advance(50, loss="0.5")
        clock.now += every
        task.advance(750, loss="0.25")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"working:  25% of 1,000 rows, {250 / every:,.0f}/s, {3 * every:,.0f} s left, loss 0.5",
        f"working: 100% of 1,000 rows, {500 / every:,.0f}/s, {2 * every:,.1f} s, loss 0.25",
        f"working: 100% of 1,000 rows, {500 / every:,.0f}/s, {2 * every:,.1f} s, loss 0.25",
    ]


def test_news_before_the_first_unit_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with ConsoleReporter().task("working", 10, "rows") as task:
        clock.now += 60
        task.advance(0, loss="1")
    assert capsys.readouterr().err == ""


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter(-1)
    reporter.note("hidden")
    reporter.warn("[bold]shown[/bold]")
    with reporter.task("hidden", 3, "rows") as task:
        task.advance(3)
    assert capsys.readouterr().err == "warning: [bold]shown[/bold]\n"


def test_a_terminal_that_has_gone_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    reporter = ConsoleReporter()
    reporter.note("nobody hears")
    with reporter.task("working", None, "rows") as task:
        task.advance(1)
    assert failures.report(errors.UsageError("wrong"), debug=False) == 2


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    reporter = ConsoleReporter()
    with reporter.task("working", 1000, "rows") as task:
        reporter.note("a remark")
        print("a library's line", file=sys.stderr)
        task.advance(1000, loss="0.25")
    shown = terminal.getvalue()
    assert sys.stderr is terminal
    for text in ("working", "a remark", "a library's line", "1000/1000", "loss 0.25"):
        assert text in shown


def test_long_lines_stay_whole_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    print_result("word " * 100 + "end", one_line_each=True)
    assert capsys.readouterr().out == "word " * 100 + "end\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.ArtifactError("x"), 3),
        (errors.ResourceError("x"), 4),
        (errors.NumericalError("x"), 5),
        (errors.BusyError("x"), 6),
        (errors.Interrupted(2, "x"), 130),
        (errors.Interrupted(15, "x"), 143),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 4),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (ValueError("x"), 1),
        (AssertionError(), 1),
        (BrokenPipeError(), 0),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert failures.describe(error)[0] == code


def test_messages_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    failures.report(ValueError("first\n  second"), debug=False)
    failures.report(errors.ArtifactError("a\nb\t c"), debug=False)
    failures.report(PermissionError(errno.EACCES, "Permission denied", "/x"), debug=False, log=Path("y"))
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == (
        "nsae: a bug in nsae (ValueError: first); report it with the output of the same command under --debug"
    )
    assert second == "nsae: a b c"
    assert third == "nsae: Permission denied: /x; check the path and its permissions"


def test_every_kind_of_error_has_its_code() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.NsaeError)}
    assert kinds == {*failures.EXIT_CODES, errors.NsaeError, errors.Interrupted, errors.RankEnded}

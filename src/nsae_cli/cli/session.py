"""What the options before the command set up, and how a command's result is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType

from nsae_cli.cli.console import ConsoleReporter, print_json, print_result
from nsae_cli.reporter import Reporter
from nsae_cli.store.workspace import Artifact, Kind, Workspace


@dataclass
class Session:
    """The options that stand before the command."""

    workspace: Workspace
    verbosity: int = 0
    json: bool = False
    reporter: Reporter = field(init=False)

    def __post_init__(self) -> None:
        self.reporter = ConsoleReporter(self.verbosity)

    def choose(self, kind: Kind, reference: str | None) -> list[Artifact]:
        """The artifacts that a positional argument names; without one the newest complete, said on stderr."""
        if reference is not None:
            return self.workspace.find(kind, reference)
        newest = self.workspace.newest(kind)
        self.reporter.note(f"using the newest {kind.folder}: {newest.name}")
        return [newest]

    def finish(
        self, command: str, artifacts: list[Artifact], results: list[Any], show: Callable[[], RenderableType]
    ) -> None:
        """Prints artifacts: one JSON object with --json, else what `show` draws."""
        if not self.json:
            print_result(show())
            return
        described = [{"kind": a.kind.folder, "name": a.name, "path": str(a.path)} for a in artifacts]
        single = len(artifacts) == 1
        print_json(
            {
                "command": command,
                "artifact": described[0] if single else described,
                "result": results[0] if single else results,
            }
        )

    def finish_file(self, command: str, path: Path) -> None:
        """Prints the path of a file that is no artifact of its own."""
        if self.json:
            print_json(
                {"command": command, "artifact": {"kind": "file", "name": path.name, "path": str(path)}, "result": None}
            )
        else:
            print(path)

    def finish_rows(self, command: str, rows: list[dict[str, Any]], show: Callable[[], RenderableType]) -> None:
        """Prints a list that is no artifact."""
        if self.json:
            print_json({"command": command, "artifact": None, "result": rows})
        else:
            print_result(show())


def session_of(context: typer.Context) -> Session:
    """The session that the callback before the command made."""
    found = context.find_root().obj
    assert isinstance(found, Session)
    return found

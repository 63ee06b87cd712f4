"""What the options before the command set up, and how a command's result is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType

from nsae_cli import catalogue
from nsae_cli.cli.console import ConsoleReporter, print_json, print_result, print_text
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit, presence
from nsae_cli.store.workspace import DEFAULT_WORKSPACE, Artifact, Kind, Workspace
from nsae_cli.store.writable import nearest_existing


@dataclass
class Session:
    """The options that stand before the command; their defaults until `begin`."""

    workspace: Workspace = field(default_factory=lambda: Workspace(Path(DEFAULT_WORKSPACE)))
    json: bool = False
    reporter: Reporter = field(default_factory=ConsoleReporter)

    def begin(self, workspace: Path | str | None, break_lock: bool, verbosity: int, json: bool) -> None:
        """Takes over the options.

        Raises:
            UsageError: the workspace is a URL that nobody can open.
            ResourceError: the package for its URL is missing.
        """
        self.json, self.reporter = json, ConsoleReporter(verbosity)
        presence.begin(self.reporter)
        commit.observer = None
        self.workspace = Workspace.at(workspace, break_lock=break_lock)

    def open_workspace(self) -> None:
        """For commands that need the workspace.

        Raises:
            ResourceError: the workspace, or a folder above it, is a file; a URL does not answer.
        """
        existing = nearest_existing(self.workspace.root)
        if not existing.is_dir():
            raise catalogue.FOLDER_MISSING(
                f"workspace {self.workspace.root}: {existing} is a file, not a folder; choose --workspace"
            )
        self.workspace.open()

    def choose(self, kind: Kind, reference: str | None) -> list[Artifact]:
        """The artifacts that a positional argument names; without one the newest complete, said on stderr."""
        if reference is not None:
            return self.workspace.find(kind, reference)
        newest = self.workspace.newest(kind)
        self.reporter.note(f"using the newest {kind.folder}: {newest.name}")
        return [newest]

    def say_where(self, artifacts: list[Artifact], reused: bool) -> None:
        """One line on stderr: where the artifacts are, and whether they were there before."""
        folders = list(dict.fromkeys(artifact.path for artifact in artifacts))
        parents = {folder.parent for folder in folders}
        folder = folders[0] if len(folders) == 1 else parents.pop() if len(parents) == 1 else self.workspace.root
        where = self.workspace.shown(folder)
        what = "" if len(folders) == 1 else f"{len(folders)} artifacts in "
        self.reporter.note(f"{'already complete' if reused else 'saved'}: {what}{where}")

    def finish(
        self, command: str, artifacts: list[Artifact], results: list[Any], show: Callable[[], RenderableType]
    ) -> None:
        """Prints artifacts: one JSON object with --json, else what `show` draws."""
        if not self.json:
            print_result(show())
            return
        described = [{"kind": a.kind.folder, "name": a.name, "path": self.workspace.shown(a.path)} for a in artifacts]
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
        self.finish_files(command, [path])

    def finish_files(self, command: str, paths: list[Path]) -> None:
        """Prints the paths of files that are no artifacts of their own, a line each."""
        if self.json:
            described = [{"kind": "file", "name": path.name, "path": self.workspace.shown(path)} for path in paths]
            artifact = described[0] if len(described) == 1 else described
            print_json({"command": command, "artifact": artifact, "result": None})
        else:
            print_text("\n".join(self.workspace.shown(path) for path in paths))

    def finish_measurement(self, command: str, result: dict[str, Any], show: Callable[[], RenderableType]) -> None:
        """Prints a result that is no artifact."""
        if self.json:
            print_json({"command": command, "artifact": None, "result": result})
        else:
            print_result(show())

    def finish_rows(self, command: str, rows: list[dict[str, Any]], show: Callable[[], RenderableType]) -> None:
        """Prints a list that is no artifact, a line per entry however wide where stdout is no terminal."""
        if self.json:
            print_json({"command": command, "artifact": None, "result": rows})
        else:
            print_result(show(), one_line_each=True)


def session_of(context: typer.Context) -> Session:
    """The session that `cli.app.invoke` made for this command."""
    found = context.find_root().obj
    assert isinstance(found, Session)
    return found

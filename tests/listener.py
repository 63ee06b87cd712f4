"""A reporter for tests."""

from __future__ import annotations

from nsae_cli.reporter import SilentReporter


class Listener(SilentReporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

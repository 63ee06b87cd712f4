"""What a re-check of an artifact finds, and the checks that every kind of artifact shares: its JSON and its files."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nsae_cli.errors import NsaeError
from nsae_cli.store import commit
from nsae_cli.store.seal import FILES, is_plain_name, is_sealed

#: Files that belong to the machine and not to the result.
PASSING = frozenset({"timings.jsonl", "verified.jsonl"})

Level = Literal["damaged", "unfinished", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was written, or that is worth knowing.

    Attributes:
        level: ``damaged``: nothing should be computed from it; ``unfinished``: a command has not ended; ``note``: it
            harms nothing.
        file: name in the artifact's folder, or "" for the folder itself.
        text: what was found, without a full stop.
    """

    level: Level
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}" if self.file else self.text


@dataclass
class Check:
    """The findings of one artifact's check, in the order in which they were made.

    Attributes:
        poll: called between files; raises where a signal asked to stop.
    """

    poll: Callable[[], None] = lambda: None
    findings: list[Finding] = field(default_factory=list)

    def damaged(self, file: str, text: str) -> None:
        """Something is not what was written."""
        self.findings.append(Finding("damaged", file, text))

    def unfinished(self, file: str, text: str) -> None:
        """A command has not ended."""
        self.findings.append(Finding("unfinished", file, text))

    def note(self, file: str, text: str) -> None:
        """Something harmless."""
        self.findings.append(Finding("note", file, text))

    @property
    def state(self) -> Literal["ok", "unfinished", "damaged"]:
        """The worst of the findings; notes do not count."""
        levels = {finding.level for finding in self.findings}
        return "damaged" if "damaged" in levels else "unfinished" if "unfinished" in levels else "ok"


def short(error: BaseException, path: Path) -> str:
    """An error's message for a finding: its path is said already, and its remedy is what `nsae verify` is about."""
    text = str(error).removeprefix(str(path)).removeprefix(":").strip()
    return text.partition("; ")[0] or type(error).__name__


def check_json(check: Check, path: Path, *, version: bool = True) -> dict[str, Any] | None:
    """An artifact's JSON: there, readable, sealed, of a known format. None where nothing further can be said."""
    try:
        document = commit.read_json(path)
    except NsaeError as error:
        check.damaged(path.name, short(error, path))
        return None
    if not isinstance(document, dict):
        check.damaged(path.name, "no JSON object")
        return None
    if version and document.get("format_version") != 1:
        check.damaged(path.name, f"format_version is {document.get('format_version')!r}, this nsae reads 1")
        return None
    if not is_sealed(document):
        check.note(path.name, "not sealed: of an older nsae or another tool, a changed value would not be seen")
    return document


def check_files(check: Check, folder: Path, document: dict[str, Any]) -> None:
    """The data files that the JSON names: there, plain files, and the bytes that were written."""
    hashes = document.get(FILES)
    for name, expected in sorted(hashes.items()) if isinstance(hashes, dict) else ():
        check.poll()
        if not is_plain_name(name):
            check.damaged("", f"names the file {name[:80]!r}, which is not one of this folder")
            continue
        path = folder / name
        if not plain_file(check, path):
            continue
        try:
            found = commit.file_sha256(path)
        except OSError as error:
            check.damaged(name, f"cannot be read ({error.strerror or error})")
            continue
        if found != expected:
            check.damaged(name, "not what was written (SHA-256 differs)")


def damage_of(folder: Path, mark: str, poll: Callable[[], None] = lambda: None) -> Finding | None:
    """The first damage in an artifact's JSON `mark`, or in the files that it names; None where there is none."""
    check = Check(poll)
    document = check_json(check, folder / mark)
    if document is not None:
        check_files(check, folder, document)
    return next((finding for finding in check.findings if finding.level == "damaged"), None)


def plain_file(check: Check, path: Path) -> bool:
    """Whether a file is there and its own; a finding where not."""
    if path.is_symlink():
        check.damaged(path.name, "a symbolic link, which may lead anywhere")
    elif not path.exists():
        check.damaged(path.name, "missing")
    elif not path.is_file():
        check.damaged(path.name, "not a file")
    else:
        return True
    return False


def check_strangers(check: Check, folder: Path, known: Collection[str]) -> None:
    """Notes what lies in the folder and belongs to nothing: leftovers of killed runs, and files of others."""
    left_behind = set(commit.leftovers(folder))
    for path in sorted(folder.iterdir()):
        if path in left_behind:
            check.note(path.name, "left behind by a run that was killed; the next one removes it")
        elif path.name not in known and path.name not in PASSING:
            check.note(path.name, "not of this artifact")

"""Every class of failure in the catalogue, brought about through the real command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import artifact_scenarios  # noqa: F401 - registers its scenarios
import outside_scenarios  # noqa: F401
import pytest
import rank_scenarios  # noqa: F401
import usage_scenarios  # noqa: F401
from provoking import SCENARIOS, Place

from command import Outcome, nsae
from nsae_cli import catalogue
from nsae_cli.cli import failures

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import error_messages

TEMPLATES = [
    (message.entry, re.compile(re.sub(r"\\\{[^{}]*\\\}", ".*", re.escape(message.template))))
    for message in error_messages.messages()
]


def test_every_entry_has_a_scenario() -> None:
    assert set(SCENARIOS) == set(catalogue.ENTRIES)


@pytest.mark.parametrize("name", catalogue.ENTRIES)
def test_failure(name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(finished, tmp_path, monkeypatch, finished)
    errors: list[BaseException] = []
    real = failures.report
    monkeypatch.setattr(failures, "report", lambda error, **options: (errors.append(error), real(error, **options))[1])
    before = _files(finished)
    arguments = SCENARIOS[name](place)
    outcome = nsae("--workspace", place.workspace, *arguments)
    entry = catalogue.ENTRIES[name]
    error = errors[-1]  # some scenarios begin with a command that is stopped
    assert failures.translated(error).entry is entry, outcome.err  # type: ignore[attr-defined]
    if name in ("CANNOT_WORK", "DAMAGE_FOUND"):  # the two commands that print what they found and then fail
        assert outcome.out.startswith(("nsae", "kind"))
        outcome = Outcome(outcome.code, "", outcome.err)
    assert outcome.code == failures.EXIT_CODES[entry.kind]
    assert "\n" not in outcome.message
    assert any(template.search(outcome.message) for constant, template in TEMPLATES if constant == name), (
        f"docs/errors.md has no such message under {entry.name}: {outcome.message}"
    )
    assert _files(finished) == before, "scenarios that write must write elsewhere"


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "verified.jsonl"}

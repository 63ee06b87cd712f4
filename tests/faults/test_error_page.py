"""The catalogue of errors and its page stay whole: no error beside it, no idle entry, no message without a way out."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import nsae_cli
from nsae_cli import catalogue, errors
from nsae_cli.cli.failures import EXIT_CODES

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import error_messages
import generate_errors

PACKAGE = Path(nsae_cli.__file__).parent
MESSAGES = error_messages.messages()
TYPES = {kind.__name__ for kind in EXIT_CODES} | {"NsaeError"}

#: What tells the user what to do, or what would have been right; the values of these names do so themselves.
_WAY_OUT = re.compile(
    r"\b(add|at least|at most|check|choose|collect|compare|convert|copy|delete|expected|free|get|give|has|holds|"
    r"install|knows|known|leave|lower|make|mend|name|only|put|raise|read|reads|remove|rename|restore|run|save|say|see|set|"
    r"show|stop|take|there are|train|try|use|wait|with|write)\b|\{(remedy|repair|nearest|hint|error|why)\}|as in `|"
    r"stands before|did you mean|is not an option"
)


def test_the_page_is_up_to_date() -> None:
    assert generate_errors.PAGE.read_text(encoding="utf-8") == generate_errors.page(), "run `make docs`"


def test_no_error_is_raised_beside_the_catalogue() -> None:
    plain = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            target = node.func if isinstance(node, ast.Call) else node.exc if isinstance(node, ast.Raise) else None
            name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", None)
            if name in TYPES:
                plain.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {name}")
    assert not plain, "raise an entry of nsae_cli.catalogue instead"


def test_every_entry_is_used_and_every_use_is_an_entry() -> None:
    used = {message.entry for message in MESSAGES} - {"Interrupted"}
    assert used == set(catalogue.ENTRIES)


@pytest.mark.parametrize("name", catalogue.ENTRIES)
def test_entry(name: str) -> None:
    entry = catalogue.ENTRIES[name]
    assert entry.name == name.lower().replace("_", "-")
    assert entry.kind in EXIT_CODES
    for text in (entry.cause, entry.remedy):
        assert text.endswith((".", ")."))
        assert text[0].isupper() or text.startswith(("`", "nsae "))
        assert "\n" not in text
        assert "  " not in text
    error = entry("a message; and what to do")
    assert type(error) is entry.kind
    assert error.entry is entry
    assert str(error) == "a message; and what to do"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.place)
def test_message(message: error_messages.Message) -> None:
    """One line; and after what is wrong it says what to do, or what would have been right."""
    assert "\n" not in message.template
    if message.entry != "Interrupted":
        wrong, _, rest = message.template.partition("; " if "; " in message.template else ": ")
        assert _WAY_OUT.search(rest or wrong) or ": only with" in wrong, message.template


def test_several_problems_are_one_error() -> None:
    error = catalogue.OPTION_VALUE("--a 1: expected 2", "--b 3: expected 4")
    assert error.problems == ["--a 1: expected 2", "--b 3: expected 4"]
    assert str(error) == "--a 1: expected 2; --b 3: expected 4"
    error.reword(lambda text: text.replace("--a", "--from-a"))
    assert error.problems == ["--from-a 1: expected 2", "--b 3: expected 4"]
    assert str(error) == "--from-a 1: expected 2; --b 3: expected 4"
    assert error.entry is catalogue.OPTION_VALUE
    assert isinstance(error, errors.UsageError)


def test_templates_name_values_and_resolve_constants() -> None:
    """Worked by hand, from the lines that raise them."""
    found = {(message.entry, message.template) for message in MESSAGES}
    assert ("DISK_FULL", "no space left to write to{where}; free space and run the same command again") in found
    assert (
        "NOT_AN_ARTIFACT",
        "{folder} holds no manifest.json: it is not an activation store; make one with `nsae collect`",
    ) in found
    assert ("SHARD_MISSING", "{path}: the file is missing; {remedy}") in found
    assert ("OPTION_VALUE", "--{option} {value}: expected each value once") in found
    assert ("LAYER_NOT_THERE", "--layers {text}: {part} runs backwards; write the smaller layer first") in found

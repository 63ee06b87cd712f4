"""The help as a table of contents, docs/cli.md that is made from it, and the examples in both."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from command import nsae
from nsae_cli.cli.app import app
from nsae_cli.cli.examples import EXAMPLES
from nsae_cli.cli.group import SECTIONS, command_group

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import generate_cli

GROUP = command_group(app)


def test_the_page_is_up_to_date() -> None:
    assert generate_cli.PAGE.read_text(encoding="utf-8") == generate_cli.page(), "run `make docs`"


def test_every_command_has_its_place_and_an_example() -> None:
    placed = [name for names in SECTIONS.values() for name in names]
    assert len(placed) == len(set(placed))
    assert set(GROUP.commands) <= set(placed), "give it a section in cli/group.py"
    assert set(GROUP.commands) == set(EXAMPLES), "give it an example in cli/examples.py"


def test_the_help_lists_every_command_once_before_the_options() -> None:
    contents, _, options = nsae("--help").out.partition("\nOptions, before the command:\n")
    listed = re.findall(r"^  ([a-z-]+) {2,}[A-Z].*\.$", contents, flags=re.MULTILINE)
    assert listed == [name for names in SECTIONS.values() for name in names if name in GROUP.commands]
    assert options.rstrip().endswith("nsae analyze-top-norms")
    assert "train --act tanh-relu --l2-norm sq" in options


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_command_lines(name: str) -> None:
    """Each is what Typer takes, is of its command, and stands in the command's help."""
    shown = nsae(name, "--help").out
    for purpose, line in EXAMPLES[name]:
        assert f"  # {purpose}\n    {line}\n" in shown
        [command] = re.findall(r"nsae (?:[^)>\"]|'[^']*')*", line)
        words = shlex.split(command)[1:]
        context = GROUP.make_context("nsae", words)
        chosen, found, rest = GROUP.resolve_command(context, [*context._protected_args, *context.args])
        assert chosen == name
        assert found is not None
        found.make_context(name, rest, parent=context)


def test_arguments_are_shown_as_they_are_typed() -> None:
    assert nsae("audit", "--help").out.startswith("Usage: nsae audit [OPTIONS] [SAE]\n")
    assert nsae("run", "--help").out.startswith("Usage: nsae run [OPTIONS] CONFIG.yaml\n")
    shown = nsae("plot", "--help").out
    assert shown.startswith("Usage: nsae plot [OPTIONS] WHAT [NAME]...\n")
    assert "WHAT <activation|training|bias|pareto|norms|top-norms>" in shown
    assert not re.search(r"<(str|path|list)", "".join(nsae(name, "--help").out for name in EXAMPLES))


def test_an_example_of_an_unknown_option_would_be_seen() -> None:
    with pytest.raises(typer.BadParameter.__mro__[1], match="No such option"):
        GROUP.get_command(GROUP.make_context("nsae", ["list"]), "list").make_context("list", ["--nowhere"])

"""Writes docs/cli.md from the help of every command.

Usage: make docs, or python docs/generate_cli.py
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import typer

from generate_errors import exit_codes
from nsae_cli.cli.app import app
from nsae_cli.cli.examples import EXAMPLES
from nsae_cli.cli.group import command_group

PAGE = Path(__file__).with_name("cli.md")

_HEAD = """\
# Command line

    nsae [OPTIONS] COMMAND [OPTIONS OF THE COMMAND] [ARGUMENTS]

{help}

<!-- Made by docs/generate_cli.py from the help of every command: `make docs`. -->

- Inputs are arguments: a name in the workspace, else a path. Without one, a command takes the newest complete artifact
  that fits and says on stderr which.
- `-h` or `--help` after a command shows its options, without one the commands.
- Results go to stdout, progress and remarks to stderr. With `--json` stdout is exactly one JSON object.
- A command that was interrupted goes on when it is given again; one that is complete says so and changes nothing.
- Sizes may be written `500k`, `10M`, `1B`; shares `1%` or `0.01`; layers `all`, `6`, `0,3`, `0-3` and mixtures, counted
  from 0.
- [configuration.md](configuration.md) says how `nsae run` chains commands in a file, [formats.md](formats.md) what they
  write, [metrics.md](metrics.md) what the numbers mean.

## Commands

{contents}

## Options before the command

{options}
## Exit codes

{exit_codes}
[errors.md](errors.md) lists every message with its remedy.

## Environment

- `NSAE_WORKSPACE`: the workspace where `--workspace` is not given.
- `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and what else the Hugging Face libraries read: the hub's models and data.
- `OMP_NUM_THREADS`: threads on the CPU, as torch takes them.
- `WANDB_PROJECT`, `WANDB_MODE`, `TRACKIO_PROJECT`, `TRACKIO_DIR` and what else those packages read: for
  [`nsae train --log-to`](configuration.md#following-a-training---log-to).
- `NO_COLOR`, `COLUMNS`: colour and width of tables on a terminal.
"""

_COMMANDS = "|".join(sorted(EXAMPLES, key=len, reverse=True))
#: What is code in the text of a help.
_CODE = re.compile(rf"<\|endoftext\|>|\$NSAE_WORKSPACE|(?<![\w-])--?[a-z][a-z0-9-]+|\bnsae (?:{_COMMANDS})\b")


def page() -> str:
    """The text of docs/cli.md."""
    group = command_group(app)
    context = typer.Context(group, info_name="nsae")  # type: ignore[arg-type]  # Typer's own copy of click
    sections = group.sections(context)
    contents = [
        f"- {section}: " + ", ".join(f"[{name}](#nsae-{name})" for name, _ in commands)
        for section, commands in sections.items()
    ]
    head = _HEAD.format(
        help=_marked(group.help or ""),
        contents="\n".join(contents),
        options=_list_of(group, context, "option"),
        exit_codes=exit_codes(),
    )
    parts = [head]
    for section, commands in sections.items():
        parts.append(f"## {section}\n")
        parts += [_command(name, group.get_command(context, name), context) for name, _ in commands]
    return "\n".join(parts)


def _command(name: str, command: Any, parent: Any) -> str:
    context = typer.Context(command, info_name=name, parent=parent)  # type: ignore[arg-type]
    pieces = " ".join(command.collect_usage_pieces(context))
    parts = [f"### nsae {name}\n", f"    nsae {name} {pieces}\n"]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        parts.append(_filled(_marked(" ".join(paragraph.split()))) + "\n")
    for kind in ("argument", "option"):
        if listed := _list_of(command, context, kind):
            parts.append(f"**{kind.capitalize()}s**\n\n{listed}")
    if name in EXAMPLES:
        lines = [f"# {purpose}\n{line}" for purpose, line in EXAMPLES[name]]
        parts.append("**Examples**\n\n```sh\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


def _list_of(command: Any, context: Any, kind: str) -> str:
    """The arguments or the options, each with what it means and its default."""
    lines = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if parameter.param_type_name == kind and record is not None and parameter.name != "help":
            names, text = record
            entry = f"- `{names}`: {_marked(' '.join(text.split()))}"
            lines.append(_filled(entry, "  "))
    return "\n".join(lines) + "\n" if lines else ""


def _marked(text: str) -> str:
    """Help as Markdown: options and commands as code, stars as they are."""
    text = _CODE.sub(lambda found: f"`{found[0]}`", text).replace("*", "\\*")
    return re.sub(r" *\[required\]", "", text)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {page().count('### nsae ')} commands")

"""`nsae completion`, and what a shell is told while a command line is being typed.

A shell runs `nsae` with the line in its environment, and Typer answers with commands and options. Values come from what
the help shows for them: the choices in ``relu|tanh-relu``, and the names in the workspace for ``SAE`` or ``STORE``.
Nothing is imported for it that computes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.completion import completion_init, get_completion_script

from nsae_cli import catalogue
from nsae_cli.cli.console import print_text
from nsae_cli.store.workspace import Kind, Workspace

#: Set by the shell's script: how it wants its answer.
VARIABLE = "_NSAE_COMPLETE"
SHELLS = ("bash", "zsh", "fish")

#: What a value may name in the workspace, by the word that stands for it in the help.
_NAMES: dict[str, tuple[Kind, ...]] = {
    "ACTIVATIONS": (Kind.ACTIVATIONS,),
    "STORE": (Kind.ACTIVATIONS,),
    "SAE": (Kind.SAE,),
    "ARTIFACT": tuple(Kind),
}
#: Arguments of one command that the help calls otherwise.
_NAMES_OF = {("plot", "names"): (Kind.SAE, Kind.NORMS)}
#: A choice, not a word for a value (FLOAT, DIR) nor an example (0,3 or cuda:N).
_CHOICE = re.compile(r"[a-z][a-z0-9_.-]*")


def command(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="The shell that is to complete.")],
) -> None:
    """Print the script that completes nsae's lines in a shell.

    It completes commands, options, their choices, and names in the workspace.
    """
    if shell not in SHELLS:
        raise catalogue.OPTION_VALUE(f"SHELL {shell[:60]}: expected bash, zsh or fish")
    print_text(get_completion_script(prog_name="nsae", complete_var=VARIABLE, shell=shell))


def answers() -> bool:
    """Whether this process is to answer a shell; Typer then knows the shells' ways to ask."""
    if not os.environ.get(VARIABLE):
        return False
    completion_init()
    return True


def attach(command: Any) -> None:
    """Tells the parameters of a command how to complete their values."""
    for parameter in command.params:
        parameter.shell_complete = partial(_complete, parameter, parameter.shell_complete)
        # Shells show the help in one line, and Typer takes square brackets for markup.
        parameter.help = re.sub(r" *\[[^\]]*\]", "", parameter.help or "")


def _complete(parameter: Any, otherwise: Callable[[Any, str], list[Any]], context: Any, incomplete: str) -> list[Any]:
    from typer._click.shell_completion import CompletionItem

    values = _values(parameter, context, incomplete)
    return [CompletionItem(value) for value in values if value.startswith(incomplete)] or otherwise(context, incomplete)


def _values(parameter: Any, context: Any, incomplete: str) -> list[str]:
    """What may stand for an incomplete value; of a comma list everything up to the last comma stays."""
    words = str(parameter.metavar or "").split("|")
    choices = [word for word in words if _CHOICE.fullmatch(word)]
    kinds = _NAMES_OF.get((context.command.name, parameter.name)) or _NAMES.get(words[0], ())
    given, comma, _ = incomplete.rpartition(",")
    before = given.split(",") if comma else []
    return [
        *(f"{given}{comma}{choice}" for choice in choices if choice not in before),
        *(name for kind in kinds for name in _names(context, kind)),
    ]


def _names(context: Any, kind: Kind) -> list[str]:
    """Complete artifacts of a kind, newest first, the groups of SAEs before their cells."""
    chosen = context.find_root().params.get("workspace")
    workspace = Workspace.at(Path(chosen) if chosen else None)
    try:
        cells = [artifact.name for artifact in workspace.complete(kind)]
    except OSError:
        return []
    groups = dict.fromkeys(name.partition("/")[0] for name in cells if "/" in name)
    return [*groups, *cells]

"""The group of all commands: a help that reads like a table of contents, and completions for every option."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from nsae_cli.cli.examples import epilog

#: The help's table of contents. What stands in no section is listed under the last.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Activations": ("collect", "norms", "alter"),
    "Sparse autoencoders": ("train", "pull", "push", "export"),
    "Measurements": ("analyze-top-norms", "eval", "audit", "compare"),
    "Figures and pages": ("plot", "report"),
    "Whole experiments": ("run",),
    "Workspace and machine": ("list", "verify", "bench", "doctor", "completion"),
}


class CommandGroup(TyperGroup):
    """Lists its commands in sections, before its options."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands, in the order of the sections."""
        listed = [name for names in SECTIONS.values() for name in names if name in self.commands]
        return [*listed, *(name for name in self.commands if name not in listed)]

    def sections(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Of each section that is not empty the commands, each with the first sentence of its help."""
        found: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            section = next((section for section, names in SECTIONS.items() if name in names), list(SECTIONS)[-1])
            found.setdefault(section, []).append((name, self.commands[name].get_short_help_str(80)))
        return found

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the sections, then the options."""
        sections = self.sections(ctx)
        width = max(len(name) for names in sections.values() for name, _ in names)
        for section, commands in sections.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), text) for name, text in commands])
        options = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx)) is not None]
        with formatter.section("Options, before the command"):
            formatter.write_dl(options)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command; while a line is completed, its parameters know what their values may be."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            return None
        if ctx.resilient_parsing:
            from nsae_cli.cli.completion import attach

            attach(command)
        command.epilog = epilog(cmd_name)
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                _show_plainly(parameter)
        return command


def _show_plainly(argument: Any) -> None:
    """``SAE...`` in the usage and ``SAE`` in the list, where Typer writes ``{SAE}...`` and ``SAE <list[str]>``."""
    name, more = argument.display_name_raw, "..." if argument.nargs != 1 else ""
    record = argument.get_help_record

    def help_record(ctx: Any) -> tuple[str, str]:
        shown, text = record(ctx)
        return shown if argument.type_descriptor.is_choice else name, text

    argument.get_help_record = help_record
    argument.get_usage_pieces = lambda _: [f"{name}{more}" if argument.required else f"[{name}]{more}"]


def command_group(app: typer.Typer) -> CommandGroup:
    """The group that an application stands for."""
    group = typer.main.get_command(app)
    assert isinstance(group, CommandGroup)
    return group

"""From a YAML file to checked stages. Everything that is wrong with it is reported at once, with its line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsae_cli import catalogue
from nsae_cli.analysis.saes import on_hub
from nsae_cli.assets import EMBEDDED_MODELS
from nsae_cli.errors import ArtifactError, UsageError
from nsae_cli.experiment.stages import COMMANDS, CommandSpec, Stage
from nsae_cli.experiment.yaml_file import Located, Problem, plain, read_yaml
from nsae_cli.lm.corpus import BUILTIN
from nsae_cli.store.workspace import Kind, Workspace, check_name
from nsae_cli.values import validate_options

_TOP_KEYS = ("stages", "defaults")
#: Options that may hold a path, and what they may hold that only looks like one.
_PATH_OPTIONS = {"model": EMBEDDED_MODELS, "from_model": EMBEDDED_MODELS, "corpus": (BUILTIN,), "reference": ()}


def load_config(path: Path, workspace: Workspace) -> list[Stage]:
    """Reads and checks a configuration.

    ``stages:`` is a list of ``{command: {option: value or list, name: …}}``. A stage reads what its input key names
    (``activations``, ``saes``): an earlier stage's name, a name in the workspace, or a path; without the key it reads
    what the latest stage before it made. Relative paths are taken from the file. ``defaults:`` gives options to all
    stages of a command that do not set them: ``{command: {option: value}}``.

    Args:
        path: the file.
        workspace: where names that no stage makes are looked up.

    Raises:
        UsageError: every problem found, each with file and line.
    """
    problems: list[Problem] = []
    document = read_yaml(path, problems)
    reader = _Reader(path, workspace, problems)
    for entry in reader.entries(document):
        reader.add_stage(entry)
    if problems:
        raise catalogue.CONFIG_PROBLEMS(*[f"{path}:{line}: {text}" for line, text in sorted(problems)])
    return reader.stages


@dataclass(frozen=True)
class _Entry:
    """A stage as written: its command, the line of the command, its options with their lines."""

    command: str
    line: int
    body: Located


@dataclass
class _Reader:
    """Turns entries into stages, one after another, and collects what is wrong with them."""

    path: Path
    workspace: Workspace
    problems: list[Problem]
    stages: list[Stage] = field(default_factory=list)
    #: Number of the latest stage that makes a kind, and all names that earlier stages give to it.
    _latest: dict[Kind, int] = field(default_factory=dict)
    _named: dict[Kind, set[str]] = field(default_factory=dict)
    _number: int = 0

    def entries(self, document: Located) -> Iterator[_Entry]:
        """The stages of a document, with the defaults of their commands filled in."""
        listed = document.value.get("stages") if isinstance(document.value, dict) else None
        for key, line in document.key_lines.items():
            if key not in _TOP_KEYS:
                self._problem(line, f"unknown key {key!r}{_nearest(key, _TOP_KEYS)}")
        defaults = self._defaults(document)
        if listed is None or not isinstance(listed.value, list) or not listed.value:
            self._problem(
                document.line if listed is None else listed.line, "expected `stages:` with a list of commands"
            )
            return
        for entry in listed.value:
            if isinstance(entry.value, str):  # `- norms`, without options
                body = _with_defaults(Located(None, entry.line), defaults.get(entry.value))
                yield _Entry(entry.value, entry.line, body)
            elif isinstance(entry.value, dict) and len(entry.value) == 1:
                [(command, body)] = entry.value.items()
                yield _Entry(command, entry.key_lines[command], _with_defaults(body, defaults.get(command)))
            else:
                self._problem(entry.line, "a stage is one command with its options, as in `- norms: {name: first}`")

    def _defaults(self, document: Located) -> dict[str, Located]:
        """The options that ``defaults:`` gives, by command."""
        given = document.value.get("defaults") if isinstance(document.value, dict) else None
        if given is None:
            return {}
        if not isinstance(given.value, dict):
            self._problem(given.line, "defaults: expected commands with options, as in `train: {batch_size: 512}`")
            return {}
        for command, options in given.value.items():
            line = given.key_lines[command]
            if command not in COMMANDS:
                self._problem(line, f"defaults: unknown command {command!r}{_nearest(command, COMMANDS)}")
            elif not isinstance(options.value, dict):
                self._problem(line, f"the options of {command} are not a mapping, as in `{{batch_size: 512}}`")
            else:
                self._check_keys(command, COMMANDS[command], options)
                if "name" in options.key_lines:
                    self._problem(options.key_lines["name"], "defaults: a name belongs to one stage; give it there")
        return {command: options for command, options in given.value.items() if isinstance(options.value, dict)}

    def add_stage(self, entry: _Entry) -> None:
        """Checks one entry; what it makes counts as made for later ones even if its options are wrong."""
        spec = COMMANDS.get(entry.command)
        if spec is None:
            self._problem(entry.line, f"unknown command {entry.command!r}{_nearest(entry.command, COMMANDS)}")
            return
        if not isinstance(entry.body.value, dict | None):
            self._problem(entry.line, f"the options of {entry.command} are not a mapping, as in `{{name: first}}`")
            return
        before = len(self.problems)
        values: dict[str, Any] = plain(entry.body) or {}
        self._check_keys(entry.command, spec, entry.body)
        name = self._name(entry, values)
        options = self._options(entry, spec, values, name)
        reads = self._reads(entry, spec, values)
        store = self._store(entry, spec, values)
        if len(self.problems) == before:
            place = f"{self.path}:{entry.line}"
            self.stages.append(Stage(entry.command, place, options, reads, name, store))
        self._latest[spec.makes] = self._number
        self._number += 1
        if name is not None:
            self._named.setdefault(spec.makes, set()).add(name)

    def _check_keys(self, command: str, spec: CommandSpec, body: Located) -> None:
        inputs = [key for key in (spec.input_key, spec.store_key) if key is not None]
        known = ["name", *inputs, *(key for key in spec.options.model_fields if key != "name")]
        for key, line in body.key_lines.items():
            if key not in known:
                hint = _nearest(key, known)
                if "did you mean" not in hint:
                    hint = _described(key, spec) or f"; see `nsae {command} --help`"
                self._problem(line, f"{command} has no option {key!r}{hint}")

    def _name(self, entry: _Entry, values: dict[str, Any]) -> str | None:
        name = values.get("name")
        if name is None:
            return None
        line = entry.body.key_lines["name"]
        if isinstance(name, (dict, list)):
            self._problem(line, "name: expected a text")
            return None
        try:
            return check_name(str(name))
        except UsageError as error:
            self._problem(line, str(error).removeprefix("--"))
            return None

    def _options(self, entry: _Entry, spec: CommandSpec, values: dict[str, Any], name: str | None) -> Any:
        fields = spec.options.model_fields
        chosen = {key: value for key, value in values.items() if key in fields and value is not None}
        chosen.pop("name", None)
        if name is not None and "name" in fields:
            chosen["name"] = name
        for key, words in _PATH_OPTIONS.items():
            if isinstance(chosen.get(key), str) and chosen[key] not in words:
                chosen[key] = self._from_the_file(chosen[key])
        try:
            return validate_options(spec.options, chosen)
        except UsageError as error:
            for problem in error.problems:
                # Problems name options as on the command line; here they are keys.
                option = problem.partition(" ")[0]
                key = option.removeprefix("--").replace("-", "_")
                line = entry.body.key_lines.get(key, entry.line)
                self._problem(line, problem.replace(option, key, 1) if option.startswith("--") else problem)
            return None

    def _reads(self, entry: _Entry, spec: CommandSpec, values: dict[str, Any]) -> list[str] | int:
        """What the stage reads: the names given, or the number of the stage that made the latest."""
        if spec.input_key is None or spec.reads is None:
            return []
        given = values.get(spec.input_key)
        if spec.instead_of_input is not None and values.get(spec.instead_of_input) is not None:
            if given is not None:
                line = entry.body.key_lines[spec.instead_of_input]
                self._problem(line, f"{spec.input_key} and {spec.instead_of_input} both say what is read; give one")
            return []
        if given is None:
            if spec.reads not in self._latest:
                self._problem(
                    entry.line,
                    f"{entry.command} reads {spec.input_key}, but no stage before it makes any; "
                    f"name one with {spec.input_key}:",
                )
            return self._latest.get(spec.reads, 0)
        line = entry.body.key_lines[spec.input_key]
        listed = given if isinstance(given, list) else [given]
        if not listed or any(isinstance(item, (dict, list)) or item is None for item in listed):
            self._problem(line, f"{spec.input_key}: expected a name or a path")
            return []
        if len(listed) > 1 and not spec.several_inputs:
            self._problem(
                line, f"{spec.input_key}: {entry.command} reads one, not {len(listed)}; write a stage for each"
            )
            return []
        if spec.from_elsewhere:
            return [self._from_elsewhere(str(item), spec.reads, spec.input_key, line) for item in listed]
        return [self._reference(str(item), spec.reads, spec.input_key, line) for item in listed]

    def _store(self, entry: _Entry, spec: CommandSpec, values: dict[str, Any]) -> str | None:
        if spec.store_key is None or values.get(spec.store_key) is None:
            return None
        line, given = entry.body.key_lines[spec.store_key], values[spec.store_key]
        if isinstance(given, (dict, list)):
            self._problem(line, f"{spec.store_key}: expected a name or a path")
            return None
        return self._reference(str(given), Kind.ACTIVATIONS, spec.store_key, line)

    def _reference(self, reference: str, kind: Kind, key: str, line: int) -> str:
        """A name that an earlier stage gives or the workspace holds, as it is; a path, from the file's folder."""
        named = self._named.get(kind, set())
        if reference in named or reference.partition("/")[0] in named:
            return reference
        if not self.workspace.folder(kind, reference).is_dir():
            reference = self._from_the_file(reference)
        try:
            self.workspace.find(kind, reference)
        except UsageError:
            hint = _nearest(reference, named) if named else ""
            self._problem(
                line,
                f"{key}: no stage before this one and nothing in {self.workspace.root} is named {reference!r}{hint}",
            )
        except ArtifactError as error:
            self._problem(line, f"{key}: {error}")
        return reference

    def _from_elsewhere(self, reference: str, kind: Kind, key: str, line: int) -> str:
        """As `_reference`, or another library's: a path, from the file's folder, or a hub id ``org/repo[:folder]``."""
        path = Path(self._from_the_file(reference))
        named = reference.partition("/")[0] in self._named.get(kind, set())
        if not named and path.is_dir() and not self.workspace.folder(kind, reference).is_dir():
            return str(path)
        if not named and on_hub(reference, self.workspace) is not None:
            return reference
        return self._reference(reference, kind, key, line)

    def _from_the_file(self, value: str) -> str:
        """A relative path that is meant from the file's folder, wherever the command is run; else the value itself."""
        if value.startswith(("./", "../")) or (value and (self.path.parent / value).exists()):
            return str(self.path.parent / value)
        return value

    def _problem(self, line: int, text: str) -> None:
        if (line, text) not in self.problems:  # a default is looked at again with every stage
            self.problems.append((line, text))


def _with_defaults(body: Located, defaults: Located | None) -> Located:
    """The options of a stage, and those defaults that it does not set."""
    if defaults is None or not isinstance(body.value, dict | None):
        return body
    return Located(defaults.value | (body.value or {}), body.line, defaults.key_lines | body.key_lines)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def _described(key: str, spec: CommandSpec) -> str | None:
    """The option whose description says what the key says in other words: ``learning_rate`` is lr's; None if no."""
    words = key.lower().replace("-", "_").split("_")
    for name, field_ in spec.options.model_fields.items():
        known = re.findall(r"[a-z]{3,}", (field_.description or "").lower())
        if all(len(word) > 2 and difflib.get_close_matches(word, known, n=1, cutoff=0.8) for word in words):
            return f"; did you mean {name!r}?"
    return None

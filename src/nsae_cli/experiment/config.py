"""From a YAML file to checked stages. Everything that is wrong with it is reported at once, with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nsae_cli.errors import UsageError
from nsae_cli.experiment.stages import COMMANDS, CommandSpec, Stage
from nsae_cli.experiment.yaml_file import Located, plain, read_yaml
from nsae_cli.store.workspace import Kind, check_name
from nsae_cli.values import validate_options


def load_config(path: Path) -> list[Stage]:
    """Reads and checks a configuration.

    ``stages:`` is a list of ``{command: {option: value or list, name: …}}``. A stage reads what its input key names
    (``activations``, ``saes``), else what the latest stage before it made; relative paths are taken from the file.

    Raises:
        UsageError: every problem found, each with file and line.
    """
    document = read_yaml(path)
    problems: list[str] = []
    stages: list[Stage] = []
    made: dict[Kind, str] = {}
    for command, line, body in _entries(path, document, problems):
        stage = _stage(path, command, line, body, made, problems)
        if stage is not None:
            stages.append(stage)
            if stage.name is not None:
                made[COMMANDS[command].makes] = stage.name
    if problems:
        raise UsageError.from_problems(problems)
    return stages


def _entries(path: Path, document: Located, problems: list[str]) -> Iterable[tuple[str, int, Located]]:
    if not isinstance(document.value, dict):
        problems.append(f"{path}:{document.line}: expected `stages:` with a list of commands")
        return
    for key, line in document.key_lines.items():
        if key != "stages":
            problems.append(f"{path}:{line}: unknown key {key!r}{_nearest(key, ['stages'])}")
    listed = document.value.get("stages")
    if listed is None or not isinstance(listed.value, list) or not listed.value:
        problems.append(f"{path}:{document.line}: expected `stages:` with a list of commands")
        return
    for entry in listed.value:
        if not isinstance(entry.value, dict) or len(entry.value) != 1:
            problems.append(f"{path}:{entry.line}: a stage is one command with its options, as in `- norms: {{}}`")
            continue
        [(command, body)] = entry.value.items()
        yield command, entry.key_lines[command], body


def _stage(
    path: Path, command: str, line: int, body: Located, made: dict[Kind, str], problems: list[str]
) -> Stage | None:
    spec = COMMANDS.get(command)
    if spec is None:
        problems.append(f"{path}:{line}: unknown command {command!r}{_nearest(command, COMMANDS)}")
        return None
    if body.value is not None and not isinstance(body.value, dict):
        problems.append(f"{path}:{line}: the options of {command} are not a mapping")
        return None
    before = len(problems)
    values = plain(body) if body.value is not None else {}
    reserved = {"name": values.get("name")} | {
        key: values.get(key) for key in (spec.input_key, *spec.extra_keys) if key
    }
    known = [*reserved, *spec.options.model_fields]
    for key, key_line in body.key_lines.items():
        if key not in known:
            problems.append(f"{path}:{key_line}: {command} has no option {key!r}{_nearest(key, known)}")
    options = {key: value for key, value in values.items() if key in spec.options.model_fields and value is not None}
    if command != "collect":
        options.pop("name", None)
    _make_paths_absolute(options, path.parent)
    checked = _validate(path, spec, options, body, problems)
    name = _name(path, command, values.get("name"), line, problems)
    inputs = _inputs(path, spec, command, reserved, line, made, problems)
    if len(problems) > before:
        return None
    activations = reserved.get("activations") if "activations" in spec.extra_keys else None
    return Stage(command, checked, inputs, name, activations)


def _validate(path: Path, spec: CommandSpec, options: dict[str, Any], body: Located, problems: list[str]) -> Any:
    try:
        return validate_options(spec.options, options)
    except UsageError as error:
        for problem in str(error).split("; "):
            option = problem.partition(" ")[0].removeprefix("--").replace("-", "_")
            line = body.key_lines.get(option, body.line)
            problems.append(f"{path}:{line}: {problem.replace('--' + option.replace('_', '-'), option, 1)}")
        return None


def _name(path: Path, command: str, name: Any, line: int, problems: list[str]) -> str | None:
    if name is None:
        problems.append(f"{path}:{line}: {command} needs a name, by which later stages refer to it")
        return None
    try:
        return check_name(str(name))
    except UsageError as error:
        problems.append(f"{path}:{line}: {str(error).removeprefix('--')}")
        return None


def _inputs(
    path: Path,
    spec: CommandSpec,
    command: str,
    reserved: dict[str, Any],
    line: int,
    made: dict[Kind, str],
    problems: list[str],
) -> list[str]:
    if spec.input_key is None or spec.reads is None:
        return []
    given = reserved.get(spec.input_key)
    if given is None:
        if spec.reads not in made:
            problems.append(f"{path}:{line}: {command} reads {spec.input_key}, but no stage before it makes any")
            return []
        return [made[spec.reads]]
    return [str(item) for item in given] if isinstance(given, list) else [str(given)]


def _make_paths_absolute(options: dict[str, Any], folder: Path) -> None:
    """A model or corpus that exists relative to the file is meant, wherever the command is run."""
    for key in ("model", "corpus"):
        value = options.get(key)
        if isinstance(value, str) and not Path(value).is_absolute() and (folder / value).exists():
            options[key] = str(folder / value)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"

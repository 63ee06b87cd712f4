"""Reads YAML into plain values that remember their lines, and reports every problem of form at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nsae_cli.errors import UsageError

_MAX_BYTES = 2**20
_MAX_NODES = 20_000


@dataclass
class Located:
    """A value and the line (1-based) on which it stands; mappings hold Located values, sequences too."""

    value: Any
    line: int
    key_lines: dict[str, int] = field(default_factory=dict)


def read_yaml(path: Path) -> Located:
    """Parses a file of plain YAML: mappings with unique text keys, sequences, scalars.

    Raises:
        UsageError: unreadable, too large, not YAML, duplicate keys, aliases, or tags that stand for objects.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the path of a YAML file") from error
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"{path}: {len(raw):,} bytes is no configuration; at most {_MAX_BYTES:,}")
    try:
        loader = yaml.SafeLoader(raw.decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not UTF-8 text ({error})") from error
    try:
        node = loader.get_single_node()
        if node is None:
            raise UsageError(f"{path}: the file is empty; it needs a list of stages")
        problems: list[str] = []
        value = _Builder(path, loader, problems).build(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{path}{line}: not valid YAML ({reason})") from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply") from error
    finally:
        loader.dispose()
    if problems:
        raise UsageError.from_problems(problems)
    return value


class _Builder:
    def __init__(self, path: Path, loader: yaml.SafeLoader, problems: list[str]) -> None:
        self._path, self._loader, self._problems = path, loader, problems
        self._seen: set[int] = set()

    def build(self, node: yaml.Node) -> Located:
        line = node.start_mark.line + 1
        # An alias yields the same node again; nested, they multiply without bound, and no configuration needs them.
        if id(node) in self._seen:
            self._problems.append(f"{self._path}:{line}: aliases (*name) are not supported; write the value out")
            return Located(None, line)
        self._seen.add(id(node))
        if len(self._seen) > _MAX_NODES:
            raise UsageError(f"{self._path}: more than {_MAX_NODES:,} values is no configuration")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, line)
        if isinstance(node, yaml.SequenceNode):
            return Located([self.build(child) for child in node.value], line)
        return Located(self._scalar(node, line), line)

    def _mapping(self, node: yaml.MappingNode, line: int) -> Located:
        result: dict[str, Located] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in result:
                self._problems.append(
                    f"{self._path}:{key_line}: key {key!r} appears twice (first in line {lines[key]})"
                )
                continue
            lines[key] = key_line
            result[key] = self.build(value_node)
        return Located(result, line, lines)

    def _scalar(self, node: yaml.Node, line: int) -> Any:
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            self._problems.append(f"{self._path}:{line}: {node.tag} is not allowed; write plain text, numbers or lists")
            return None


def plain(located: Located) -> Any:
    """The value without its lines."""
    value = located.value
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [plain(child) for child in value]
    return value

"""Reads YAML into plain values that remember their lines.

A configuration needs mappings, lists and plain values, and nothing else of YAML: no tags, no aliases, and of the
words only ``true``, ``false`` and ``null`` mean more than themselves (``off``, ``no`` and dates stay text).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nsae_cli import catalogue

_MAX_BYTES = 2**20
_MAX_NODES = 20_000

_INT = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str")}


class _Loader(yaml.SafeLoader):
    """Every scalar is text; `_Builder` decides what it stands for."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - this is how PyYAML is told


@dataclass
class Located:
    """A value and the line (1-based) on which it stands; mappings hold Located values, sequences too."""

    value: Any
    line: int
    key_lines: dict[str, int] = field(default_factory=dict)


#: A line (1-based) and what is wrong there.
Problem = tuple[int, str]


def read_yaml(path: Path, problems: list[Problem]) -> Located:
    """Parses a file of plain YAML: mappings with unique text keys, sequences, scalars.

    Args:
        path: the file.
        problems: what is wrong with single entries (duplicate keys, aliases, tags) is added here.

    Raises:
        UsageError: unreadable, too large, or not YAML at all.
    """
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise catalogue.CONFIG_UNREADABLE(f"{path}: {reason.lower()}; give the path of a YAML file") from error
    if len(raw) > _MAX_BYTES:
        raise catalogue.CONFIG_UNREADABLE(f"{path}: {len(raw):,} bytes is no configuration; at most {_MAX_BYTES:,}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise catalogue.CONFIG_UNREADABLE(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    try:
        node = yaml.compose(text, _Loader)
        if node is None:
            raise catalogue.CONFIG_UNREADABLE(f"{path}: the file is empty; write `stages:` with a list of commands")
        return _Builder(path, problems).build(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line_text = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        if isinstance(error, yaml.reader.ReaderError):
            line_text = f":{text[: error.position].count(chr(10)) + 1}"
            reason = f"the character U+{ord(text[error.position]):04X}; remove it"
        if "'\\t'" in reason:
            reason = "a tab; indent with spaces"
        raise catalogue.CONFIG_UNREADABLE(
            f"{path}{line_text}: not valid YAML ({reason}); mend that line, indent with spaces"
        ) from error
    except RecursionError as error:
        raise catalogue.CONFIG_UNREADABLE(
            f"{path}: nested too deeply; write `stages:` with a list of commands"
        ) from error


class _Builder:
    def __init__(self, path: Path, problems: list[Problem]) -> None:
        self._path, self._problems = path, problems
        self._seen: set[int] = set()
        self._aliased = False

    def build(self, node: yaml.Node) -> Located:
        line = node.start_mark.line + 1
        # An alias yields the same node again; nested, they multiply without bound, and no configuration needs them.
        if id(node) in self._seen:
            if not self._aliased:
                self._problem(line, "anchors and aliases (&name, *name) are not supported; write the values out")
            self._aliased = True
            return Located(None, line)
        self._seen.add(id(node))
        if len(self._seen) > _MAX_NODES:
            raise catalogue.CONFIG_UNREADABLE(
                f"{self._path}: more than {_MAX_NODES:,} values is no configuration; write less"
            )
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._problem(line, f"the tag {tag} is not allowed; write plain text, numbers or lists")
            return Located(None, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, line)
        if isinstance(node, yaml.SequenceNode):
            return Located([self.build(child) for child in node.value], line)
        assert isinstance(node, yaml.ScalarNode)
        quoted = bool(node.style)
        return Located(node.value if quoted else _plain_value(node.value), line)

    def _mapping(self, node: yaml.MappingNode, line: int) -> Located:
        result: dict[str, Located] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_line, "a key must be a word, as in `name: first`")
                continue
            key = str(key_node.value)
            if key in result:
                self._problem(key_line, f"key {key!r} appears twice (first in line {lines[key]}); remove one")
                continue
            lines[key] = key_line
            result[key] = self.build(value_node)
        return Located(result, line, lines)

    def _problem(self, line: int, text: str) -> None:
        self._problems.append((line, text))


def _plain_value(text: str) -> Any:
    """What an unquoted scalar stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def plain(located: Located) -> Any:
    """The value without its lines."""
    value = located.value
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [plain(child) for child in value]
    return value

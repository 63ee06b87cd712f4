"""Collects the messages of the package's errors from the lines that raise them, for docs/errors.md and its tests.

Each place that raises an entry of nsae_cli.catalogue is one message, with a name in braces for each value; constants
are written out. Problems that are collected before they are reported together are messages too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nsae_cli

PACKAGE = Path(nsae_cli.__file__).parent

#: A text that is made elsewhere.
_ONLY_A_VALUE = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Message:
    """One message in the source.

    Attributes:
        entry: name of the catalogue's constant; "Interrupted" for the line after a signal.
        template: the text, with a name in braces for each value.
        place: file and line.
        part: whether it is one of several problems that one line may report, or stands alone.
    """

    entry: str
    template: str
    place: str
    part: bool = False


def messages() -> list[Message]:
    """Every message that the package's source raises through the catalogue, in the order of files and lines."""
    modules = {_dotted(path): _Module(path) for path in sorted(PACKAGE.rglob("*.py"))}
    for module in modules.values():
        module.neighbours = modules
    return [message for module in modules.values() for message in module.messages()]


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


class _Module:
    """One source file: its constants, and the messages in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.neighbours: dict[str, _Module] = {}
        self.constants: dict[str, ast.expr] = {}
        self._imported: dict[str, tuple[str, str]] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value
            elif isinstance(node, ast.ImportFrom) and node.module:
                for name in node.names:
                    self._imported[name.asname or name.name] = (node.module, name.name)

    def messages(self) -> Iterator[Message]:
        for function in [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]:
            local = _assigned_once(function)
            for node in _own_nodes(function):
                for entry, texts, part in self._raised(node, function):
                    for text in texts:
                        for template in self._templates(text, local):
                            if entry and not _ONLY_A_VALUE.fullmatch(template):
                                whole = _where(entry, template, part) + template
                                yield Message(entry, whole, f"{self.path.name}:{node.lineno}", part)

    def _raised(self, node: ast.AST, function: ast.FunctionDef) -> Iterator[tuple[str, list[ast.expr], bool]]:
        """The entry of a node, its messages, and whether they are parts of one line."""
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="catalogue"), attr=entry), args=args):
                yield entry, [arg for arg in args if not isinstance(arg, ast.Starred)], False
            case ast.Call(func=ast.Name(id="Interrupted"), args=[_, text]):
                yield "Interrupted", [text], False
            case ast.Call(func=ast.Attribute(value=ast.Name(id="interrupt"), attr="stop_if_requested"), args=[text]):
                yield "Interrupted", [text], False
            case ast.Call(func=ast.Attribute(value=ast.Name(id="problems"), attr="append"), args=[text]):
                yield self._of_problems(function), [text], True
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id="problems"), slice=text)]):
                yield self._of_problems(function), [text], True
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr="_problem"), args=[_, text]):
                yield "CONFIG_PROBLEMS", [text], True
            case ast.Return(value=ast.Constant() | ast.JoinedStr() as text):  # a function that says why not
                reason = next(self._templates(text, {}))
                if reason.startswith(("expected", "is not an option")):
                    yield "OPTION_VALUE", [text], True
                elif reason.startswith("--") and ("; " in reason or "expected" in reason):
                    yield "REFUSED_COMBINATION", [text], True
            case ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError"), args=[text])):
                start = next(self._templates(text, {}))
                if start.startswith("expected"):  # a validator of an option's value
                    yield "OPTION_VALUE", [text], True
                elif "--" in start:  # of a whole command's options
                    yield "REFUSED_COMBINATION", [text], True

    def _of_problems(self, function: ast.FunctionDef) -> str:
        """The entry under which a function, or else its file, reports the problems that it collects; "" if neither."""
        for scope in (function, self.tree):
            found = ""
            for node in ast.walk(scope):
                match node:
                    case ast.Call(func=ast.Attribute(value=ast.Name(id="catalogue"), attr=entry), args=[ast.Starred()]):
                        found = entry
            if found:
                return found
        return ""

    def _templates(self, text: ast.expr, local: dict[str, ast.expr]) -> Iterator[str]:
        """The text with placeholders; several where it depends on a condition."""
        match text:
            case ast.Constant(value=value):
                yield str(value)
            case ast.IfExp(body=body, orelse=orelse):
                yield from self._templates(body, local)
                yield from self._templates(orelse, local)
            case ast.JoinedStr(values=parts):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else self._placeholder(part.value, local)
                    for part in parts
                    if isinstance(part, ast.Constant | ast.FormattedValue)
                )
            case _:
                yield self._placeholder(text, local)

    def _placeholder(self, value: ast.expr, local: dict[str, ast.expr]) -> str:
        """The text of a constant, else a short name in braces."""
        match value:
            case ast.Constant(value=constant):
                return str(constant)
            case ast.Name(id=name) if name in local and isinstance(local[name], ast.JoinedStr | ast.Constant):
                return next(self._templates(local[name], {key: text for key, text in local.items() if key != name}))
            case ast.Name(id=name):
                constant = self._constant(name)
                return f"{{{name.strip('_').lower()}}}" if constant is None else constant
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return f"{{{name.strip('_')}}}"
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr="name" | "root"):
                return f"{{{'folder' if owner == 'parent' else owner.strip('_')}}}"
            case ast.Attribute(attr=name):
                return f"{{{'folder' if name == 'parent' else name.strip('_').lower()}}}"
            case ast.BinOp(op=ast.Div()):
                return "{path}"
            case ast.BoolOp(values=[first, *_]):
                return self._placeholder(first, local)
            case ast.Subscript(value=ast.Call(func=ast.Attribute(attr="splitlines"))):
                return "{reason}"
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                return f"{{{key}}}"
            case ast.Subscript(value=inner):
                return self._placeholder(inner, local)
            case ast.Call(func=ast.Name(id="len")):
                return "{number}"
            case ast.Call(func=ast.Name(id="int" | "str" | "float" | "list" | "sorted"), args=[inner, *_]):
                return self._placeholder(inner, local)
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[inner]):
                return self._placeholder(inner, local)
            case ast.Call(func=ast.Name(id=name)):
                return "{reason}" if "line" in name else f"{{{name.strip('_').replace('_', ' ')}}}"
        return "{…}"

    def _constant(self, name: str) -> str | None:
        """The text of a module's constant, here or where it is imported from."""
        if name in self.constants:
            try:
                return next(self._templates(self.constants[name], {})) if _is_text(self.constants[name]) else None
            except StopIteration:
                return None
        if name in self._imported:
            module, original = self._imported[name]
            if module in self.neighbours:
                return self.neighbours[module]._constant(original)
        return None


def _where(entry: str, template: str, part: bool) -> str:
    """What the line says before a problem that is one of several."""
    if part and entry == "OPTION_VALUE" and not template.startswith("--"):
        return "--{option} {value}: " if template.startswith("expected") else "--{option} "
    return "{path}:{line}: " if part and entry == "CONFIG_PROBLEMS" else ""


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str | int))


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions inside it, which are visited by themselves."""
    pending: list[ast.AST] = list(ast.iter_child_nodes(function))
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.FunctionDef):
            continue
        yield node
        pending = [*ast.iter_child_nodes(node), *pending]


def _assigned_once(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """The local names that get one value only, with that value."""
    values: dict[str, list[ast.expr]] = {}
    for node in _own_nodes(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(node.value)
    return {name: found[0] for name, found in values.items() if len(found) == 1}

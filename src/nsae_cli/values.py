"""How option values are written (``500k``, ``1%``, ``relu,tanh-relu``) and how a bad one is reported.

Used by every command's configuration, whether the values come from the command line (text) or from YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from nsae_cli.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([kKmMbBgG]?)")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def parse_size(value: Any) -> Any:
    """``500k``, ``10M``, ``1B`` or a whole number → int. Anything else is a ValueError."""
    if isinstance(value, bool) or value is None:
        raise ValueError("expected a number such as 500k, 10M or 2000")
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("expected a whole number such as 500k, 10M or 2000")
    match = _SIZE.fullmatch(str(value).strip().replace("_", ""))
    if match is None:
        raise ValueError("expected a number such as 500k, 10M or 2000")
    size = float(match[1]) * _FACTORS[match[2].lower()]
    if not size.is_integer():
        raise ValueError("expected a whole number such as 500k, 10M or 2000")
    return int(size)


def parse_fraction(value: Any) -> Any:
    """``1%`` or ``0.01`` → 0.01."""
    text = str(value).strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError("expected a share such as 1% or 0.01") from None


def split_list(value: Any) -> Any:
    """``a,b`` → [a, b]; a single value → [value]. Empty parts are errors."""
    if isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
    if not parts or any(part == "" for part in parts):
        raise ValueError("expected a value or a comma list without gaps")
    if len({str(part) for part in parts}) != len(parts):
        raise ValueError("a value is given twice")
    return parts


Size = Annotated[int, BeforeValidator(parse_size)]
Fraction = Annotated[float, BeforeValidator(parse_fraction)]

Model = TypeVar("Model", bound=BaseModel)


def validate_options(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Builds a configuration and reports every problem at once.

    Raises:
        UsageError: for each problem the option's name, the value and what was expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems: dict[str, None] = {}
        for problem in error.errors():
            problems[_describe(problem, values)] = None
        raise UsageError("; ".join(problems)) from error


def _describe(problem: Any, values: Mapping[str, Any]) -> str:
    expectation = str(problem["msg"]).removeprefix("Value error, ")
    expectation = expectation[:1].lower() + expectation[1:]
    if not problem["loc"]:
        return expectation
    name = str(problem["loc"][0])
    option = "--" + name.replace("_", "-")
    if problem["type"] == "extra_forbidden":
        return f"{option} is not an option of this command"
    value = problem["input"] if name in values else None
    shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    expectation = expectation.removeprefix("input should be ")
    return f"{option} {shown[:60]}: {'expected ' if 'expected' not in expectation else ''}{expectation}"

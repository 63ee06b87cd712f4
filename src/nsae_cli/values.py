"""How option values are written (``500k``, ``1%``, ``relu,tanh-relu``, ``0-3``) and how a bad one is reported.

Used by every command's configuration, whether the values come from the command line (text) or from YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from nsae_cli import catalogue

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([kKmMbBgG]?)")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_LARGEST_SIZE = 2**63 - 1
_LAYERS = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def parse_size(value: Any) -> Any:
    """``500k``, ``10M``, ``1B`` or a whole number → int. Anything else is a ValueError."""
    if isinstance(value, bool) or value is None:
        raise ValueError("expected a number, such as 500k, 10M or 2000")
    text = str(value).strip().replace("_", "")
    match = _SIZE.fullmatch(text)
    if match is None:
        kind = "a number that is not negative" if text.startswith("-") else "a number"
        raise ValueError(f"expected {kind}, such as 500k, 10M or 2000")
    if match[1].isdigit():
        size = int(match[1][:40]) * _FACTORS[match[2].lower()]
    else:
        number = float(match[1]) * _FACTORS[match[2].lower()]
        if not math.isfinite(number) or not number.is_integer():
            raise ValueError("expected a whole number, such as 500k, 10M or 2000")
        size = int(number)
    if size > _LARGEST_SIZE:
        raise ValueError("expected a number below 2^63")
    return size


def parse_fraction(value: Any) -> Any:
    """``1%`` or ``0.01`` → 0.01."""
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if not math.isfinite(share):
        raise ValueError("expected a share such as 1% or 0.01")
    return share


def split_list(value: Any) -> Any:
    """``a,b`` → [a, b]; a single value → [value]. Empty parts are errors."""
    if isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
    if not parts or any(part == "" for part in parts):
        raise ValueError("expected a value or a comma list without gaps")
    if len({str(part) for part in parts}) != len(parts):
        raise ValueError("expected each value once")
    return parts


def parse_layers(value: str | int | Sequence[int | str], held: Sequence[int], owner: str) -> list[int]:
    """``all``, ``6``, ``0,3``, ``0-3`` and mixtures → layer numbers, ascending.

    Args:
        value: as on the command line; YAML may give a number or a list.
        held: the layers that there are.
        owner: what holds them (a model, a store), for messages.

    Raises:
        UsageError: not such a list, a layer that is not there, a layer named twice; every problem at once.
    """
    text = str(value) if isinstance(value, (str, int)) else ",".join(map(str, value))
    if text.strip() == "all":
        return sorted(held)
    layers: list[int] = []
    problems: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        match = _LAYERS.fullmatch(part)
        if match is None:
            problems.append(f"--layers {text}: {part!r} is not a layer; write all, 6, 0,3 or 0-3 (layers count from 0)")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        inside = [layer for layer in held if first <= layer <= last]
        if first > last:
            problems.append(f"--layers {text}: {part} runs backwards; write the smaller layer first")
        elif len(inside) != last - first + 1:
            absent = last if last > max(held) else next(layer for layer in range(first, last + 1) if layer not in held)
            problems.append(f"layer {absent}: {owner} has {_ranges(held)}")
        else:
            layers += inside
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    problems += [f"--layers {text}: layer {layer} is named twice" for layer in twice]
    if problems:
        raise catalogue.LAYER_NOT_THERE(*dict.fromkeys(problems))
    return sorted(layers)


def _ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → ``0-2,5``."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


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
        # A value that may be several things (auto or a number) fails as each of them: one problem, not several.
        expected: dict[str, dict[str, None]] = {}
        for problem in error.errors():
            expected.setdefault(_subject(problem, values), {})[_expectation(problem)] = None
        problems = [_sentence(*item) for item in expected.items()]
        if any(expected):
            raise catalogue.OPTION_VALUE(*problems) from error
        raise catalogue.REFUSED_COMBINATION(*problems) from error  # of the whole configuration, not of one option


def _subject(problem: Any, values: Mapping[str, Any]) -> str:
    """``--option value``, as it was given; empty for a problem of the whole configuration."""
    if not problem["loc"]:
        return ""
    name = str(problem["loc"][0])
    option = "--" + name.replace("_", "-")
    if problem["type"] == "extra_forbidden" or name not in values:
        return option
    given = values[name]
    # Of a list only the bad element is shown; of anything else what was typed, not what was made of it.
    value = problem["input"] if isinstance(given, list) or "," in str(given) else given
    shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{option} {shown[:60] or repr(shown)}"


def _expectation(problem: Any) -> str:
    """What was expected, in nsae's words rather than pydantic's."""
    context = problem.get("ctx") or {}
    match problem["type"]:
        case "extra_forbidden":
            return "is not an option of this command"
        case "literal_error":
            return f"expected {str(context['expected']).replace(chr(39), '')}"
        case "greater_than":
            return f"expected more than {context['gt']:g}"
        case "greater_than_equal":
            return f"expected at least {context['ge']:g}"
        case "less_than_equal":
            return f"expected at most {context['le']:g}"
        case "finite_number":
            return "expected a finite number"
        case "float_parsing" | "float_type" | "int_parsing" | "int_type" | "int_from_float":
            return "expected a number"
        case "bool_parsing" | "bool_type":
            return "expected true or false"
        case "string_type" | "string_too_short":
            return "expected a text"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _sentence(subject: str, expectations: Mapping[str, None]) -> str:
    first, *others = expectations
    text = " or ".join([first, *(other.removeprefix("expected ") for other in others)])
    if not subject:
        return text
    return f"{subject}: {text}" if text.startswith("expected") else f"{subject} {text}"

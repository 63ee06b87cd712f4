"""Numbers, shares, tokens and sources as the reader sees them: three digits, thousands separators, never ``nan``.

Every function takes None (an undefined value of an artifact) and answers with `MISSING`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

#: Stands for a value that is undefined or was not recorded.
MISSING = "–"


def _finite(value: Any) -> float | None:
    if value is None or isinstance(value, (str, bytes, Mapping)):
        return None
    number_ = float(value)
    return number_ if math.isfinite(number_) else None


def count(value: int | None) -> str:
    """A whole number with thousands separators: 1,234,567."""
    number_ = _finite(value)
    return MISSING if number_ is None else f"{round(number_):,}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits and no exponent.

    3125.4 → 3,125 · 12 → 12.0 · 0.04567 → 0.0457 · 12_345_678 → 12.3M · 0.00002 → <0.0001 · 0 → 0 · None → –
    """
    number_ = _finite(value)
    if number_ is None:
        return MISSING
    if number_ == 0:
        return "0"
    sign, size = ("-" if number_ < 0 else ""), abs(number_)
    if size < 1e-4:
        return "<0.0001" if number_ > 0 else ">-0.0001"
    # Rounded first, so that 9.996 counts as 10.0 and 999,960 as a million.
    size = float(f"{size:.{digits - 1}e}") if size < 1000 else size
    if size >= 999_500_000:
        return f"{sign}{number(size / 1e9, digits)}B"
    if size >= 9_995_000:
        return f"{sign}{number(size / 1e6, digits)}M"
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    return f"{sign}{size:,.{decimals}f}"


def plain(value: float | None, digits: int = 3) -> str:
    """As `number`, without padding zeros: 9.00 → 9 · 37.50 → 37.5. For sentences and ranges."""
    return _unpadded(number(value, digits))


def _unpadded(text: str) -> str:
    return re.sub(r"(\.\d*?)0+(?=\D|$)", lambda found: found.group(1).rstrip("."), text)


def percent(value: float | None, digits: int = 3) -> str:
    """A share as a percentage: 0.3118 → 31.2 % · 0.0078 → 0.780 % · 1 → 100 % · 0.99999 → >99.9 % · 1e-5 → <0.01 %."""
    number_ = _finite(value)
    if number_ is None:
        return MISSING
    if number_ in (0.0, 1.0):
        return f"{number_ * 100:.0f} %"
    if 0 < number_ < 1e-4:
        return "<0.01 %"
    if 0.9995 <= number_ < 1:
        return ">99.9 %"
    return f"{number(number_ * 100, digits)} %"


def plain_percent(value: float | None, digits: int = 3) -> str:
    """As `percent`, without padding zeros: 0.01 → 1 % · 0.78 → 78 %."""
    return _unpadded(percent(value, digits)) if value is None or value >= 1e-4 else percent(value, digits)


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """numerator / denominator; None where it is undefined."""
    top, bottom = _finite(numerator), _finite(denominator)
    return None if top is None or bottom is None or bottom == 0 else top / bottom


def span(low: float | None, high: float | None) -> str:
    """A range of values: 20–140; one value where both ends read the same."""
    first, last = plain(low), plain(high)
    return first if first == last else f"{first}–{last}"


def size_in_bytes(value: int | float | str | None) -> str:
    """A file size: 512 B · 1.50 KiB · 2.00 GiB. A string is taken as it stands."""
    if isinstance(value, str):
        return value
    number_ = _finite(value)
    if number_ is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number_ < 1023.5:
            return f"{number_:.0f} B" if unit == "B" else f"{number(number_)} {unit}"
        number_ /= 1024
    return f"{number(number_)} TiB"


def token(text: str | None, longest: int = 24) -> str:
    """A token's text in quotes, white space and control characters visible: ``' the'``, ``'\\n'``."""
    if text is None:
        return MISSING
    shown = text if len(text) <= longest else text[: longest - 1] + "…"
    return repr(shown)


def layer_label(hook: Mapping[str, Any]) -> str:
    """The layer's number, else the hook's name."""
    layer = hook.get("layer")
    return str(hook.get("hook", MISSING)) if layer is None else str(layer)


def layer_of(hook: str | None) -> int | None:
    """The layer in a hook's name: ``blocks.6.hook_resid_post`` → 6."""
    found = re.search(r"blocks\.(\d+)\.", hook or "")
    return int(found.group(1)) if found else None


def artifact_name(reference: Mapping[str, Any] | str | None) -> str | None:
    """The name in a reference to an artifact: {name, …} or the name itself; None where it was not recorded."""
    name = reference.get("name") if isinstance(reference, Mapping) else reference
    return None if name is None else str(name)


def trained_on(run: Mapping[str, Any]) -> str | None:
    """The store of a run.json, or the model and the corpus that it read; None where neither was recorded."""
    inputs = run.get("inputs") or {}
    if model := artifact_name(inputs.get("model")):
        return f"{model} on {artifact_name(inputs.get('corpus')) or MISSING}, live"
    store = artifact_name(inputs.get("activations"))
    return None if store is None else f"activations {store}"


def merged_source(artifact: Mapping[str, Any], source: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `source_line` needs, from the artifact itself, else from `source`."""
    keys = ("context_size", "packing", "bos", "embedded_note")
    return {key: (source or {}).get(key) if artifact.get(key) is None else artifact.get(key) for key in keys}


def model_name(model: str | None) -> str:
    """A model's name as printed: a hub id as it stands, of a folder its last part."""
    if not model:
        return "unknown model"
    return os.path.basename(model.rstrip("/\\")) if os.path.isabs(model) or model.startswith(".") else model


def source_line(source: Mapping[str, Any] | None) -> str:
    """Context length, packing and first token of the contexts that rows come from; says so where it is not recorded.

    Args:
        source: a norms.json, a run.json, or any mapping with `context_size`, `packing`, `bos` and, for an embedded
            model whose sink was placed, `embedded_note`.
    """
    source = source or {}
    size = source.get("context_size")
    note = [str(source["embedded_note"])] if source.get("embedded_note") else []
    if size is None:
        return ", ".join(["context length and packing not recorded", *note])
    parts = [f"context {count(size)}"]
    packing = source.get("packing")
    parts.append("packing not recorded" if packing is None else "packed" if packing else "one document per context")
    bos = source.get("bos")
    if bos is not None:
        parts.append("each context begins with the BOS token" if bos else "no BOS token put first")
    return ", ".join(parts + note)


def short_labels(names: Sequence[str]) -> list[str]:
    """The names without the beginning that all of them share, cut at ``/`` or ``-``; one name keeps its last folder.

    ``run/L6-relu-none``, ``run/L6-relu-sq`` → ``none``, ``sq``. Names that would become equal or empty stay whole.
    """
    if len(names) < 2:
        return [name.rsplit("/", 1)[-1] for name in names]
    split = [re.findall(r"[^/-]+[/-]?|[/-]", name) for name in names]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    labels = ["".join(parts[shared:]) for parts in split]
    return labels if len(set(labels)) == len(set(names)) else list(names)


def folded(label: str, width: int) -> str:
    """A label on several lines of at most `width` characters, broken after ``/``, ``-`` or a space where possible."""
    lines, line = [], ""
    for part in re.findall(r"[^/\-\s]*[/\-\s]|[^/\-\s]+", label):
        if line and len((line + part).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += part
        while len(line.rstrip()) > width:
            lines.append(line[:width])
            line = line[width:]
    return "\n".join([*lines, line.rstrip()] if line.strip() else lines)

"""The feature browser's data: as many features and contexts of an SAE as fit into a number of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsae_cli.report import format as fmt
from nsae_cli.report.page_content import FeaturesContent
from nsae_cli.report.page_sections import embedded_bytes, rounded

#: Contexts per feature, tried from the largest; below the last, features are left out instead.
_CONTEXTS = (10, 8, 6, 5, 4)
_LONGEST_TOKEN = 80
#: Features after which a number of contexts that is far too large is given up.
_SAMPLE = 200
#: Activations are shown as shading, in this many steps up to the feature's largest.
_SHADES = 50
#: Numbers of a feature, by the name that the page's script knows.
_NUMBERS = ("density", "mass", "mean_act", "top_act", "decoder_norm", "sink_share", "norm_correlation")


def features_section(features: FeaturesContent, budget: int) -> dict[str, Any]:
    """Everything that the browser knows of one SAE.

    Features are taken by activation mass, largest first. If not all that fire fit with ten contexts each, fewer
    contexts are taken, down to four, then fewer features.

    Args:
        features: the artifact's content.
        budget: bytes of JSON at most.

    Returns:
        `features`: a list of [number, numbers…, contexts, logits]; `left_out`: how many that fire are not in it.
        `alive`: one bit per feature, as hexadecimal digits, the first feature the highest bit of the first digit.
    """
    document, arrays = features.document, features.arrays
    density = np.asarray(arrays["density"])
    order = np.argsort(-np.asarray(arrays["mass"]), kind="stable")
    firing = [int(feature) for feature in order if density[feature] > 0]
    head = {
        "sae": fmt.artifact_name(document.get("sae")) or "unnamed SAE",
        "hook": document.get("hook"),
        "d_sae": len(density),
        "rows": document.get("rows"),
        "sink_rows": document.get("sink_rows"),
        "dead": int((density == 0).sum()),
        "source": f"{fmt.artifact_name(document.get('activations'))}, {fmt.source_line(document)}",
        "has_tokens": bool(document.get("has_tokens", True)),
        "before": (document.get("window") or {}).get("before", 0),
        "logits": document.get("logits") if "raised" in arrays else None,
        "shades": _SHADES,
        "alive": np.packbits(density > 0).tobytes().hex(),
    }
    budget -= embedded_bytes(head) + 200
    kept = np.asarray(arrays["top_act"]).shape[1]
    texts = {int(token): str(text) for token, text in (document.get("tokens") or {}).items()}
    tried = sorted({min(kept, number) for number in _CONTEXTS}, reverse=True)
    for contexts in tried:
        writer = _Writer(arrays, texts, contexts)
        taken = writer.add(firing, budget, give_up=contexts != tried[-1])
        if taken == len(firing):
            break
    return {
        **head, "contexts": contexts, "tokens": writer.tokens, "features": writer.features,
        "left_out": len(firing) - taken,
    }  # fmt: skip


class _Writer:
    """Features as short lists; tokens as places in one list of texts."""

    def __init__(self, arrays: Any, texts: dict[int, str], contexts: int) -> None:
        self._arrays, self._texts, self._contexts = arrays, texts, contexts
        self._places: dict[int, int] = {}
        self.tokens: list[str] = []
        self.features: list[list[Any]] = []

    def add(self, features: list[int], budget: int, *, give_up: bool) -> int:
        """Adds features until the budget is used up, or, to `give_up`, until it clearly will be; returns how many."""
        whole = budget
        for number, feature in enumerate(features):
            if give_up and number == _SAMPLE and (whole - budget) / _SAMPLE * len(features) > 1.5 * whole:
                return number
            before = len(self.tokens)
            entry = self._feature(feature)
            budget -= embedded_bytes(entry) + 1 + sum(embedded_bytes(text) + 1 for text in self.tokens[before:])
            if budget < 0:
                del self.tokens[before:]
                return number
            self.features.append(entry)
        return len(features)

    def _feature(self, feature: int) -> list[Any]:
        arrays = self._arrays
        numbers = [rounded(np.ravel(arrays[name][feature])[0], 3) for name in _NUMBERS]
        rows = arrays["top_row"][feature][: self._contexts]
        contexts = [self._context(feature, slot) for slot, row in enumerate(rows) if row >= 0]
        logits = None
        if "raised" in arrays:
            logits = [
                [[self._place(int(token)), rounded(effect, 3)]
                 for token, effect in zip(arrays[ids][feature], arrays[f"{ids}_by"][feature], strict=True)]
                for ids in ("raised", "lowered")
            ]  # fmt: skip
        return [feature, numbers, contexts, logits]

    def _context(self, feature: int, slot: int) -> list[Any]:
        """[act, row, first token's place in the window, tokens, shades]; trailing shades of 0 are left out."""
        arrays = self._arrays
        inside = np.flatnonzero(arrays["window_inside"][feature, slot])
        acts = np.asarray(arrays["window_acts"][feature, slot], dtype=np.float64)[inside]
        largest = float(arrays["top_act"][feature, 0]) or 1.0
        # What fires at all is shaded at least a little.
        shades = [int(shade) for shade in np.ceil(acts / largest * _SHADES)]
        while shades and shades[-1] == 0:
            shades.pop()
        tokens = [self._place(int(token)) for token in arrays["window_tokens"][feature, slot][inside]]
        act, row = arrays["top_act"][feature, slot], arrays["top_row"][feature, slot]
        return [rounded(act, 3), int(row), int(inside[0]) if len(inside) else 0, tokens, shades]

    def _place(self, token: int) -> int:
        if token not in self._places or self._places[token] >= len(self.tokens):
            text = self._texts.get(token, f"#{token}" if token >= 0 else "?")
            self._places[token] = len(self.tokens)
            self.tokens.append(text if len(text) <= _LONGEST_TOKEN else text[: _LONGEST_TOKEN - 1] + "…")
        return self._places[token]

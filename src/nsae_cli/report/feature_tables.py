"""features.json and its arrays as a terminal table: the features with the largest activation mass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.console import RenderableType

from nsae_cli.report import format as fmt
from nsae_cli.report.layout import Column, WideTable
from nsae_cli.report.page_content import FeaturesContent

_LISTED = 20
_TOKENS = 3


def features_table(features: FeaturesContent, listed: int = _LISTED) -> RenderableType:
    """One row per feature, the largest activation mass first; features that never fire are left out."""
    document, arrays = features.document, features.arrays
    order = np.argsort(-np.asarray(arrays["mass"]), kind="stable")
    firing = [int(feature) for feature in order if arrays["density"][feature] > 0]
    chosen = firing[:listed]

    def cells(name: str, form: Callable[[float], str] = fmt.number) -> list[str]:
        return [form(float(arrays[name][feature])) for feature in chosen]

    largest = [fmt.number(float(arrays["top_act"][feature, 0])) for feature in chosen]
    groups = [
        [Column("density", cells("density", fmt.percent))],
        [Column("mean\nact", cells("mean_act")), Column("largest\nact", largest)],
        [Column("norm of\nW_dec", cells("decoder_norm"))],
        [Column("on\nsinks", cells("sink_share", fmt.percent)), Column("corr.\nnorm", cells("norm_correlation"))],
    ]
    if document.get("has_tokens"):
        groups.append([Column("strongest\ntokens", [_strongest(features, one) for one in chosen], left=True)])
    if "raised" in arrays:
        raised = [_texts(features, arrays["raised"][one][:_TOKENS]) for one in chosen]
        groups.append([Column("raises", raised, left=True)])
    sae = fmt.artifact_name(document.get("sae")) or "unnamed SAE"
    dead = fmt.count(document.get("dead"))
    note = (
        f"{fmt.count(len(chosen))} of {fmt.count(len(firing))} features that fire, by activation mass; {dead} never "
        f"fire on these {fmt.count(document.get('rows'))} held-out tokens. On sinks: share of the mass Σf; corr. norm: "
        f"correlation of firing with ‖x‖ over non-sinks."
    )
    return WideTable([Column("feature", [str(one) for one in chosen])], groups, title=f"Features of {sae}", note=note)


def _strongest(features: FeaturesContent, feature: int) -> str:
    """The strongest tokens of the strongest contexts, each once."""
    before = (features.document.get("window") or {}).get("before", 0)
    rows = features.arrays["top_row"][feature]
    return _texts(features, features.arrays["window_tokens"][feature, rows >= 0, before])


def _texts(features: FeaturesContent, tokens: np.ndarray) -> str:
    texts = features.document.get("tokens") or {}
    found = dict.fromkeys(str(texts.get(str(token), f"#{token}")) for token in tokens)
    return " ".join(fmt.token(text, 12) for text in list(found)[:_TOKENS])

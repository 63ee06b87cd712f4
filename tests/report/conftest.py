"""Artifacts as nsae writes them, GPT-2-like: 12 layers, medians 50–219, position 0 near 3000 from layer 3 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nsae_cli.report.page_content import FeaturesContent, NormsContent, ReportContent, SaeContent

MEDIANS = (50, 57, 61, 66, 71, 78, 87, 101, 119, 150, 219, 456)
SINK_NORMS = (141, 637, 2570, 2757, 2908, 3002, 3058, 3092, 3113, 3124, 3125, 384)
ALPHA_EFF = {
    "relu": (("none", 0.0291, 1.19, 0.81), ("norm", 1.0, 1.0, 1.0), ("sq", 34.4, 0.84, 1.23)),
    "tanh-relu": (("none", 0.00085, 1.42, 0.66), ("norm", 0.0291, 1.19, 0.81), ("sq", 1.0, 1.0, 1.0)),
}
CONTEXT, CONTEXTS = 128, 15_625
ROWS = CONTEXT * CONTEXTS


def make_norms(layers: int = 12, *, positions: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """norms.json and the arrays of norms.safetensors."""
    random = np.random.default_rng(0)
    edges = np.linspace(1.3, 3.6, 201)
    counts = np.zeros((layers, 200), dtype=np.int64)
    position0 = np.zeros((layers, 200), dtype=np.int64)
    hooks = []
    for layer in range(layers):
        ordinary = np.log10(MEDIANS[layer]) + random.normal(0, 0.07, 40_000) + random.exponential(0.02, 40_000)
        sinks = np.log10(SINK_NORMS[layer]) + np.clip(random.normal(0, 0.004, 400), -0.01, 0.01)
        scale = ROWS / 40_400
        position0[layer] = np.histogram(sinks, edges)[0] * 39
        ordinary = np.clip(ordinary, 1.31, 3.59)
        counts[layer] = np.round(np.histogram(ordinary, edges)[0] * scale).astype(np.int64) + position0[layer]
        is_sink = SINK_NORMS[layer] > 3 * MEDIANS[layer]
        position0_other = {"rows": 15_500, "median": float(SINK_NORMS[layer]), "max": SINK_NORMS[layer] * 1.02}
        hooks.append({
            "hook": f"blocks.{layer}.hook_resid_post", "layer": layer, "rows": int(counts[layer].sum()),
            "mean": MEDIANS[layer] * 1.2, "median": float(MEDIANS[layer]), "p1": MEDIANS[layer] * 0.74,
            "p5": MEDIANS[layer] * 0.8, "p10": MEDIANS[layer] * 0.84, "p25": MEDIANS[layer] * 0.9,
            "p75": MEDIANS[layer] * 1.1, "p90": MEDIANS[layer] * 1.2, "p95": MEDIANS[layer] * 1.3,
            "p99": MEDIANS[layer] * 1.52, "max": SINK_NORMS[layer] * 1.07, "cv": 2.31 if is_sink else 0.19,
            "cv_ns": 0.187,
            "sinks": {"total": 15_641 if is_sink else 0, "position": 15_625 if is_sink else 0,
                      "norm": 15_633 if is_sink else 0, "massive": 15_600 if is_sink else 0,
                      "overlap": {"position": 8, "norm": 16, "position+norm": 17, "position+norm+massive": 15_600}
                      if is_sink else {}},
            "sink_share_sq": 0.8812 if is_sink else 0.0,
            "table": {
                "position0_special": {"rows": 125, "median": SINK_NORMS[layer] * 0.99, "max": SINK_NORMS[layer] * 1.07},
                "position0_other": position0_other,
                "other_special": {"rows": 0, "median": None, "max": None},
                "other": {"rows": 1_984_375, "median": float(MEDIANS[layer]), "max": MEDIANS[layer] * 2.4},
            } if positions else None,
            "top_tokens": [{"token": 50256, "text": "<|endoftext|>", "count": 15_625},
                           {"token": 262, "text": " the", "count": 312}, {"token": 198, "text": "\n", "count": 41}],
            "alpha_eff": {act: {l2: {"all": 1.0, "ns": 1.0, "sinks": sinks_ if is_sink else None,
                                     "bins": [low, *[1.0] * 8, high]}
                                for l2, sinks_, low, high in weights}
                          for act, weights in ALPHA_EFF.items()},
            "esf": {"none": {"all": 0.0093, "ns": 0.962}, "norm": {"all": 0.141, "ns": 0.991},
                    "sq": {"all": 1.0, "ns": 1.0}},
            "probe": {"as_is": {"position0": 3092.4, "elsewhere": 87.1, "ratio": 35.5},
                      "bos": {"position0": 3094.0, "elsewhere": 87.2, "ratio": 35.4},
                      "other_token": {"position0": 3071.9, "elsewhere": 87.0, "ratio": 35.3},
                      "other_position": {"position0": 104.2, "elsewhere": 88.4, "ratio": 1.179},
                      "kept_other_token": 0.994, "kept_other_position": 0.005, "verdict": "position"}
            if layer == 6 else None,
        })  # fmt: skip
    norms = {
        "format_version": 1, "activations": {"name": "gpt2-resid_post-3f9a1c", "manifest_sha256": "00"},
        "model": "gpt2", "embedded_note": None,
        "context_size": CONTEXT, "packing": True, "bos": False, "site": "resid_post", "hooks": hooks,
    }  # fmt: skip
    arrays = {"counts": counts, "edges": edges, "position0_counts": position0 if positions else position0 * 0}
    return norms, arrays


def make_top_norms(
    name: str = "gpt2-L6/L6-relu-none", rows: int = 100_000, *, top_l0: float = 9, top_l1: float = 3070.0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """top_norms.json and its arrays: the note's picture, a spike at L0 9 and L1 3070 beside L0 20–140, L1 20–400."""
    random = np.random.default_rng(len(name))
    top = rows // 100
    group = np.ones(rows, dtype=np.uint8)
    group[:top], group[-top:] = 2, 0
    kind = np.zeros(rows, dtype=np.uint8)
    kind[: int(top * 0.78)], kind[int(top * 0.78) : int(top * 0.8)] = 2, 1
    l0 = np.clip(random.normal(62, 17, rows), 12, 150).astype(np.int32)
    l0[-top:] = np.clip(random.normal(38, 6, top), 10, 80).astype(np.int32)
    l0[: int(top * 0.8)] = np.maximum(random.poisson(0.4, int(top * 0.8)) + top_l0, 0).astype(np.int32)
    l1 = (l0 * random.normal(2.1, 0.2, rows)).astype(np.float32)
    l1[: int(top * 0.8)] = random.normal(top_l1, top_l1 * 0.01, int(top * 0.8))

    def part(chosen: np.ndarray, **more: Any) -> dict[str, Any]:
        here = int(np.count_nonzero(chosen))

        def spread(values: np.ndarray) -> dict[str, float | None]:
            if not here:
                return dict.fromkeys(("mean", "median", "p5", "p95"))
            low, middle, high = (float(value) for value in np.quantile(values[chosen], (0.05, 0.5, 0.95)))
            return {"mean": float(values[chosen].mean()), "median": middle, "p5": low, "p95": high}

        return {
            "rows": here, "norm_min": 61.2, "norm_max": 168.4, "l0": spread(l0), "l1": spread(l1), "mre": 0.121,
            "direction_error": 0.11, "magnitude_error": 0.011, "shrinkage": 0.962, "norm_ratio": 0.931,
            "l1_share": float(l1[chosen].sum() / l1.sum()), "loss_share": 0.312, "exclusive_features": 3,
            "tokens": [{"token": 262, "text": " the", "count": here // 10}],
            "positions": [{"position": 0, "count": int(np.count_nonzero(kind[chosen] == 2))},
                          {"position": 5, "count": here // 50}],
            **more,
        }  # fmt: skip

    sunk = {"norm_min": 2870.0, "norm_max": 3310.0, "mre": 0.0021, "direction_error": 0.0006,
            "magnitude_error": 0.0015, "shrinkage": 0.998, "norm_ratio": 0.961}  # fmt: skip
    artifact = {
        "sae": {"name": name}, "activations": {"name": "gpt2-resid_post-3f9a1c"}, "top": 0.01, "rows": rows,
        "groups": {"top": part(group == 2, **sunk), "other": part(group == 1), "bottom": part(group == 0)},
        "kinds": {"position0": part(kind == 2, **sunk), "special": part(kind == 1), "ordinary": part(kind == 0)},
    }  # fmt: skip
    return artifact, {"l0": l0, "l1": l1, "group": group, "kind": kind}


def make_run(act: str = "relu", l2_norm: str = "none", seed: int = 0, **more: Any) -> dict[str, Any]:
    """run.json of one SAE at layer 6."""

    def scope(**values: Any) -> dict[str, Any]:
        return {"tokens": 99_225, "l0": 42.3, "fvu_p0": 0.2004, "explained_variance": 0.7996, "mre": 0.2113,
                "shrinkage": 0.9131, "dead_fraction": 0.0312, "bias_ratio": 1.04, **values}  # fmt: skip

    bins = [scope(bias_ratio=0.62 + 0.09 * place) for place in range(10)]
    return {
        "format_version": 1, "hook": "blocks.6.hook_resid_post", "d_in": 768, "d_sae": 6144, "alpha": 0.2,
        "config": {"act": act, "l2_norm": l2_norm, "l1_norm": "none", "decoder": "unit", "sparsity": "l1",
                   "seed": seed, "name": "gpt2-L6", **more},
        "metrics": {"all": scope(explained_variance=0.9874, dead_fraction=0.0287), "ns": scope(),
                    "sinks": scope(tokens=775, l0=9.12, mre=0.000214, bias_ratio=104.3), "bins": bins},
    }  # fmt: skip


def make_training_rows(steps: int = 120, seed: int = 0, *, sinks: bool = True) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    random = np.random.default_rng(seed)
    rows = []
    for place in range(1, steps + 1):
        fade = np.exp(-place / 18)
        wobble = 1 + 0.01 * random.standard_normal()
        bias = [(80 * fade + 0.3) if sinks else None, *[float(0.7 + 0.06 * bin_ * wobble) for bin_ in range(10)]]
        rows.append({
            "step": place * 50, "tokens": place * 102_400, "loss": float((3000 * fade + 700) * wobble),
            "l0_ns": float((1500 * fade + 45) * wobble), "fvu_ns": float((0.8 * fade + 0.2) * wobble),
            "bias_ratio": bias, "nbi": None,
        })  # fmt: skip
    return rows


@pytest.fixture(scope="session")
def norms() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return make_norms()


@pytest.fixture(scope="session")
def norms_of() -> Callable[..., tuple[dict[str, Any], dict[str, np.ndarray]]]:
    return make_norms


@pytest.fixture(scope="session")
def top_norms_of() -> Callable[..., tuple[dict[str, Any], dict[str, np.ndarray]]]:
    return make_top_norms


@pytest.fixture(scope="session")
def run_of() -> Callable[..., dict[str, Any]]:
    return make_run


@pytest.fixture(scope="session")
def training_rows_of() -> Callable[..., list[dict[str, Any]]]:
    return make_training_rows


#: Tokens as a tokenizer of a stranger could hold them.
HOSTILE = (
    "</script><script>window.attacked = 1</script>", '"><img src=x onerror="window.attacked = 2">',
    "'quoted' \"twice\"",
    "\u202eesrever", "\x00", "\U0001f980\u200d\U0001f525", "<!--", "\u2028", "&lt;b&gt;", "\ud800", "@@data@@",
    "\n", "",
)  # fmt: skip


def make_features(
    d_sae: int = 40, kept: int = 10, *, name: str = "gpt2-L6/L6-relu-none", vocabulary: tuple[str, ...] = HOSTILE
) -> FeaturesContent:
    """features.json and its arrays: feature 0 never fires, feature 1 on sinks; mass falls with the number."""
    random = np.random.default_rng(d_sae)
    width, before = 25, 16
    texts = {str(token): text for token, text in enumerate((*vocabulary, *(f" word{n}" for n in range(200))))}
    density = random.uniform(1e-4, 0.2, d_sae)
    density[0] = 0
    top_act = -np.sort(-random.uniform(0.5, 9, (d_sae, kept)), axis=1)
    acts = random.uniform(0, 1, (d_sae, kept, width)) * (random.uniform(size=(d_sae, kept, width)) < 0.3)
    acts = acts * top_act[:, :, None]
    acts[:, :, before] = top_act
    rows = random.integers(0, 2_000_000, (d_sae, kept))
    rows[0], top_act[0] = -1, 0
    inside = np.ones((d_sae, kept, width), dtype=bool)
    inside[:, 1, :10] = False
    document = {
        "format_version": 1, "sae": {"name": name, "weights_sha256": {}}, "activations": {"name": "gpt2-3f9a1c"},
        "hook": "blocks.6.hook_resid_post", "context_size": 128, "packing": True, "bos": True, "d_sae": d_sae,
        "rows": 100_000, "sink_rows": 781, "dead": 1, "has_tokens": True, "window": {"before": before, "after": 8},
        "logits": {"listed": 8, "final_scale": 12.5}, "tokens": texts,
    }  # fmt: skip
    listed = random.integers(0, len(texts), (2, d_sae, 8)).astype(np.int32)
    arrays = {
        "density": density.astype(np.float32), "mass": np.linspace(1000, 1, d_sae) * (density > 0),
        "mean_act": random.uniform(0.1, 3, d_sae).astype(np.float32),
        "sink_share": np.where(np.arange(d_sae) == 1, 0.97, 0.01).astype(np.float32),
        "norm_correlation": random.uniform(-0.5, 0.5, d_sae).astype(np.float32),
        "decoder_norm": random.uniform(0.5, 2, d_sae).astype(np.float32), "top_act": top_act.astype(np.float32),
        "top_row": rows, "window_acts": acts.astype(np.float32), "window_inside": inside,
        "window_tokens": (np.arange(d_sae * kept * width).reshape(d_sae, kept, width) % len(texts)).astype(np.int32),
        "raised": listed[0], "raised_by": np.linspace(2, 1, 8) * np.ones((d_sae, 1)),
        "lowered": listed[1], "lowered_by": -np.linspace(2, 1, 8) * np.ones((d_sae, 1)),
    }  # fmt: skip
    return FeaturesContent(document, arrays)


def make_content(saes: int = 4, features: int = 1, d_sae: int = 40) -> ReportContent:
    """A page with everything on it, names and tokens of a stranger's among them."""
    norms, arrays = make_norms()
    found = []
    for place in range(saes):
        act, l2_norm = (("relu", "none"), ("relu", "sq"), ("tanh-relu", "none"))[place % 3]
        name = f"gpt2-L6/L6-{act}-{l2_norm}-{place}" if place else "gpt2-L6/<b>bold</b>"
        run = make_run(act, l2_norm, alpha=0.1 * (place + 1))
        run["metrics"]["ns"] |= {"l0": 80.0 / (place + 1), "fvu_p0": 0.05 * (place + 1), "mre": 0.06 * (place + 1)}
        evaluation = {"behaviour": {"delta_ce_ns": {"value": 0.02 * (place + 1), "low": 0, "high": 1}}}
        analysed = make_top_norms(name) if place < 2 else None
        found.append(SaeContent(name, run, make_training_rows(seed=place), analysed, evaluation))
    table = {"format_version": 1, "arms": ["a"], "rows": [{"arm": "a <i>", "l0": 8, "fvu": {"mean": 0.2, "sd": None}}]}
    return ReportContent(
        title="Norm bias in <test> & co",
        norms=[NormsContent("gpt2", norms, arrays)],
        saes=found,
        tables=[("main", table)],
        features=[make_features(d_sae, name=f"gpt2-L6/{number}") for number in range(features)],
        missing=["nothing: `nsae norms` measures it"],
    )


@pytest.fixture(scope="session")
def content_of() -> Callable[..., ReportContent]:
    return make_content


@pytest.fixture(scope="session")
def features_of() -> Callable[..., FeaturesContent]:
    return make_features

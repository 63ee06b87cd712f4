"""run.json, metrics.jsonl and evaluations written by hand: SAEs of which a comparison sees nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HOOK = "blocks.2.hook_resid_post"
CONTEXTS = 60
SCOPE = {"tokens": 1000, "l0": 8.0, "fvu_p0": 0.2, "fvu_p1": 0.2, "fvu_p2": 0.2, "mre": 0.2, "shrinkage": 1.05}


def write_sae(
    workspace: Path,
    name: str,
    *,
    config: Mapping[str, Any] | None = None,
    ns: Mapping[str, Any] | None = None,
    sinks: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    store: str = "mini-sink",
    log: list[dict[str, Any]] | None = None,
) -> str:
    """A run.json, with what is given in place of a plain relu SAE's; returns the name."""
    folder = workspace / "saes" / name
    folder.mkdir(parents=True)
    options = {
        "hook": HOOK, "act": "relu", "l2_norm": "none", "l1_norm": "none", "decoder": "unit", "sparsity": "l1",
        "alpha": 0.2, "alpha_scale": "layer-norm", "target_l0": 8.0, "row_weights": "plain", "k": None, "noise": 0.0,
        "d_sae": 512, "tokens": 1_000_000, "batch_size": 512, "lr": 1e-3, "sinks": "keep", "seed": 0,
    } | dict(config or {})  # fmt: skip
    ns_metrics = SCOPE | {"nbi": -0.5} | dict(ns or {})
    document = {
        "format_version": 1,
        "config": options,
        "inputs": {"activations": {"name": store, "manifest_sha256": f"sha of {store}"}},
        "model": "mini-sink",
        "context_size": 128,
        "packing": True,
        "bos": True,
        "hook": options["hook"],
        "d_in": 64,
        "d_sae": options["d_sae"],
        "alpha": options["alpha"],
        "beta": 0.8,
        "norm_scale": 3.9,
        "sinks": {"total": 78, "position": 78, "median_position0": 81.5},
        "counts": {"steps": 1953},
        "metrics": {
            "all": SCOPE | {"dead_fraction": 0.01},
            "ns": ns_metrics,
            "sinks": SCOPE | {"tokens": 8, "mre": 1e-4, "norm_ratio": 1.0} | dict(sinks or {}),
            "bins": [SCOPE | {"shrinkage": 1.1 - 0.01 * number} for number in range(10)],
        },
        "weights_sha256": {"W_enc": f"of {name}"},
        "warnings": [],
    } | dict(run or {})
    (folder / "run.json").write_text(json.dumps(document))
    if log is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return name


def write_eval(
    workspace: Path,
    sae: str,
    *,
    fvu: float = 0.2,
    mre: float = 0.2,
    ce_ns: float = 0.1,
    ce_all: float = 0.2,
    nbi: float = -0.5,
    spread: float = 0.0,
    seed: int = 0,
    contexts: int = CONTEXTS,
    name: str | None = None,
    weights: str | None = None,
) -> Mapping[str, np.ndarray]:
    """An evaluation whose sums give these values over all contexts but for noise.

    Args:
        spread: standard deviation of what a context's error and ΔCE are multiplied by.
        seed: of that noise.
    """
    noise = np.exp(spread * np.random.default_rng(seed).standard_normal(contexts))
    common = np.random.default_rng(99)
    variance = common.uniform(50, 150, contexts)
    clean = common.uniform(300, 400, contexts)
    log_norm = common.normal(1.4, 0.2, (contexts, 100))
    log_rho = -1.5 + nbi * (log_norm - 1.4) + spread * common.standard_normal((contexts, 100))
    moments = np.stack(
        [np.full(contexts, 100.0), log_norm.sum(1), log_rho.sum(1), (log_norm**2).sum(1), (log_norm * log_rho).sum(1)],
        1,
    )
    sums = {
        "context": np.arange(19, 19 + 20 * contexts, 20),
        "predicted": np.full(contexts, 127),
        "ce_clean": clean,
        "ce_with_sae": clean + 127 * ce_all * noise,
        "ce_ns": clean + 127 * ce_ns * noise,
        "rows_ns": np.full(contexts, 127.0),
        "l0_ns": np.full(contexts, 127 * 8.0),
        "error_sq_ns": fvu * variance * noise,
        "variance_ns": variance,
        "rho_ns": 127 * mre * noise,
        "nbi_moments": moments,
    }
    folder = workspace / "evals" / (name or sae.replace("/", "-"))
    folder.mkdir(parents=True)
    save_file(sums, folder / "contexts.safetensors")
    value = {
        key: {"value": float((sums[column] - clean).sum() / sums["predicted"].sum()), "low": None, "high": None}
        for key, column in (("delta_ce_ns", "ce_ns"), ("delta_ce_all", "ce_with_sae"))
    }
    document = {
        "format_version": 1,
        "sae": {"name": sae, "weights_sha256": {"W_enc": f"of {weights or sae}"}},
        "rows": {"source": "store", "activations": {"name": "mini-sink", "manifest_sha256": "x"}, "context_size": 128},
        "behaviour": value,
    }
    (folder / "eval.json").write_text(json.dumps(document))
    return sums

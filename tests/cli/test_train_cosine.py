"""`nsae train --l2-norm cosine`: a grid beside another norm, its analysis, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import nsae
from nsae_cli import load_sae


def test_from_the_command_line(workspace: Path) -> None:
    options = ("--d-sae", "64", "--batch-size", "256", "--tokens", "30k", "--lr", "3e-3", "--name", "cosine")
    grid = ("train", "--act", "tanh-relu,topk", "--k", "8", "--l2-norm", "cosine,sq", *options)
    trained = nsae("--workspace", workspace, "--json", *grid)
    assert trained.code == 0, trained.err
    assert trained.err.count("cosine distance: always dense") == 1
    cells = [artifact["name"] for artifact in trained.json["artifact"]]
    assert cells == [f"cosine/L2-{act}-{norm}" for act in ("tanh-relu", "topk") for norm in ("cosine", "sq")]
    for document, name in zip(trained.json["result"], cells, strict=True):
        sae = load_sae(workspace / "saes" / name)
        lines = [json.loads(line) for line in (workspace / "saes" / name / "metrics.jsonl").read_text().splitlines()]
        assert document["config"]["l2_norm"] == name.rsplit("-", 1)[1]
        assert document["metrics"]["ns"]["cosine"] > 0.7
        assert lines[-1]["cosine_ns"] > lines[0]["cosine_ns"]
        assert sae.d_sae == 64
    analysed = nsae("--workspace", workspace, "--json", "analyze-top-norms", *cells[::2], "--top", "2%")
    assert analysed.code == 0, analysed.err
    for result in analysed.json["result"]:
        assert sum(group["loss_share"] for group in result["groups"].values()) == pytest.approx(1)
    refused = nsae("--workspace", workspace, "train", "--act", "relu,tanh-relu", "--l2-norm", "sq,cosine", *options)
    assert refused.code == 2
    assert "--act relu and --sparsity l1 has no minimum" in refused.message
    unknown = nsae("--workspace", workspace, "train", "--l2-norm", "cos")
    assert "expected none, norm, sq or cosine" in unknown.message

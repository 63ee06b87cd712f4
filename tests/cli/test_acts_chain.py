"""topk, batchtopk and jumprelu from the command line: a grid, its tables and figures, and the analysis of its SAEs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from command import nsae
from nsae_cli import load_sae

GRID = (
    "train", "--act", "relu,topk,batchtopk,jumprelu", "--k", "4,8", "--d-sae", "96", "--batch-size", "256",
    "--tokens", "40k", "--dead-window", "2k", "--l2-norm", "norm", "--device", "cpu", "--name", "acts",
)  # fmt: skip
CELLS = ["L2-relu", "L2-topk-k4", "L2-topk-k8", "L2-batchtopk-k4", "L2-batchtopk-k8", "L2-jumprelu"]


def test_a_grid_and_what_is_made_of_it(workspace: Path) -> None:
    trained = nsae("--workspace", workspace, "--json", *GRID)
    assert trained.code == 0, trained.err
    assert [artifact["name"] for artifact in trained.json["artifact"]] == [f"acts/{cell}" for cell in CELLS]
    by_cell = dict(zip(CELLS, trained.json["result"], strict=True))
    for k in (4, 8):
        assert by_cell[f"L2-topk-k{k}"]["metrics"]["all"]["l0"] == pytest.approx(k, abs=0.1)
        assert k / 2 < by_cell[f"L2-batchtopk-k{k}"]["metrics"]["all"]["l0"] < 2 * k
    again = nsae("--workspace", workspace, *GRID)
    assert "already complete" in again.err
    assert {"topk", "batchtopk", "jumprelu"} <= set(again.out.split())

    analysed = nsae("--workspace", workspace, "--json", "analyze-top-norms", "acts", "--top", "2%")
    assert analysed.code == 0, analysed.err
    names = [artifact["name"] for artifact in analysed.json["artifact"]]
    results = dict(zip(names, analysed.json["result"], strict=True))
    assert sorted(results) == sorted(f"acts-{cell}" for cell in CELLS)
    for cell in CELLS:
        result, sae = results[f"acts-{cell}"], load_sae(workspace / "saes" / "acts" / cell)
        assert sae.act == cell.removeprefix("L2-").partition("-")[0].replace("batchtopk", "jumprelu")
        shares = [group["l1_share"] for group in result["groups"].values()]
        assert sum(shares) == pytest.approx(1)
        if sae.k is not None:
            assert result["groups"]["top"]["l0"]["p95"] <= sae.k
    assert nsae("--workspace", workspace, "plot", "training", "acts").code == 0
    assert nsae("--workspace", workspace, "list").out.count("acts/") >= len(CELLS)


def test_a_topk_sae_encodes_rows_by_themselves(workspace: Path) -> None:
    """What an SAE makes of a row does not depend on the rows beside it, batchtopk's neither."""
    assert nsae("--workspace", workspace, *GRID).code == 0
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 3
    for cell in CELLS:
        sae = load_sae(workspace / "saes" / "acts" / cell)
        whole = sae.encode(x)
        assert 0 < float((whole > 0).sum()) < 50 * 96
        for row in (0, 17, 49):
            torch.testing.assert_close(sae.encode(x[row]), whole[row], rtol=1e-4, atol=1e-5)

"""Activations from anywhere go through all commands: a store with nothing but what the format requires."""

from __future__ import annotations

from pathlib import Path

import torch

from command import nsae
from hand_store import Rows, write_foreign

HOOK = "encoder.layer.3"


def test_norms_train_and_analysis_of_a_foreign_store(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 12, generator=generator) * torch.exp(0.3 * torch.randn(6000, 1, generator=generator))
    store = write_foreign(tmp_path / "mine", Rows({HOOK: x.half()}, torch.zeros(0)), [3500, 2500])
    runs = ("--workspace", tmp_path / "runs")
    norms = nsae(*runs, "norms", store)
    assert norms.code == 0, norms.err
    assert "warning: mine has no positions: sink rule 1 is off" in norms.err
    assert "unknown model" in norms.out
    trained = nsae(*runs, "--json", "train", store, "--d-sae", "24", "--tokens", "20k", "--batch-size", "256")
    assert trained.code == 0, trained.err
    assert "warning: mine has no positions" in trained.err
    assert trained.json["result"]["hook"] == HOOK
    assert trained.json["artifact"]["name"].startswith(f"mine-{HOOK}-relu-none-")
    not_found = nsae(*runs, "analyze-top-norms")
    assert not_found.code == 2
    assert "name a store with --activations" in not_found.message
    analysed = nsae(*runs, "analyze-top-norms", "--activations", store)
    assert analysed.code == 0, analysed.err
    assert "warning: mine has no tokens" in analysed.err
    assert "256 held-out tokens of mine" in analysed.out
    assert nsae(*runs, "list").code == 0
    assert nsae(*runs, "plot", "training").code == 0

"""Training that stops and goes on: the same bits, and nothing in a checkpoint that could be missing unnoticed."""

from __future__ import annotations

from pathlib import Path

import cut_points
import pytest
import state_items
from forked import Server
from stages import Stages


@pytest.mark.parametrize(
    ("method", "dtype", "steps"),
    [
        ("relu unit", "fp32", (0, 8, 50)),
        ("tanh-relu free", "bf16", (2,)),
        ("topk", "fp32", (23,)),
        ("target-l0", "bf16", (10, 50)),
        ("grid", "fp32", (9,)),
    ],
)
def test_stopped_and_gone_on(folder: Path, method: str, dtype: str, steps: tuple[int, ...]) -> None:
    cut_points.cut_and_go_on(folder, method, dtype, steps).require()


def test_every_item_of_a_checkpoint_matters(server: Server, stages: Stages, folder: Path) -> None:
    tallies = state_items.change_items(server, stages, folder, ["train on sinks"], every=5)
    for tally in tallies:
        tally.require()
        assert tally.counts["kinds of items"] >= 4
    assert tallies[0].counts["refused"] == tallies[0].tried

"""The whole of training on data whose dictionary is known."""

from __future__ import annotations

import torch

from hand_store import HOOK, Rows, write_foreign
from nsae_cli import load_sae, open_activations
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.workspace import Workspace
from nsae_cli.training.loop import train
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.source import StoreSource
from nsae_cli.values import validate_options

D_IN, DIRECTIONS, ACTIVE, ROWS = 64, 96, 3, 131_072


def test_planted_directions_are_recovered(tmp_path):
    """Rows are sums of 3 of 96 random directions, each times .5 to 1.5; after 4000 steps of 512 the SAE has them."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(DIRECTIONS, D_IN, generator=generator), dim=1)
    chosen = torch.rand(ROWS, DIRECTIONS, generator=generator).topk(ACTIVE, dim=1).indices
    strengths = torch.rand(ROWS, ACTIVE, generator=generator) + 0.5
    x = torch.zeros(ROWS, DIRECTIONS).scatter_(1, chosen, strengths) @ planted
    store = open_activations(
        write_foreign(tmp_path / "planted", Rows({HOOK: x.half()}, torch.arange(ROWS)), [ROWS // 4] * 4)
    )
    options = validate_options(
        TrainOptions, {"d_sae": DIRECTIONS, "tokens": 4000 * 512, "batch_size": 512, "device": "cpu"}
    )
    result = train(options, StoreSource(store, options), Workspace(tmp_path / "runs"), None, SilentReporter())

    W_dec = load_sae(result.artifacts[0].path).weights.W_dec
    best = (planted @ torch.nn.functional.normalize(W_dec, dim=1).T).max(dim=1).values
    assert float(best.mean()) >= 0.95
    metrics = result.runs[0]["metrics"]["ns"]
    assert metrics["l0"] < 2 * ACTIVE
    assert metrics["fvu_p0"] < 0.15

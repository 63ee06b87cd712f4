"""A small store with two layers, sinks and an uneven cut into shards, and a way to train on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hand_store import HOOKS, make_rows, write_full
from listener import Listener
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Workspace
from nsae_cli.training.loop import TrainResult, train
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.source import StoreSource
from nsae_cli.values import validate_options

#: Small, but with everything that a run can have: several epochs and windows, logs, warm-ups, decay.
SMALL = {"d_sae": "20", "tokens": "2560", "batch_size": "64", "buffer": "300", "lr": "0.003"}


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activations") / "two-layers"
    return write_full(folder, make_rows(65, 8, hooks=HOOKS), [200, 120, 0, 200])


@pytest.fixture
def store(two_layers: Path) -> ActivationStore:
    return open_activations(two_layers)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs")


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def run(store: ActivationStore, workspace: Workspace, listener: Listener) -> Callable[..., TrainResult]:
    """`run(name, option=value, …)` trains on layer 4 unless told otherwise."""

    def run(name: str | None = None, store: ActivationStore = store, **options: Any) -> TrainResult:
        given = SMALL | {"layers": "4"} | options
        validated = validate_options(TrainOptions, given)
        return train(validated, StoreSource(store, validated), workspace, name, listener)

    return run

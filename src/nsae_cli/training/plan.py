"""What a training run is to make and where, and whether it is there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsae_cli.errors import UsageError
from nsae_cli.store import commit
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.sae_folder import RUN
from nsae_cli.store.shards import ActivationStore, describe_changes
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name, config_hash
from nsae_cli.training.checkpoint import Checkpoints
from nsae_cli.training.options import CellConfig, TrainOptions, expand_cells, layer_of


@dataclass(frozen=True)
class TrainPlan:
    """The cells of a run, by name, and their place.

    Attributes:
        name: NAME of the result; cells of a grid are NAME/CELL.
        folder: ``saes/NAME``.
        configs: one per cell; all have the same number of steps and the same batch size.
        store: the activations.
        contexts: of the store.
    """

    name: str
    folder: Path
    configs: dict[str, CellConfig]
    store: ActivationStore
    contexts: Contexts

    @property
    def steps(self) -> int:
        """Optimizer steps of every cell."""
        return next(iter(self.configs.values())).steps

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return next(iter(self.configs.values())).batch_size

    @property
    def hooks(self) -> list[str]:
        """The hooks that are trained on, in order."""
        return list(dict.fromkeys(config.hook for config in self.configs.values()))

    @property
    def checkpoints(self) -> Checkpoints:
        """Where the run's checkpoints are."""
        return Checkpoints(self.folder / "checkpoints")

    def cell_folder(self, cell: str) -> Path:
        """Where a cell is saved: the run's own folder if it is the only one."""
        return self.folder if len(self.configs) == 1 else self.folder / cell

    def artifact(self, cell: str) -> Artifact:
        """A cell as an artifact."""
        name = self.name if len(self.configs) == 1 else f"{self.name}/{cell}"
        return Artifact(Kind.SAE, name, self.cell_folder(cell))

    def identity(self) -> dict[str, Any]:
        """What determines the result: the activations and every cell's configuration."""
        return {
            "activations": {"name": self.store.name, "manifest_sha256": self.store.manifest_sha256},
            "cells": {cell: config.model_dump() for cell, config in self.configs.items()},
        }


def make_plan(options: TrainOptions, store: ActivationStore, workspace: Workspace, name: str | None) -> TrainPlan:
    """Resolves options to cells and a name.

    Raises:
        UsageError: layers that are not stored, refused or impossible options, a bad name.
    """
    contexts = Contexts(store)
    epoch_rows = sum(int((~contexts.held_out(shard)).sum()) for shard in range(len(store.manifest.shards)))
    if not epoch_rows:
        raise UsageError(f"{store.name} has no rows to train on; collect more with `nsae collect --tokens`")
    configs = expand_cells(options, select_hooks(options.layers, store), store.manifest.d_in, epoch_rows)
    name = check_name(name) if name else default_name(store, configs)
    return TrainPlan(name, workspace.folder(Kind.SAE, name), configs, store, contexts)


def select_hooks(layers: str | int | list[int | str] | None, store: ActivationStore) -> list[str]:
    """The stored hooks that ``--layers`` means; all of them without it.

    Raises:
        UsageError: a layer that the store does not hold.
    """
    if layers is None or layers == "all":
        return list(store.manifest.hooks)
    stored = {layer_of(hook): hook for hook in store.manifest.hooks}
    text = ",".join(map(str, layers)) if isinstance(layers, list) else str(layers)
    chosen: dict[str, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"--layers {text}: expected all, or numbers such as 6, 0,3 or 0-3")
        low, high = int(first), int(last or first)
        inside = {layer for layer in stored if layer is not None and low <= layer <= high}
        if len(inside) != high - low + 1:
            held = ", ".join(str(layer) for layer in stored)
            raise UsageError(f"--layers {text}: {store.name} holds layers {held}; collect others with `nsae collect`")
        chosen |= {stored[layer]: None for layer in sorted(inside)}
    return list(chosen)


def default_name(store: ActivationStore, configs: Mapping[str, CellConfig]) -> str:
    """``{store}-L6-relu-none-HASH`` for one SAE, ``{store}-grid-HASH`` for several."""
    identity = {"store": store.manifest_sha256, "cells": {key: value.model_dump() for key, value in configs.items()}}
    digest = config_hash(identity)
    if len(configs) > 1:
        return f"{store.name}-grid-{digest}"
    [(cell, config)] = configs.items()
    return f"{store.name}-{cell}-{config.act}-{config.l2_norm}-{digest}"


def find_finished(plan: TrainPlan) -> list[dict[str, Any]] | None:
    """The run.json of every cell if all are complete, else None.

    Raises:
        UsageError: NAME holds SAEs of other options or other activations, finished or begun.
    """
    identity = plan.identity()
    begun = plan.checkpoints.configs()
    if begun is not None and begun != identity:
        _refuse(plan, begun.get("activations"), begun.get("cells", {}))
    ours = {plan.cell_folder(cell) for cell in plan.configs}
    finished = {mark.parent for mark in (*plan.folder.glob(RUN), *plan.folder.glob(f"*/{RUN}"))}
    if finished - ours:
        raise UsageError(f"--name {plan.name} holds the SAEs of another grid; choose another --name")
    runs = {
        cell: commit.read_json(plan.cell_folder(cell) / RUN)
        for cell in plan.configs
        if plan.cell_folder(cell) in finished
    }
    for cell, run in runs.items():
        if run.get("config") != identity["cells"][cell] or run["inputs"]["activations"] != identity["activations"]:
            _refuse(plan, run["inputs"]["activations"], {cell: run.get("config", {})})
    return list(runs.values()) if len(runs) == len(plan.configs) else None


def _refuse(plan: TrainPlan, activations: Any, cells: Mapping[str, Any]) -> None:
    identity = plan.identity()
    if activations != identity["activations"]:
        old = activations.get("name") if isinstance(activations, dict) else activations
        raise UsageError(
            f"--name {plan.name} belongs to the activations {old!r}, now given {plan.store.name!r} "
            f"(or the store has changed); choose another --name"
        )
    for cell, config in cells.items():
        if cell in identity["cells"] and config != identity["cells"][cell]:
            changes = describe_changes(config, identity["cells"][cell])
            raise UsageError(f"--name {plan.name} exists with other options ({changes}); choose another --name")
    raise UsageError(f"--name {plan.name} exists with another grid; choose another --name")

"""What a training run is to make and where, and whether it is there already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from nsae_cli import catalogue
from nsae_cli.store import commit
from nsae_cli.store.sae_folder import RUN
from nsae_cli.store.seal import CHECKSUM
from nsae_cli.store.shards import describe_changes
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name, config_hash
from nsae_cli.training.checkpoint import Checkpoints
from nsae_cli.training.found_alpha import with_found_alphas
from nsae_cli.training.options import CellConfig, TrainOptions, expand_cells, layer_of
from nsae_cli.training.source import TrainingSource

GROUP = "group.json"
#: Key of begun.json: where the run was begun. No part of what it is.
ENVIRONMENT = "environment"
#: Key of begun.json: what the trackers of `--log-to` know the SAEs as. No part of what they are.
TRACKERS = "trackers"


@dataclass(frozen=True)
class TrainPlan:
    """The cells of a run, by name, and their place.

    Attributes:
        name: NAME of the result; cells of a grid are NAME/CELL.
        folder: ``saes/NAME``.
        configs: one per cell; all have the same number of steps and the same batch size.
        source: where the rows come from.
    """

    name: str
    folder: Path
    configs: dict[str, CellConfig]
    source: TrainingSource

    @property
    def steps(self) -> int:
        """Optimizer steps of every cell."""
        return next(iter(self.configs.values())).steps

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return next(iter(self.configs.values())).batch_size

    @property
    def largest_product(self) -> int:
        """Multiplications of one matrix product in a step of the largest cell: batch · d_in · d_sae."""
        return self.batch_size * self.source.d_in * max(config.d_sae for config in self.configs.values())

    @property
    def hooks(self) -> list[str]:
        """The hooks that are trained on, in order."""
        return list(dict.fromkeys(config.hook for config in self.configs.values()))

    @property
    def checkpoints(self) -> Checkpoints:
        """Where the run's checkpoints are."""
        return Checkpoints(self.folder / "checkpoints")

    def unneeded_files(self) -> list[Path]:
        """What a run that was killed in its very last moment left, once every cell is complete."""
        folders = {self.folder, *map(self.cell_folder, self.configs)}
        checkpoints = [self.checkpoints.folder] if self.checkpoints.folder.exists() else []
        return [*checkpoints, *(path for folder in sorted(folders) for path in commit.leftovers(folder))]

    def cell_folder(self, cell: str) -> Path:
        """Where a cell is saved: the run's own folder if it is the only one."""
        return self.folder if len(self.configs) == 1 else self.folder / cell

    def artifact(self, cell: str) -> Artifact:
        """A cell as an artifact."""
        name = self.name if len(self.configs) == 1 else f"{self.name}/{cell}"
        return Artifact(Kind.SAE, name, self.cell_folder(cell))

    def identity(self) -> dict[str, Any]:
        """What determines the result: the inputs and every cell's configuration."""
        return {
            **self.source.inputs,
            "cells": {cell: config.model_dump() for cell, config in self.configs.items()},
        }


def make_plan(options: TrainOptions, source: TrainingSource, workspace: Workspace, name: str | None) -> TrainPlan:
    """Resolves options to cells and a name.

    Raises:
        UsageError: refused or impossible options, a bad name, a source without rows or one that needs ``--tokens``.
    """
    configs = expand_cells(options, source.hooks, source.d_in, source.epoch_rows(options.tokens) or 0)
    if options.alpha_from is not None:
        configs = with_found_alphas(configs, options.alpha_from, workspace)
    name = check_name(name) if name else default_name(source, configs)
    return TrainPlan(name, workspace.folder(Kind.SAE, name), configs, source)


def default_name(source: TrainingSource, configs: Mapping[str, CellConfig]) -> str:
    """``{source}-L6-relu-none-HASH`` for one SAE, ``{source}-grid-HASH`` for several."""
    digest = config_hash(source.name_key | {"cells": {key: value.model_dump() for key, value in configs.items()}})
    # The folder of a store made elsewhere may be called anything.
    base = re.sub(r"[^A-Za-z0-9_.\-]+", "_", source.name).lstrip("._-")[:60] or "store"
    if len(configs) > 1:
        return f"{base}-grid-{digest}"
    [(cell, config)] = configs.items()
    return f"{base}-{cell}-{config.act}-{config.l2_norm}-{digest}"


def find_finished(plan: TrainPlan) -> dict[str, dict[str, Any]]:
    """The run.json of every cell that is complete.

    Raises:
        UsageError: NAME holds SAEs of other options or other activations, finished or begun.
        ArtifactError: a run.json is damaged.
    """
    identity = plan.identity()
    for earlier in (plan.checkpoints.configs(), _read_group(plan.folder)):
        if earlier is not None and not _same(earlier, identity):
            _refuse(plan, _inputs(earlier), _with_later_options(earlier.get("cells")))
    found = {mark.parent: commit.read_json(mark) for mark in (*plan.folder.glob(RUN), *plan.folder.glob(f"*/{RUN}"))}
    for folder, run in found.items():
        if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
            raise catalogue.NOT_AN_ARTIFACT(f"{folder / RUN} is not an SAE's; choose another --name")
    ours = {plan.cell_folder(cell): cell for cell in plan.configs}
    for folder, run in found.items():
        inputs = run.get("inputs") or {}
        cell = ours.get(folder)
        if cell is None or inputs != plan.source.inputs or _full(run["config"]) != identity["cells"][cell]:
            _refuse(plan, inputs, {path.name: _full(other["config"]) for path, other in found.items()})
    return {cell: found[folder] for folder, cell in ours.items() if folder in found}


def _read_group(folder: Path) -> dict[str, Any] | None:
    path = folder / GROUP
    group = commit.read_json(path) if path.is_file() else None
    return group if isinstance(group, dict) else None


def _same(earlier: dict[str, Any], identity: dict[str, Any]) -> bool:
    known = earlier | {"cells": _with_later_options(earlier.get("cells"))}
    return all(known.get(key) == value for key, value in identity.items())


def _with_later_options(cells: Any) -> Any:
    return {name: _full(config) for name, config in cells.items()} if isinstance(cells, dict) else cells


def _full(config: Any) -> Any:
    """A recorded configuration with the defaults of options that nsae has got since; what is none, as it is."""
    try:
        return CellConfig.model_validate(config).model_dump()
    except ValidationError:
        return config


def _inputs(earlier: dict[str, Any]) -> dict[str, Any]:
    """The inputs in an identity, or in a group.json."""
    others = ("cells", "format_version", CHECKSUM, ENVIRONMENT, TRACKERS)
    return {key: value for key, value in earlier.items() if key not in others}


def _refuse(plan: TrainPlan, inputs: dict[str, Any], cells: Any) -> NoReturn:
    """Says in what the run that holds the name differs from the one that is asked for."""
    if inputs != plan.source.inputs:
        changes = plan.source.changes_from(inputs)
        how = f"other rows ({changes})" if changes is not None else f"another kind of input, now {plan.source.label}"
        raise catalogue.NAME_TAKEN(f"--name {plan.name} belongs to {how}; choose another --name")
    old_cells = list(cells.values()) if isinstance(cells, dict) else []
    changes = describe_changes(_spanned(old_cells), _spanned(plan.identity()["cells"].values()))
    finished = next(plan.folder.glob(f"**/{RUN}"), None)
    anew = "" if finished else f", or delete {plan.folder} to begin again"
    raise catalogue.OPTIONS_CHANGED(
        f"--name {plan.name} exists with other options ({changes}); choose another --name{anew}"
    )


def _spanned(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The values that each option takes over the cells of a grid: one value, or a list. Hooks count as --layers."""
    values: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for key, value in cell.items():
            if key == "hook":
                layer = layer_of(str(value))
                key, value = "layers", value if layer is None else layer
            values.setdefault(key, {})[str(value)] = value
    return {key: next(iter(of.values())) if len(of) == 1 else list(of.values()) for key, of in values.items()}

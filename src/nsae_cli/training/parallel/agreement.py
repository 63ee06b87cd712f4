"""Before the first step: whether all processes are about to do the same."""

from __future__ import annotations

from typing import Any

import torch

from nsae_cli import catalogue
from nsae_cli.store.shards import describe_changes
from nsae_cli.training.environment import changes_of_environment, versions
from nsae_cli.training.parallel.ranks import Ranks
from nsae_cli.training.plan import TrainPlan


def refuse_differences(ranks: Ranks, plan: TrainPlan) -> None:
    """Compares software, threads, options and inputs of all processes with those of the first.

    Raises:
        UsageError: another version, number of threads, option or name, of the process that is named.
        ArtifactError: another content of the store under the same name.
    """
    if ranks.size == 1:
        return
    first, *others = ranks.of_all(_fingerprint(plan))
    for rank, other in enumerate(others, start=1):
        software = changes_of_environment(first["software"], other["software"])
        changed = [] if software is None else [software]
        old, new = first["cells"], other["cells"]
        if old != new:
            both = [cell for cell in old if cell in new]
            changed += [describe_changes(old[cell], new[cell]) for cell in both if old[cell] != new[cell]]
            changed += [] if both == [*new] == [*old] else [f"SAEs {', '.join(old)} -> {', '.join(new)}"]
        if first["name"] != other["name"]:
            changed.append(f"name {first['name']} -> {other['name']}")
        if changed:
            raise catalogue.RANKS_DIFFER(
                f"rank {rank} of {ranks.size} differs from rank 0: {', '.join(changed)}; start all with the same "
                f"command and the same installation"
            )
        if first["inputs"] != other["inputs"]:
            raise catalogue.RANKS_SEE_OTHERS(
                f"rank {rank} of {ranks.size} sees another content of {plan.source.label} than rank 0; give all "
                f"processes the same file system, and wait until it is the same everywhere"
            )


def _fingerprint(plan: TrainPlan) -> dict[str, Any]:
    identity = plan.identity()
    cells = identity.pop("cells")
    software = {**versions(), "threads": torch.get_num_threads()}
    return {"name": plan.name, "software": software, "cells": cells, "inputs": identity}

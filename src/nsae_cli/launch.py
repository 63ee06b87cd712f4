"""Which part of a job is this process's own, as a launcher (torchrun, srun) says in the environment.

nsae starts no processes of its own for this: the same command is started N times by an existing launcher.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """This process among those of its job.

    Attributes:
        rank: number of this process, 0-based.
        world: how many there are.
        local_rank: number of this process on its machine, which chooses its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0


#: Rank, world size and local rank as each launcher names them. srun's own step variables, not those of the
#: allocation: a command that a batch script runs without srun is one process, however large the allocation.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def placement(environment: Mapping[str, str] = os.environ) -> Placement:
    """Where torchrun or srun has put this process; the only one of its job where neither says so."""
    for rank, world, local_rank in _LAUNCHERS:
        if rank in environment and world in environment:
            return Placement(int(environment[rank]), int(environment[world]), int(environment.get(local_rank, 0)))
    return Placement()

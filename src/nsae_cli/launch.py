"""Which part of a job is this process's own, as a launcher (torchrun, srun) says in the environment.

nsae starts no processes of its own for this: the same command is started N times by an existing launcher.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nsae_cli import catalogue


@dataclass(frozen=True)
class Placement:
    """This process among those of its job. As text it is ``rank/world``.

    Attributes:
        rank: number of this process, 0-based.
        world: how many there are.
        local_rank: number of this process on its machine, which chooses its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def __str__(self) -> str:
        return f"{self.rank}/{self.world}"

    @property
    def alone(self) -> bool:
        """Whether this process is the only one."""
        return self.world == 1

    def owns(self, unit: int) -> bool:
        """Whether a unit of work is this process's: they are dealt out like cards."""
        return unit % self.world == self.rank


#: The only process of its job.
ALONE = Placement()

#: Rank, world size and local rank as each launcher names them. srun's own step variables, not those of the
#: allocation: a command that a batch script runs without srun is one process, however large the allocation.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
_SHARE = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


def placement(environment: Mapping[str, str] = os.environ) -> Placement:
    """Where torchrun or srun has put this process; the only one of its job where neither says so.

    Raises:
        UsageError: the variables are there, but make no place in a job.
    """
    for names in _LAUNCHERS:
        rank, world, local_rank = (environment.get(name) for name in names)
        if rank is None or world is None:
            continue
        numbers = [int(text) if text.isdecimal() else -1 for text in (rank, world, local_rank or "0")]
        if not 0 <= numbers[0] < numbers[1] or numbers[2] < 0:
            said = " ".join(f"{name}={environment.get(name, '')[:20]}" for name in names)
            raise catalogue.OPTION_VALUE(
                f"{said} in the environment is no place in a job; check the launcher, or unset them"
            )
        return Placement(*numbers)
    return ALONE


def worker_of(option: str, environment: Mapping[str, str] = os.environ) -> Placement:
    """The place that ``--worker`` gives: ``auto`` (as the launcher says), ``off`` (alone) or ``I/N``.

    Raises:
        UsageError: none of these.
    """
    if option == "auto":
        return placement(environment)
    if option == "off":
        return ALONE
    found = _SHARE.fullmatch(option)
    if found is None or int(found[1]) >= int(found[2]):
        raise catalogue.OPTION_VALUE(
            f"--worker {option[:40]}: expected auto, off, or I/N with I from 0 to N - 1, such as 0/4"
        )
    return Placement(int(found[1]), int(found[2]), placement(environment).local_rank)

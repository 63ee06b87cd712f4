"""Which part of a job is this process's own."""

from __future__ import annotations

import pytest

from nsae_cli.errors import UsageError
from nsae_cli.launch import ALONE, Placement, placement, worker_of

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        (TORCHRUN, Placement(5, 8, 1)),
        (SRUN, Placement(2, 3, 0)),
        (SRUN | TORCHRUN, Placement(5, 8, 1)),  # torchrun inside of an srun step
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "64"}, ALONE),  # a batch script without srun
    ],
)
def test_the_launcher_says_where(environment: dict[str, str], expected: Placement) -> None:
    assert placement(environment) == expected
    assert worker_of("auto", environment) == expected
    assert worker_of("off", environment) == ALONE


def test_an_explicit_share_keeps_the_place_on_the_machine() -> None:
    assert worker_of("6/7", {}) == Placement(6, 7, 0)
    assert worker_of("6/7", TORCHRUN) == Placement(6, 7, 1)
    assert worker_of("0/1", {}).alone


@pytest.mark.parametrize("option", ["7/7", "1", "a/b", "-1/3", "1/0", "", "1/3/5", "１/３"])
def test_no_share(option: str) -> None:
    with pytest.raises(UsageError, match=r"--worker .*: expected auto, off, or I/N"):
        worker_of(option, {})


@pytest.mark.parametrize("changes", [{"RANK": "8"}, {"RANK": "x"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "-1"}])
def test_an_environment_that_makes_no_sense(changes: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"RANK=.* WORLD_SIZE=.* LOCAL_RANK=.* in the environment"):
        placement(TORCHRUN | changes)


def test_units_are_dealt_out_like_cards() -> None:
    owned = [[unit for unit in range(10) if Placement(rank, 3).owns(unit)] for rank in range(3)]
    assert owned == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert all(ALONE.owns(unit) for unit in range(5))

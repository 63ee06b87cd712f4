"""Disks that are full, limited or broken: a share of what `make torture` tries."""

from __future__ import annotations

import errno
from pathlib import Path

import full_disk
import pytest
from forked import Server
from stages import Prepared, Stages


@pytest.mark.parametrize(("stage", "every"), [("collect", 37), ("train", 90), ("norms", 30)])
def test_disk_full_at_an_operation(server: Server, stages: Stages, folder: Path, stage: str, every: int) -> None:
    prepared = stages.get(stage)
    points = range(3, len(prepared.undisturbed.operations) + 1, every)
    full_disk.fail_at_every_operation(server, prepared, folder, points=points).require()


def test_a_disk_that_fails_once(server: Server, trained: Prepared, folder: Path) -> None:
    points = range(10, len(trained.undisturbed.operations), 110)
    full_disk.fail_at_every_operation(server, trained, folder, lasting=False, points=points).require()


@pytest.mark.parametrize("stage", ["collect", "train"])
def test_a_flush_that_fails_is_not_taken_for_done(server: Server, stages: Stages, folder: Path, stage: str) -> None:
    flushes = sum(operation.kind == "fsync" for operation in stages.get(stage).undisturbed.operations)
    full_disk.fail_at_every_operation(
        server, stages.get(stage), folder, errno.EIO, kinds=["fsync"], lasting=False, points=range(2, flushes, 30)
    ).require()


@pytest.mark.parametrize("stage", ["collect", "train"])
def test_a_file_system_that_becomes_full(server: Server, stages: Stages, folder: Path, stage: str) -> None:
    full_disk.fill_small_file_systems(server, stages.get(stage), folder, sizes=3).require()


def test_a_limit_on_the_size_of_files(server: Server, trained: Prepared, folder: Path) -> None:
    tally = full_disk.limit_file_size(server, trained, folder, sizes=[4096, 12_000])
    tally.require()
    assert not tally.counts["fitted"]

"""SIGINT and SIGTERM, and processes in each other's way: a share of what `make torture` tries."""

from __future__ import annotations

from pathlib import Path

import pytest
import races
import signals
from forked import Server
from stages import Prepared, Stages


@pytest.mark.parametrize("number", range(len(signals.PHASES)), ids=[phase.name for phase in signals.PHASES])
def test_a_signal_in_each_phase(server: Server, stages: Stages, folder: Path, number: int) -> None:
    phase, signum = signals.PHASES[number], signals.BOTH[number % 2]
    [tally] = signals.signal_phases(server, stages, folder, [phase], each=1, signums=[signum])
    tally.require()


def test_signal_to_the_whole_group(server: Server, stages: Stages, folder: Path) -> None:
    [step] = [phase for phase in signals.PHASES if phase.name == "train step"]
    [tally] = signals.signal_phases(server, stages, folder, [step], each=1, signums=signals.BOTH[1:], threads=2)
    tally.require()
    assert tally.counts["with a checkpoint at the current step"] == 1


def test_a_second_signal(server: Server, stages: Stages, folder: Path) -> None:
    signals.signal_twice(server, stages, folder, trials=2).require()


@pytest.mark.parametrize("stage", ["collect", "train"])
def test_two_processes_on_one_folder(server: Server, stages: Stages, folder: Path, stage: str) -> None:
    tally = races.race_for_one_folder(server, stages.get(stage), folder, races=2)
    tally.require()
    assert tally.counts["told that the folder is busy"] == 2


def test_training_on_a_store_that_is_being_collected(server: Server, stages: Stages, folder: Path) -> None:
    races.read_while_it_is_written(server, stages, folder, races=2).require()


def test_a_stage_is_not_signalled_where_it_has_no_such_phase(collect: Prepared) -> None:
    """Every phase is met in the stage that stands for it: else its tests would try nothing."""
    assert not [fields for fields in collect.undisturbed.of("phase") if fields == ("train step",)]


def test_every_phase_is_met(stages: Stages) -> None:
    for phase in signals.PHASES:
        assert (phase.name,) in stages.get(phase.stage).undisturbed.of("phase"), phase

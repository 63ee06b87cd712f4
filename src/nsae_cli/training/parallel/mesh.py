"""How the processes of a job share an SAE's training: ``--parallel``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from nsae_cli import catalogue

_DATA_BY_FEATURES = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


def _is_a_mesh(option: str) -> str:
    if option not in ("auto", "data", "features") and not _DATA_BY_FEATURES.fullmatch(option):
        raise ValueError("expected auto, data, features, or DATAxFEATURES such as 2x4")
    return option


#: ``auto``, ``data``, ``features`` or ``DATAxFEATURES``.
ParallelOption = Annotated[str, AfterValidator(_is_a_mesh)]


@dataclass(frozen=True)
class Mesh:
    """Processes in a rectangle: those in a row have the same rows of a batch, those in a column the same features.

    Rank r has part r // features of the rows and part r % features of the features: processes that share rows, which
    talk most, are neighbours.

    Attributes:
        data: into how many parts every batch is cut.
        features: into how many parts the features are cut.
    """

    data: int = 1
    features: int = 1

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.data * self.features

    def place(self, rank: int) -> tuple[int, int]:
        """Which part of the rows and which of the features a rank has."""
        return divmod(rank, self.features)

    def __str__(self) -> str:
        """``1 process``, ``4 processes (data)``, ``4 processes (2 data x 2 features)``."""
        if self.size == 1:
            return "1 process"
        both = f"{self.data} data x {self.features} features"
        return f"{self.size} processes ({'data' if self.features == 1 else 'features' if self.data == 1 else both})"


#: One process.
ONE = Mesh()


def mesh_of(option: ParallelOption, world: int) -> Mesh:
    """The mesh of ``--parallel`` over so many processes; ``auto`` is data.

    Raises:
        UsageError: it needs another number of processes.
    """
    found = _DATA_BY_FEATURES.fullmatch(option)
    if found is None:
        return Mesh(features=world) if option == "features" else Mesh(data=world)
    mesh = Mesh(int(found[1]), int(found[2]))
    if mesh.size != world:
        start = f"torchrun --nproc-per-node {mesh.size} --no-python nsae train"
        there_are = "this is" if world == 1 else "there are"
        raise catalogue.REFUSED_COMBINATION(
            f"--parallel {option} is for {mesh.size} processes, and {there_are} {world}; "
            f"start them with `{start}`, or leave the option out"
        )
    return mesh

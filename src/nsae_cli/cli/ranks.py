"""Several processes of one command: where they meet, and which of them speaks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from nsae_cli.cli import failures
from nsae_cli.errors import RankEnded, UsageError
from nsae_cli.launch import placement

if TYPE_CHECKING:  # the command imports torch once its options are known
    from nsae_cli.training.options import TrainOptions
    from nsae_cli.training.parallel.ranks import Ranks


Options = TypeVar("Options", bound="TrainOptions")


@contextlib.contextmanager
def together(options: Options) -> Iterator[tuple[Options, Ranks]]:
    """The processes that a launcher has started with this command, and the options of this one.

    One failure is one line: of what all of them fail with the first speaks; of anything else the process that fails,
    with its rank, or whoever finds that another is gone.
    """
    from nsae_cli.training.parallel.group import PeerLostError
    from nsae_cli.training.parallel.joining import device_of, joined
    from nsae_cli.training.parallel.mesh import mesh_of

    here = placement()
    mesh, device = mesh_of(options.parallel, here.world), device_of(options.device, here)
    timeout = float(options.rank_timeout.removesuffix("s"))
    with joined(mesh, here, device, timeout) as job:
        try:
            yield options.model_copy(update={"device": device}), job.ranks
        except PeerLostError as error:
            assert job.watch is not None
            if (lost := job.watch.peer_lost(str(error))) is not None:
                raise lost from error
            raise RankEnded(failures.EXIT_RESOURCE, None) from error
        except BaseException as error:
            if job.watch is None:
                raise
            code, message = failures.describe(error)
            ended = RankEnded(code, job.watch.fails(message or ""))
            ended.entry = getattr(failures.translated(error), "entry", None)
            raise ended from error


def speaks_of(error: BaseException, arguments: list[str]) -> bool:
    """Whether this process says what went wrong: of wrong usage, which all that train see, the first does."""
    if "train" not in arguments or not isinstance(failures.translated(error), UsageError):
        return True
    try:
        return placement().rank == 0
    except UsageError:
        return True

"""Which device computes, and why."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import AfterValidator

from nsae_cli import catalogue

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?|mps")


def _is_a_device(option: str) -> str:
    if not _DEVICE.fullmatch(option):
        raise ValueError("expected auto, cpu, cuda, cuda:N or mps")
    return option


#: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
DeviceOption = Annotated[str, AfterValidator(_is_a_device)]


def choose_device(option: DeviceOption) -> tuple[torch.device, str]:
    """The device of ``--device`` and the reason to print; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ResourceError: the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if option == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
        passed_over = [name.upper() for name in ("cuda", "mps") if not available[name]]
        why = f"no {' and no '.join(passed_over)}" if device == "cpu" else "the fastest that is there"
        return torch.device(device), f"{_describe(device)} (--device auto: {why})"
    kind, _, index = option.partition(":")
    if not available[kind]:
        raise catalogue.DEVICE_MISSING(
            f"--device {option}: torch {torch.__version__} finds no such device here; use --device cpu"
        )
    if index and int(index) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise catalogue.DEVICE_MISSING(
            f"--device {option}: there are cuda:0 to cuda:{last}; use one of these or --device cpu"
        )
    return torch.device(option), f"{_describe(option)} (--device {option})"


#: Multiplications of one matrix product up to which one thread is faster than several: waiting at the barriers costs
#: more than half of such a product. Where other programs use the same cores, several threads are many times slower.
SMALL_PRODUCT = 2**28


#: How many threads torch had before the outermost `one_thread_if_small` took them, while it is in force.
_before: int | None = None


@contextlib.contextmanager
def one_thread_if_small(product: int, device: torch.device) -> Iterator[int]:
    """Sets torch to one thread for work whose largest matrix product is small, and back afterwards.

    Inside such work, larger work (a model that is run while small SAEs train) gets all threads again.

    Args:
        product: multiplications of the largest product.
        device: where it runs; on a GPU nothing changes.

    Yields:
        How many such pieces of work can run side by side: the number of threads that were taken from torch, else 1.
    """
    global _before
    now = torch.get_num_threads()
    outer, everything = _before, _before or now
    wanted = 1 if product <= SMALL_PRODUCT else everything
    if device.type != "cpu" or wanted == now:
        yield 1
        return
    torch.set_num_threads(wanted)
    _before = everything
    try:
        yield everything if wanted == 1 else 1
    finally:
        torch.set_num_threads(now)
        _before = outer


def _describe(device: str) -> str:
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device) if ":" in device else torch.cuda.get_device_name()
        return f"{device}: {name}"
    threads = torch.get_num_threads()
    return f"cpu: {threads} thread{'' if threads == 1 else 's'}" if device == "cpu" else device

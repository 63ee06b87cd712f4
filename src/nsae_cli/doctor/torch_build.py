"""torch: whether it can be imported, how it was built, and what it makes of the processor."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from nsae_cli.doctor.check import Check, note, ok, problem, reason
from nsae_cli.doctor.machine import usable_cores


@functools.cache
def torch_problem() -> str | None:
    """Why torch cannot be imported; None where it can."""
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken library raises what it likes
        return reason(error)
    return None


def look_at_torch() -> Iterator[Check]:
    """Build, instruction set, threads."""
    if (why := torch_problem()) is not None:
        yield problem("build", f"cannot be imported: {why}", "install it again: pip install torch", fatal=True)
        return
    import torch

    from nsae_cli.kernels import certified

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if getattr(torch.version, "hip", None):
        kind = f"ROCm {torch.version.hip}"
    yield ok("build", f"{torch.__version__}, built with {kind}", version=torch.__version__, cuda=torch.version.cuda)
    level, bf16 = str(torch.backends.cpu.get_cpu_capability()), certified.has_bf16_products()
    found = f"{level}, {'bf16 products in hardware' if bf16 else 'no bf16 products in hardware'}"
    yield ok("instructions", found, instruction_set=level, bf16_products=bf16)
    yield _threads(torch.get_num_threads())


def _threads(threads: int) -> Check:
    usable = usable_cores()
    if threads > max(1.0, usable):
        remedy = f"more threads than cores are slower: set OMP_NUM_THREADS={max(1, int(usable))}"
        return note("threads", f"{threads}, with {usable:g} cores to use", remedy, threads=threads)
    return ok("threads", str(threads), threads=threads)

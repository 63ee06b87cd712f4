"""GPUs: what the machine has, what torch can use of it, and which device ``--device auto`` takes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nsae_cli.doctor.check import Check, note, ok, problem, reason
from nsae_cli.doctor.torch_build import torch_problem
from nsae_cli.report.format import size_in_bytes

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def look_at_devices() -> Iterator[Check]:
    """--device auto, CUDA and each of its devices, Triton, MPS."""
    if torch_problem() is not None:
        yield note("devices", "not known without torch", "see torch")
        return
    import torch

    from nsae_cli.device import choose_device

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        device, why = choose_device("auto")
    yield ok("--device auto", why, device=str(device))
    yield _cuda(torch, available, [str(warning.message) for warning in said])
    if available:
        for index in range(torch.cuda.device_count()):
            yield _cuda_device(torch, index)
        yield _triton()
    mps = torch.backends.mps
    if mps.is_built():
        yield ok("mps", "there" if mps.is_available() else "built in, no device", available=mps.is_available())


def _driver() -> str | None:
    """The version of NVIDIA's kernel module, or None."""
    try:
        line = _NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[:1].isdigit() and "." in word), line.strip()[:80])


def _cuda(torch: Any, available: bool, said: list[str]) -> Check:
    driver = _driver()
    values: dict[str, Any] = {
        "available": available,
        "driver": driver,
        "count": torch.cuda.device_count() if available else 0,
    }
    shown = f"driver {driver}" if driver else "no NVIDIA driver"
    if available:
        count = values["count"]
        return ok("cuda", f"{count} device{'' if count == 1 else 's'}, {shown}, CUDA {torch.version.cuda}", **values)
    if driver is None:
        return ok("cuda", f"none ({shown})", **values)
    if torch.version.cuda is None:
        remedy = "install a torch that is built with CUDA, see pytorch.org; until then everything runs on the CPU"
        return problem("cuda", f"{shown}, but this torch is built without CUDA", remedy, **values)
    why = said[0].splitlines()[0][:200] if said else "torch gives no reason"
    remedy = "check nvidia-smi, CUDA_VISIBLE_DEVICES and whether the driver is new enough for this torch"
    return problem("cuda", f"{shown}, but torch finds no device: {why}", remedy, **values)


def _cuda_device(torch: Any, index: int) -> Check:
    name = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except Exception as error:  # out of memory, a device that another program holds, a broken driver
        remedy = "end the programs that use it (nvidia-smi shows them), or choose another --device"
        return problem(name, f"cannot be used: {reason(error)}", remedy)
    capability = f"{properties.major}.{properties.minor}"
    values = {"name": properties.name, "capability": capability, "free": free, "total": total}
    found = f"{properties.name}, compute capability {capability}"
    found += f", {size_in_bytes(free)} of {size_in_bytes(total)} free"
    if properties.major < 8:
        return note(name, found, "it has no bf16 products: choose --precision fp32 and --model-dtype fp32", **values)
    if free < total // 4:
        return note(name, found, "another program holds most of its memory (nvidia-smi shows which)", **values)
    return ok(name, found, **values)


def _triton() -> Check:
    if find_spec("triton") is not None:
        return ok("triton", "there", available=True)
    return note("triton", "not installed: dense steps only on CUDA", "pip install triton", available=False)

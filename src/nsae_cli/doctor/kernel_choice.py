"""The compiled loops, the compiler, and which kernel a training run would step with here."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nsae_cli.doctor.check import Check, note, ok, problem, reason
from nsae_cli.doctor.torch_build import torch_problem
from nsae_cli.report.format import plain_percent

if TYPE_CHECKING:
    import torch

#: The shape for which the cross-over is told: an SAE of GPT-2 small with the default expansion.
_D_IN, _D_SAE = 768, 6144
_COMPILER_SECONDS = 1.0
_REINSTALL = "install a C compiler and then nsae again (pip install --force-reinstall --no-deps nsae)"


def look_at_kernels() -> Iterator[Check]:
    """Compiler, compiled loops, certified encoder, --kernel auto, cross-overs."""
    compiler = _compiler()
    yield compiler
    if torch_problem() is not None:
        yield note("--kernel auto", "not known without torch", "see torch")
        return
    from nsae_cli.device import choose_device
    from nsae_cli.kernels import certified
    from nsae_cli.kernels.native import library
    from nsae_cli.kernels.select import choose

    yield _loops()
    loops, bf16 = library.load(), certified.has_bf16_products()
    if loops is None:
        yield ok("certified encoder", "not available on the CPU without the compiled loops", available=False)
    else:
        speed = "fast: bf16 products in hardware" if bf16 else "available, slow without bf16 products in hardware"
        yield ok("certified encoder", f"{speed}{'' if bf16 else '; --precision auto takes fp32'}", available=True)
    device, _ = choose_device("auto")
    choice = choose("auto", "auto", device)
    yield ok("--kernel auto", f"{choice.name} on {device}: {choice.reason}", kernel=choice.name, kind=choice.kind)
    yield _crossovers(device, choice.kind)


def _compiler() -> Check:
    """Of C: needed while nsae is installed, and by Triton on CUDA."""
    named = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    for command in (shlex.split(str(named))[:1] or ["cc"], ["cc"], ["gcc"], ["clang"]):
        if (path := shutil.which(command[0])) is None:
            continue
        try:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, check=False, timeout=_COMPILER_SECONDS
            )
        except (OSError, subprocess.SubprocessError) as error:
            return note("compiler", f"{path} does not run: {reason(error)}", path=path)
        version = next(iter(done.stdout.splitlines()), "").strip()
        return ok("compiler", version or path, path=path, version=version)
    return ok("compiler", "no C compiler (needed to install nsae from source, and by Triton)", path=None)


def _loops() -> Check:
    from nsae_cli.kernels.native import library

    files = library.library_files()
    if (loops := library.load()) is not None:
        return ok("compiled loops", loops.isa, instruction_set=loops.isa, files=[file.name for file in files])
    slower = "sparse steps use torch's own products, which is slower"
    if not files:
        return note("compiled loops", f"not in this installation: {slower}", _REINSTALL, instruction_set=None, files=[])
    whys = []
    for file in files:
        try:
            library.open_library(file)
        except OSError as error:
            whys.append(f"{file.name}: {(str(error).splitlines() or ['no reason given'])[0][:160]}")
    found = f"cannot be used ({'; '.join(whys)}): {slower}"
    return problem(
        "compiled loops", found, _REINSTALL, instruction_set=None, files=[file.name for file in files], reasons=whys
    )


def _crossovers(device: torch.device, kind: str) -> Check:
    """Where the density comes from at which dense and sparse steps change places."""
    from nsae_cli.kernels import calibration

    path = calibration.cache_file()
    points = calibration.load_points()
    here = [p for p in points if (p.machine, p.kind) == (calibration.machine(device), kind)]
    density = calibration.crossover(kind, device, _D_IN, _D_SAE)
    values = {"file": str(path), "points": len(points), "of_this_machine": len(here), "density": density}
    where = f"{_D_IN} × {_D_SAE:,}"
    used = "none for this device" if density is None else f"sparse below {plain_percent(density)} active, {where}"
    measure = "nsae bench --calibrate measures this machine's own"
    if not path.is_file():
        return ok("cross-over", f"{used}: the default; {measure}", **values)
    age = max(0.0, time.time() - path.stat().st_mtime) / 86400
    values["age_days"] = round(age, 2)
    if not points:
        return note("cross-over", f"{used}: the default; {path} cannot be read", f"delete it; {measure}", **values)
    if not here:
        found = f"{used}: the default; {path} is of another processor, number of threads or torch"
        return note("cross-over", found, measure, **values)
    return ok("cross-over", f"{used}: measured here {age:.0f} days ago, {path}", **values)

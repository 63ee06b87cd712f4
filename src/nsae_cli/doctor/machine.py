"""Operating system, processor, memory and the limits under which this process runs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from nsae_cli.doctor.check import Check, note, ok
from nsae_cli.kernels.processor import processor_flags, processor_name
from nsae_cli.report.format import size_in_bytes as size_text

_LITTLE_MEMORY = 2**30
_FEW_FILES = 128
#: Those that decide how fast the kernels are.
_INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
_CGROUP = Path("/sys/fs/cgroup")


def look_at_machine() -> Iterator[Check]:
    """System, processor, cores, memory, limits."""
    yield ok("system", platform.platform(), system=platform.system(), machine=platform.machine())
    yield _processor()
    yield _cores()
    yield _memory()
    yield from _limits()


def _processor() -> Check:
    name = processor_name() or platform.machine()
    sets = [flag for flag in _INSTRUCTION_SETS if flag in processor_flags()]
    return ok("processor", f"{name}, {' '.join(sets) or 'instruction sets unknown'}", name=name, instruction_sets=sets)


def _cores() -> Check:
    cores = os.cpu_count() or 1
    usable = usable_cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    values = {"cores": cores, "usable": usable, "load": load}
    found = str(cores) if usable == cores else f"{cores}, of which this process may use {usable:g}"
    if load is not None:
        found += f", load {load:.1f}"
        if load > cores + 0.5:
            return note("cores", found, "other programs use these cores: expect slower runs", **values)
    return ok("cores", found, **values)


def usable_cores() -> float:
    """Cores that affinity and control group leave to this process."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _processor_quota() or allowed)


def _cgroup_texts(v2: str, v1: str) -> Iterator[str]:
    """A control file's content in every group that this process is in, the root's included."""
    groups = [_CGROUP]
    try:
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                group = _CGROUP / path.lstrip("/")
                groups += [group, *(parent for parent in group.parents if _CGROUP in parent.parents)]
    except (OSError, ValueError):
        pass
    for file in (*(group / v2 for group in groups), _CGROUP / v1):
        try:
            yield file.read_text(encoding="utf-8").strip()
        except OSError:
            continue


def _processor_quota() -> float | None:
    """Cores that the control group grants, or None for all."""
    quotas = []
    for text in _cgroup_texts("cpu.max", "cpu/nothing"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory_limit() -> int | None:
    """Bytes that the control group grants, or None for all."""
    texts = _cgroup_texts("memory.max", "memory/memory.limit_in_bytes")
    limits = [int(text) for text in texts if text.isdigit()]
    return min((limit for limit in limits if limit < 2**60), default=None)


def _memory() -> Check:
    total, available = _system_memory()
    limit = _memory_limit()
    values = {"total": total, "available": available, "cgroup_limit": limit}
    if total is None:
        return note("memory", "unknown", **values)
    found = f"{size_text(total)}" + ("" if available is None else f", {size_text(available)} available")
    if limit is not None and limit < total:
        found += f"; this process's group may take {size_text(limit)}"
    if min(value for value in (available, limit, total) if value is not None) < _LITTLE_MEMORY:
        return note("memory", found, "little is left: lower --batch-size and --buffer, or end other programs", **values)
    return ok("memory", found, **values)


def _system_memory() -> tuple[int | None, int | None]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
        return sizes["MemTotal"], sizes.get("MemAvailable")
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (OSError, ValueError, AttributeError):
        return None, None


def _limits() -> Iterator[Check]:
    if sys.platform == "win32":
        return
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    unlimited = resource.RLIM_INFINITY
    values = {
        "open_files": None if files == unlimited else files,
        "file_size": None if size == unlimited else size,
        "address_space": None if space == unlimited else space,
    }
    parts = [f"{'any number of' if files == unlimited else files} open files"]
    parts += [] if size == unlimited else [f"files up to {size_text(size)}"]
    parts += [] if space == unlimited else [f"{size_text(space)} of address space"]
    found = ", ".join(parts)
    if files != unlimited and files < _FEW_FILES:
        yield note("limits", found, f"raise the number of open files: ulimit -n {4 * _FEW_FILES}", **values)
    elif size != unlimited:
        yield note("limits", found, "larger files cannot be written: ulimit -f unlimited", **values)
    else:
        yield ok("limits", found, **values)

"""nsae itself, Python, and the packages that nsae needs, by their installed metadata: nothing is imported."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import nsae_cli
from nsae_cli.doctor.check import Check, note, ok, problem, reason

_PACKAGE = Path(nsae_cli.__file__).resolve().parent
#: Beside those that nsae requires: parts of them that matter for downloads, tokens and kernels, and peers.
_ALSO = ("huggingface-hub", "tokenizers", "hf-xet", "triton", "sae-lens", "eai-sparsify")
_GIT_SECONDS = 1.0


def look_at_installation() -> Iterator[Check]:
    """Version, kind of installation, commit; Python."""
    yield _version()
    yield _python()


def _version() -> Check:
    version = nsae_cli.__version__
    kind, commit = _kind_and_commit()
    values = {"version": version, "installation": kind, "commit": commit, "folder": str(_PACKAGE)}
    found = f"{version}, {kind}" + (f", commit {commit}" if commit else "") + f", in {_PACKAGE}"
    installed = _installed_version()
    if installed not in (None, version):
        return note("version", f"{found}; installed as {installed}", "install nsae again: pip install .", **values)
    return ok("version", found, **values)


def _installed_version() -> str | None:
    try:
        return metadata.version("nsae")
    except metadata.PackageNotFoundError:
        return None


def _kind_and_commit() -> tuple[str, str | None]:
    """``editable``, ``installed``, ``installed from git`` or ``source folder``; the commit where it can be told."""
    root = _source_root()
    try:
        distribution = metadata.distribution("nsae")
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return "source folder, not installed", _commit_of(root)
    if root is not None:
        there = Path(unquote(urlparse(str(direct.get("url", ""))).path)).resolve() == root
        editable = there and bool(direct.get("dir_info", {}).get("editable"))
        return "editable" if editable else "source folder, not the installed one", _commit_of(root)
    vcs = direct.get("vcs_info", {})
    return ("installed from git", str(vcs["commit_id"])[:12]) if "commit_id" in vcs else ("installed", None)


def _source_root() -> Path | None:
    """The checkout that nsae runs from; None where it was copied into site-packages."""
    root = _PACKAGE.parents[1]
    return root if _PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file() else None


def _commit_of(root: Path | None) -> str | None:
    """``12 hex digits``, with ``changed`` where tracked files differ from it; None without git."""
    if root is None or not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}, changed" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=_GIT_SECONDS
    )
    return done.stdout.strip()


def _python() -> Check:
    version = platform.python_version()
    where = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    found = f"{version}, {platform.python_implementation()}, {where}, {sys.executable}"
    values: dict[str, Any] = {
        "version": version,
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
    }
    needed = _requirements()[1]
    if needed is not None:
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(needed).contains(version, prereleases=True):
            found += f"; nsae needs {needed}"
            return problem("python", found, "make an environment with such a Python", **values)
    return ok("python", found, **values)


def look_at_packages() -> Iterator[Check]:
    """Versions, and whether they are what nsae asks for."""
    from packaging.requirements import Requirement

    required, _ = _requirements()
    names = set()
    for text in required:
        requirement = Requirement(text)
        names.add(requirement.name.lower())
        yield _package(requirement.name, str(requirement.specifier))
    for name in _ALSO:
        if name not in names:
            yield from _also(name)


def _requirements() -> tuple[list[str], str | None]:
    """What nsae asks for: of the checkout that it runs from (an installation of it may be older), else as installed."""
    if (root := _source_root()) is not None:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return list(project["dependencies"]), project.get("requires-python")
    try:
        installed = metadata.metadata("nsae")
    except metadata.PackageNotFoundError:
        return [], None
    required = [text for text in installed.get_all("Requires-Dist") or [] if "extra ==" not in text]
    return required, next(iter(installed.get_all("Requires-Python") or []), None)


def _also(name: str) -> Iterator[Check]:
    with contextlib.suppress(metadata.PackageNotFoundError):
        yield ok(name, metadata.version(name), version=metadata.version(name))


def _package(name: str, wanted: str) -> Check:
    from packaging.specifiers import SpecifierSet

    install = f"pip install '{name}{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return problem(name, f"not installed; nsae needs {name}{wanted}", install, fatal=True, version=None)
    except Exception as error:  # damaged metadata
        return problem(name, f"its metadata cannot be read ({reason(error)})", f"{install} --force-reinstall")
    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        return problem(name, f"{version}; nsae needs {wanted}", install, version=version, wanted=wanted)
    return ok(name, version, version=version)

"""The work of `nsae verify`: re-checks artifacts from their bytes and, with --repair, drops what is damaged.

Dropping means that the command which made the artifact makes it again, and only what was damaged of it: a store goes
back to where its damaged shards are missing, a training run loses its damaged checkpoints, and any other artifact loses
its completion mark.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsae_cli import catalogue, interrupt
from nsae_cli.analysis.verify_kinds import CHECKPOINTS, check_group, check_result
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.findings import Check, Finding
from nsae_cli.store.manifest import MANIFEST
from nsae_cli.store.progress import PROGRESS, progress_files
from nsae_cli.store.remote.places import drop_copy, is_url, without_secrets
from nsae_cli.store.shards import shards_text
from nsae_cli.store.verify import StoreCheck, check_store, config_of, drop_damaged_shards
from nsae_cli.store.workspace import Kind, Workspace
from nsae_cli.training.checkpoint import BEGUN
from nsae_cli.training.plan import GROUP


@dataclass
class Verified:
    """One artifact after its check.

    Attributes:
        kind: its kind.
        name: in the workspace, or its path.
        path: its folder.
        group: what several SAEs of one training run share, not an SAE.
        check: the findings.
        repaired: what --repair did, in sentences; the last one says what to run.
    """

    kind: Kind
    name: str
    path: Path
    group: bool
    check: Check
    repaired: list[str] = field(default_factory=list)
    store: StoreCheck | None = None

    @property
    def state(self) -> str:
        """ok, unfinished, damaged; repaired where what was damaged has been dropped."""
        return "repaired" if self.repaired else self.check.state

    @property
    def findings(self) -> list[Finding]:
        """What was found, in the order in which it was."""
        return self.check.findings

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "kind": self.kind.folder,
            "name": self.name,
            "state": self.state,
            "findings": [{"level": f.level, "file": f.file, "text": f.text} for f in self.findings],
            "repaired": self.repaired,
        }


def verify(references: Sequence[str], workspace: Workspace, *, repair: bool, reporter: Reporter) -> list[Verified]:
    """Re-checks artifacts: those named, or the whole workspace.

    Args:
        references: names (of any kind; a group of SAEs stands for its cells too) or paths, of a workspace as well.
        repair: drop what is damaged.

    Raises:
        UsageError: nothing of that name.
        BusyError: what is to be repaired is being written.
        Interrupted: a signal asked to stop.
    """
    if repair and (urls := [reference for reference in references if is_url(reference)]):
        raise catalogue.REFUSED_COMBINATION(
            f"--repair {without_secrets(urls[0])}: it works on a workspace; give the URL of that, as in "
            f"`nsae --workspace URL verify --repair NAME`"
        )
    targets = _find(references, workspace)
    fetched: list[Path] = []
    with reporter.task("verifying", len(targets), "artifacts") as task:
        results = []
        for target in targets:
            _poll()
            if not any(folder in (target.path, *target.path.parents) for folder in fetched):
                workspace.fetch(target.path)
                fetched.append(target.path)
            results.append(_check(target))
            task.advance(1)
    if repair:
        for result in results:
            if result.check.state == "damaged":
                with workspace.writing(_locked(result), reporter):
                    _repair(result)
    for result in results:
        if result.state == "damaged":
            workspace.forget(result.path)
            if any(is_url(reference) for reference in references):
                drop_copy(result.path)
    return results


def _poll() -> None:
    interrupt.stop_if_requested("stopped while verifying; nothing was changed")


@dataclass(frozen=True)
class _Target:
    kind: Kind
    name: str
    path: Path
    group: bool = False


def _check(target: _Target) -> Verified:
    result = Verified(target.kind, target.name, target.path, target.group, Check(_poll))
    if target.group:
        check_group(target.path, result.check, len(_cells(target.path)))
    elif target.kind is Kind.ACTIVATIONS:
        result.store = check_store(target.path, result.check)
    else:
        check_result(target.kind, target.path, result.check)
        if target.kind is Kind.SAE and not (target.path / Kind.SAE.mark).exists():
            result.check.findings.clear()
            check_group(target.path, result.check, 0)
    return result


# What there is to check


def _find(references: Sequence[str], workspace: Workspace) -> list[_Target]:
    if not references:
        targets = list(_of_workspace(workspace))
        if not targets and not workspace.root.is_dir():
            raise catalogue.WORKSPACE_EMPTY(
                f"there is no workspace {workspace.place}; choose another --workspace, or name a folder"
            )
        return targets
    found: dict[Path, _Target] = {}
    for reference in references:
        targets = [
            target
            for kind in Kind
            if _is_name(reference) and os.path.isdir(folder := workspace.folder(kind, reference))
            for target in _of_folder(kind, reference.strip("/"), folder)
        ]
        if is_url(reference):
            from nsae_cli.store.remote.workspace import fetch_at_url

            targets = _of_path(fetch_at_url(reference), workspace)
        targets = targets or _of_path(Path(reference), workspace)
        if not targets:
            raise catalogue.NOT_FOUND(
                f"no artifact named {reference[:80]!r} in {workspace.place} and no such path; "
                f"give a name that `nsae list` shows"
            )
        found |= {target.path: target for target in targets}
    return list(found.values())


def _of_workspace(workspace: Workspace) -> Iterator[_Target]:
    for kind in Kind:
        for folder in sorted((workspace.root / kind.folder).glob("*/")):
            if not folder.name.startswith("."):
                yield from _of_folder(kind, folder.name, folder)


def _of_folder(kind: Kind, name: str, folder: Path) -> Iterator[_Target]:
    """The artifact in a folder; of a group of SAEs what they share and then each of them."""
    cells = _cells(folder) if kind is Kind.SAE and not (folder / kind.mark).exists() else []
    if cells or (folder / GROUP).exists():
        yield _Target(kind, name, folder, group=True)
        for cell in cells:
            yield _Target(kind, f"{name}/{cell.name}", cell)
    else:
        yield _Target(kind, name, folder)


def _cells(folder: Path) -> list[Path]:
    """Folders of SAEs that are complete; those of a run that has not ended are in its checkpoints."""
    return sorted(mark.parent for mark in folder.glob(f"*/{Kind.SAE.mark}"))


def _is_name(reference: str) -> bool:
    """Whether it can be NAME or NAME/CELL: a path may lead out of the workspace."""
    parts = Path(reference).parts
    return 1 <= len(parts) <= 2 and not Path(reference).is_absolute() and ".." not in parts


def _of_path(path: Path, workspace: Workspace) -> list[_Target]:
    if not os.path.isdir(path):  # False too for what can be no name of a file, such as one too long
        return []
    kinds = [kind for kind in Kind if (path / kind.mark).exists()]
    if progress_files(path):
        kinds = [Kind.ACTIVATIONS]
    elif not kinds and ((path / CHECKPOINTS).is_dir() or (path / GROUP).exists() or _cells(path)):
        kinds = [Kind.SAE]
    elif not kinds:
        kinds = [kind for kind in Kind if path.resolve().parent.name == kind.folder]
    if kinds:
        return list(_of_folder(kinds[0], workspace.name_of(kinds[0], path), path))
    return list(_of_workspace(Workspace(path)))


# Repair


def _locked(result: Verified) -> Path:
    """The folder whose lock the command that writes it holds: for an SAE of a group, the group's."""
    is_cell = result.kind is Kind.SAE and not result.group and (result.path.parent / GROUP).exists()
    return result.path.parent if is_cell else result.path


def _repair(result: Verified) -> None:
    folder, name = result.path, result.name
    if result.group or (result.kind is Kind.SAE and not (folder / Kind.SAE.mark).exists()):
        _repair_run(result)
    elif result.store is not None:
        _repair_store(result, result.store)
    else:
        _set_aside(folder, result.kind.mark, result)
        whole = name.partition("/")[0] if result.kind is Kind.SAE else name
        what = "trains it again" if result.kind is Kind.SAE else "makes it again"
        result.repaired.append(f"run the same `nsae {result.kind.command}` again (--name {whole}): it {what}")


def _repair_store(result: Verified, store: StoreCheck) -> None:
    folder = result.path
    if store.manifest is not None or (store.bad_shards and not (folder / MANIFEST).exists()):
        if not drop_damaged_shards(folder, store):
            return
        number = len(store.bad_shards)
        shards = shards_text(number)
        command = _command(store)
        result.repaired += [
            f"dropped {shards}; {MANIFEST} is {PROGRESS} again, with all the others",
            f"run the same `nsae {command}` again (--name {result.name}): only {shards} "
            f"{'is' if number == 1 else 'are'} made anew",
        ]
        return
    damaged = {finding.file for finding in result.findings if finding.level == "damaged"}
    records = [path.name for path in progress_files(folder) if path.name in damaged]
    for name in [MANIFEST] if (folder / MANIFEST).exists() else records:
        _set_aside(folder, name, result)
    result.repaired.append(
        f"run the command that made it again (nsae collect or alter, --name {result.name}): without the hashes in that "
        f"file no shard of it can be trusted, all are made anew"
    )


def _command(store: StoreCheck) -> str:
    if store.manifest is None:
        return "collect` or `nsae alter"
    return "alter" if store.manifest.altered else "collect"


def _repair_run(result: Verified) -> None:
    folder = result.path
    damaged = {finding.file for finding in result.findings if finding.level == "damaged"}
    if f"{CHECKPOINTS}/{BEGUN}" in damaged or BEGUN in damaged:
        commit.remove_folder(folder / CHECKPOINTS)
        result.repaired.append(f"removed {CHECKPOINTS}: without {BEGUN} it cannot be known what they are of")
    else:
        for file in sorted(damaged - {GROUP}):
            commit.remove_folder(folder / file)
            result.repaired.append(f"removed {file}")
    if GROUP in damaged:
        commit.remove_file(folder / GROUP)
        result.repaired.append(f"removed {GROUP}: it only repeats what the SAEs' run.json say")
    if damaged == {GROUP} and not (folder / CHECKPOINTS).is_dir():
        return
    result.repaired.append(f"run the same `nsae train` again (--name {result.name}): it goes on from what is left")


def _set_aside(folder: Path, file: str, result: Verified) -> None:
    aside = commit.set_aside(folder / file)
    result.repaired.append(f"renamed {file} to {aside.name}")


def refuse_damage(results: Sequence[Verified]) -> None:
    """Ends the command with an error where something is damaged and was not repaired.

    Raises:
        ArtifactError: with how much is damaged and what to do.
    """
    damaged = [result for result in results if result.state == "damaged"]
    if not damaged:
        return
    number = sum(finding.level == "damaged" for result in damaged for finding in result.findings)
    findings = "1 finding of damage" if number == 1 else f"{number} findings of damage"
    name = damaged[0].name
    own = [result for result in damaged if result.store is None or _can_be_made_again(result.store)]
    if own != damaged:
        remedy = f"{next(one for one in damaged if one not in own).name} was not made by nsae: get it again"
    elif len(damaged) == 1:
        remedy = f"run `nsae verify --repair {name}`"
    else:
        remedy = "run the same command with --repair"
    raise catalogue.DAMAGE_FOUND(f"{findings} in {len(damaged)} of {len(results)} artifacts, such as {name}; {remedy}")


def _can_be_made_again(store: StoreCheck) -> bool:
    return store.manifest is None or config_of(store.manifest) is not None

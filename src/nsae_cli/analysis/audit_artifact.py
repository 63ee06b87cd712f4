"""The work of `nsae audit`: from SAEs, whoever trained them, to the artifacts `audits/NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsae_cli import catalogue
from nsae_cli.analysis.audit import Audit
from nsae_cli.analysis.audit_options import AuditOptions
from nsae_cli.analysis.audit_setting import Setting, find_setting
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.saes import on_hub
from nsae_cli.interop.foreign import ForeignSae
from nsae_cli.interop.hub import HubReference
from nsae_cli.interop.opening import open_sae, read_folder
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.remote.places import is_url, without_secrets
from nsae_cli.store.shards import ActivationStore, describe_changes, open_activations
from nsae_cli.store.workspace import Artifact, Kind, Workspace, as_name, name_from


@dataclass
class AuditResult:
    """The artifact, its audit.json, and whether it was there already."""

    artifact: Artifact
    document: dict[str, Any]
    already_complete: bool


def run_audit(
    reference: str | None, options: AuditOptions, workspace: Workspace, name: str | None, reporter: Reporter
) -> AuditResult:
    """Audits one SAE.

    Args:
        reference: an SAE's name in the workspace, a folder, or a hub id; None for the workspace's newest.
        options: of the audit.
        name: of the result; None for the SAE's own.

    Raises:
        UsageError: no such SAE, options that do not fit, or the name belongs to another audit.
        ArtifactError: the SAE is damaged, is computed in a way that nsae does not know, or does not fit.
        NumericalError: NaN in the SAE, the activations or the reconstructions.
        ResourceError: model, text, hub or device not available.
        Interrupted: a signal asked to stop; nothing is written.
    """
    with quiet_libraries():
        sae_name, found = _find(reference, workspace, reporter)
        compared = None if options.reference is None else _find(options.reference, workspace, reporter)
        store = _open_store(options, workspace)
        setting = find_setting(found, options, store)
        artifact_name = name or name_from(sae_name)
        artifact = Artifact(Kind.AUDIT, artifact_name, workspace.folder(Kind.AUDIT, artifact_name))
        wanted = {
            "sae": _identity(sae_name, found),
            "reference_sae": compared and _identity(*compared),
            "options": _options_of(options, setting, store),
        }
        if (artifact.path / Kind.AUDIT.mark).is_file():
            document = read_document(artifact, required=("sae", "rows", "options", "metrics"))
            _require_same(artifact_name, document, wanted)
            workspace.tidy(artifact.path, reporter)
            return AuditResult(artifact, document, already_complete=True)
        with workspace.writing(artifact.path, reporter):
            document = Audit(sae_name, found, compared, options, store, setting, reporter).run(wanted)
            commit.make_folder(artifact.path)
            commit.remove_leftovers(artifact.path)
            document = commit.write_document(artifact.path / Kind.AUDIT.mark, document, [])
        return AuditResult(artifact, document, already_complete=False)


def run_audits(
    references: Sequence[str], options: AuditOptions, workspace: Workspace, name: str | None, reporter: Reporter
) -> list[AuditResult]:
    """Audits several SAEs, as `run_audit` does each; a group in the workspace stands for its cells.

    Args:
        name: the beginning of the results' names, or the name of the only one.
    """
    every = [sae for reference in references for sae in _cells(reference, workspace)]
    several = name is not None and len(every) > 1
    names = [f"{name}-{_short(sae, workspace)}" if several else name for sae in every]
    twice = next((one for one in names if one is not None and names.count(one) > 1), None)
    if twice is not None:
        raise catalogue.SAME_OUTPUT(
            f"two SAEs would have the audit {twice}; audit each of them with a --name of its own"
        )
    return [run_audit(sae, options, workspace, own, reporter) for sae, own in zip(every, names, strict=True)]


def _short(reference: str, workspace: Workspace) -> str:
    """The last part of a name, a path or a hub id, as it can stand in a name."""
    place = on_hub(reference, workspace)
    return as_name(Path(reference).name if place is None else place.name)


def _cells(reference: str, workspace: Workspace) -> list[str]:
    group = workspace.folder(Kind.SAE, reference)
    cells = sorted(mark.parent for mark in group.glob(f"*/{Kind.SAE.mark}"))
    return [f"{reference}/{cell.name}" for cell in cells] or [reference]


def _find(reference: str | None, workspace: Workspace, reporter: Reporter) -> tuple[str, ForeignSae]:
    """An SAE's name and the SAE."""
    if reference is None:
        newest = workspace.newest(Kind.SAE)
        reporter.note(f"using the newest saes: {newest.name}")
        return newest.name, read_folder(newest.path)
    if is_url(reference) and HubReference.parse(reference) is None:  # those are the hub's
        saes = workspace.find(Kind.SAE, reference)
        if len(saes) > 1:
            raise catalogue.SEVERAL_SAES(
                f"{without_secrets(reference)} holds {len(saes)} SAEs; name one of them, such as "
                f"{without_secrets(reference).rstrip('/')}/{saes[0].path.name}"
            )
        return saes[0].name, read_folder(saes[0].path)
    own = workspace.folder(Kind.SAE, reference)
    if own.is_dir():
        return _name_of(own, workspace), read_folder(own)
    if not Path(reference).exists() and HubReference.parse(reference) != on_hub(reference, workspace):
        workspace.find(Kind.SAE, reference)  # a typo in a cell's name: says what there is
    found = open_sae(reference)
    local = Path(reference)
    return _name_of(local, workspace) if local.is_dir() else str(HubReference.parse(reference)), found


def _name_of(folder: Path, workspace: Workspace) -> str:
    """A name without a path: in the workspace NAME or NAME/CELL, elsewhere the folder's own."""
    base, resolved = (workspace.root / Kind.SAE.folder).resolve(), folder.resolve()
    return resolved.relative_to(base).as_posix() if base in resolved.parents else resolved.name


def _open_store(options: AuditOptions, workspace: Workspace) -> ActivationStore | None:
    if options.activations is None:
        return None
    [artifact] = workspace.find(Kind.ACTIVATIONS, options.activations)
    return open_activations(artifact.path)


def _options_of(options: AuditOptions, setting: Setting, store: ActivationStore | None) -> dict[str, Any]:
    """What determines the result beside the SAEs; names and hashes instead of paths."""
    own = {key: getattr(options, key) for key in ("tokens", "top", "behaviour", "bins", "centre")}
    return {
        **setting.identity,
        "activations": store and {"name": store.name, "manifest_sha256": store.manifest_sha256},
        "hook": setting.hook,
        **own,
    }


def _identity(name: str, found: ForeignSae) -> dict[str, str]:
    return {"name": name, "weights_sha256": commit.file_sha256(found.weights_file)}


def _require_same(name: str, document: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses to take another audit for this one, naming what differs."""
    for key, label in (("sae", "SAE"), ("reference_sae", "--reference")):
        old, new = document.get(key) or {}, wanted[key] or {}
        if any(old.get(part) != new.get(part) for part in ("name", "weights_sha256")):
            before, now = old.get("name", "none"), new.get("name", "none")
            change = f"{before} -> {now}" if before != now else f"{now} has changed since"
            raise catalogue.NAME_TAKEN(f"--name {name} holds another audit ({label} {change}); choose another --name")
    if document["options"] != wanted["options"]:
        changes = describe_changes(document["options"], wanted["options"])
        raise catalogue.NAME_TAKEN(f"--name {name} holds another audit ({changes}); choose another --name")

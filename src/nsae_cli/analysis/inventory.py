"""What a workspace holds, for `nsae list`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsae_cli.errors import NsaeError
from nsae_cli.store.commit import read_json
from nsae_cli.store.workspace import Artifact, Kind, Workspace


def take_inventory(workspace: Workspace) -> list[dict[str, Any]]:
    """One entry per artifact: kind, name, status, size in bytes, detail; by kind, newest first, unfinished last."""
    rows = []
    for kind in Kind:
        for artifact in workspace.complete(kind):
            detail = _detail(artifact)
            status, shown = ("complete", detail) if detail is not None else ("damaged", f"{kind.mark} cannot be read")
            rows.append(_row(kind, artifact.name, status, workspace.size(artifact.path), shown))
        for folder in workspace.unfinished(kind):
            if kind is Kind.SAE and (foreign := _foreign(folder)) is not None:
                rows.append(_row(kind, folder.name, "complete", workspace.size(folder), foreign))
                continue
            # Stores come from collect or alter.
            command = "command" if kind is Kind.ACTIVATIONS else f"nsae {kind.command}"
            rows.append(_row(kind, folder.name, "unfinished", workspace.size(folder), f"run the same {command} again"))
    return rows


def _row(kind: Kind, name: str, status: str, size: int, detail: str) -> dict[str, Any]:
    return {"kind": kind.folder, "name": name, "status": status, "size": size, "detail": detail}


def _foreign(folder: Path) -> str | None:
    """What is said of another package's SAE, as `nsae pull` gets them; None where the folder holds none."""
    from nsae_cli.interop.opening import is_foreign  # with torch, for which `nsae list` must not wait

    if any(is_foreign(place) for place in (folder, *folder.glob("*/"))):
        return "of another package: nsae audit measures it"
    return None


def _detail(artifact: Artifact) -> str | None:
    """A few words about an artifact; None where its JSON is damaged."""
    try:
        document = read_json(artifact.path / artifact.kind.mark)
        if artifact.kind is Kind.ACTIVATIONS:
            altered = ", ".join(change["change"] for change in document.get("altered") or [])
            rows = f"{document['rows']:,} rows × {document['d_in']}, {', '.join(document['hooks'])}"
            return f"{rows}, {altered}" if altered else rows
        if artifact.kind is Kind.NORMS:
            return f"{len(document['hooks'])} layers of {document['activations']['name']}"
        if artifact.kind is Kind.SAE:
            l0 = document["metrics"]["ns"]["l0"]
            return f"{document['hook']}, {document['d_sae']} features" + ("" if l0 is None else f", L0 {l0:.3g}")
        if artifact.kind is Kind.FEATURES:
            return f"{document['d_sae']} features of {document['sae']['name']}"
        if artifact.kind is Kind.AUDIT:
            return f"{document['rows']['rows']:,} rows at {document['hook']}, {document['sae']['name']}"
        if artifact.kind is Kind.EVAL:
            delta = document["behaviour"]["delta_ce_ns"]["value"]
            shown = "" if delta is None else f", ΔCE at non-sinks {delta:.3g}"
            return f"{document['rows']['tokens']:,} tokens, {document['sae']['name']}{shown}"
        if artifact.kind is Kind.TABLE:
            table_rows = sum(len(group["rows"]) for group in document["groups"])
            return f"{len(document['inputs'])} SAEs in {table_rows} rows"
        return f"top {document['top']:.3g} of {document['rows']:,} rows, {document['sae']['name']}"
    except (NsaeError, KeyError, TypeError, ValueError):
        return None

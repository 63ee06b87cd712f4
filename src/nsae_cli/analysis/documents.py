"""Reading the JSON of an artifact that an earlier command made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nsae_cli import catalogue
from nsae_cli.store.commit import read_json
from nsae_cli.store.workspace import Artifact


def read_document(artifact: Artifact, required: Sequence[str]) -> dict[str, Any]:
    """The artifact's own JSON: norms.json, top_norms.json.

    Args:
        artifact: whose.
        required: keys that must be there; ``activations`` and ``sae`` must be mappings with a name.

    Raises:
        ArtifactError: not readable, not of format 1, or a key is missing.
    """
    path = artifact.path / artifact.kind.mark
    remedy = f"delete the folder {artifact.path} and run nsae {artifact.kind.command} again"
    document = read_json(path)
    if not isinstance(document, dict):
        raise catalogue.DOCUMENT_INVALID(f"{path} is no JSON object; {remedy}")
    if document.get("format_version") != 1:
        raise catalogue.FORMAT_VERSION(
            f"{path}: format_version is {document.get('format_version')!r}, this nsae reads 1; {remedy}"
        )
    for key in required:
        value = document.get(key)
        if value is None or (key in ("activations", "sae") and not (isinstance(value, dict) and "name" in value)):
            raise catalogue.DOCUMENT_INVALID(f"{path}: {key} is missing or damaged; {remedy}")
    return document

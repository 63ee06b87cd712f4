"""Reading the data files of an artifact: what is handed out has the hash that the artifact's JSON names."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from nsae_cli import catalogue
from nsae_cli.store import commit, presence
from nsae_cli.store.seal import FILES, repair


def read_data_file(path: Path, document: Mapping[str, Any], at_most: int | None = None) -> bytes:
    """The content of a file, read once and hashed as it was read.

    Args:
        path: the file, in the artifact's folder.
        document: the artifact's JSON; where it has no hash of the file (older artifacts), nothing is compared.
        at_most: bytes that such a file can have.

    Raises:
        ArtifactError: missing, no plain file, too large, or not what was written.
    """
    presence.bring(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise catalogue.RESULTS_DAMAGED(f"{path} is not a file; {repair(path)}")
        if at_most is not None and status.st_size > at_most:
            raise catalogue.RESULTS_DAMAGED(
                f"{path}: {status.st_size:,} bytes, expected at most {at_most:,}; {repair(path)}"
            )
        content = path.read_bytes()
    except OSError as error:
        commit.refuse_unread(error, path)
        reason = error.strerror or str(error).splitlines()[0]
        raise catalogue.RESULTS_DAMAGED(f"{path} cannot be read ({reason}); {repair(path)}") from error
    hashes = document.get(FILES)
    expected = hashes.get(path.name) if isinstance(hashes, dict) else None
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise catalogue.CONTENT_CHANGED(
            f"{path}: the content is not what was written (SHA-256 differs); {repair(path)}"
        )
    return content


def read_arrays(path: Path, document: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a small safetensors file as NumPy arrays.

    Raises:
        ArtifactError: as `read_data_file`; no safetensors file, or a dtype that NumPy does not have.
    """
    try:
        return {name: tensor.numpy() for name, tensor in read_tensors(path, document).items()}
    except TypeError as error:
        raise catalogue.RESULTS_DAMAGED(f"{path}: {str(error).splitlines()[0]}; {repair(path)}") from error


def read_tensors(path: Path, document: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """As `read_arrays`, as torch tensors."""
    content = read_data_file(path, document)
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise catalogue.RESULTS_DAMAGED(f"{path} cannot be read ({reason}); {repair(path)}") from error

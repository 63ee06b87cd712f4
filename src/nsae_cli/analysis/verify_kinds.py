"""What `nsae verify` looks at in each kind of artifact beside its seal and its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsae_cli.errors import NsaeError
from nsae_cli.interop.opening import is_foreign
from nsae_cli.store.data_files import read_arrays, read_data_file
from nsae_cli.store.findings import Check, check_files, check_json, check_strangers, short
from nsae_cli.store.sae_folder import DATA_FILES, LOG, load_sae
from nsae_cli.store.seal import FILES, is_plain_name
from nsae_cli.store.workspace import Kind
from nsae_cli.training.checkpoint import BEGUN, Checkpoints
from nsae_cli.training.plan import GROUP

CHECKPOINTS = "checkpoints"

Document = Mapping[str, Any]
#: Figures that a kind of artifact has beside its data.
_FIGURES = {
    Kind.NORMS: ("norms.png", "norms-position0.png"),
    Kind.TOP_NORMS: ("l0.png", "l1.png"),
}


def check_result(kind: Kind, folder: Path, check: Check) -> None:
    """Re-checks an artifact whose JSON is its completion mark: anything but a store."""
    mark = folder / kind.mark
    if not mark.exists():
        _check_unfinished(kind, folder, check)
        return
    document = check_json(check, mark)
    if document is not None:
        before = check.state
        check_files(check, folder, document)
        if check.state == before:  # else the contents only say the same again
            try:
                _CONTENTS[kind](folder, document, check)
            except NsaeError as error:
                check.damaged("", short(error, folder))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                check.damaged(kind.mark, f"its content is not that of {kind.folder} ({type(error).__name__}: {error})")
    known = {kind.mark, *_FIGURES.get(kind, ()), *(document or {}).get(FILES, {})}
    if kind is Kind.TABLE and document is not None:
        known |= set(document.get("figures") or ())
    if kind is Kind.SAE:
        known |= {*DATA_FILES, CHECKPOINTS}
    check_strangers(check, folder, known)


def check_group(folder: Path, check: Check, cells: int) -> None:
    """Re-checks what a training run keeps for all its SAEs: group.json and the checkpoints."""
    if any(is_foreign(place) for place in (folder, *folder.glob("*/"))):
        check.note("", "another package's SAE, which has no hashes to compare with")
        return
    group, begun, checkpoints = folder / GROUP, folder / CHECKPOINTS / BEGUN, Checkpoints(folder / CHECKPOINTS)
    named = check_json(check, group) if group.exists() else None
    for cell in (named or {}).get("cells") or ():
        if is_plain_name(cell) and not (folder / cell / Kind.SAE.mark).exists():
            check.unfinished(cell, f"no {Kind.SAE.mark}: the same `nsae train` trains it")
    if not (folder / CHECKPOINTS).is_dir():
        if not group.exists() and not cells:
            check.unfinished("", "neither a result nor a checkpoint: nothing is durable yet")
        return
    damaged = checkpoints.damaged()
    whole = [step for step in checkpoints.steps() if step not in damaged]
    check.unfinished("", f"training has not ended: checkpoint at step {max(whole):,}" if whole else "no checkpoint yet")
    if begun.exists():
        check_json(check, begun, version=False)
    elif whole:
        check.damaged(f"{CHECKPOINTS}/{BEGUN}", "missing")
    for step, why in damaged.items():
        check.damaged(f"{CHECKPOINTS}/step-{step}", why)
    check_strangers(check, folder / CHECKPOINTS, {BEGUN, *(f"step-{step}" for step in checkpoints.steps())})


def _check_unfinished(kind: Kind, folder: Path, check: Check) -> None:
    check.unfinished("", f"no {kind.mark}: `nsae {kind.command}` has not ended")
    check_strangers(check, folder, {path.name for path in folder.iterdir() if not path.name.startswith(".")})


def _norms(folder: Path, document: Document, check: Check) -> None:
    arrays = read_arrays(folder / "norms.safetensors", document)
    hooks, bins = len(document["hooks"]), len(arrays["edges"]) - 1
    for name in ("counts", "position0_counts"):
        _expect(
            check, "norms.safetensors", f"{name} of {hooks} hooks × {bins} bins", arrays[name].shape == (hooks, bins)
        )
    _expect(check, "norms.safetensors", "edges in ascending order", bool((np.diff(arrays["edges"]) > 0).all()))
    _finite(check, "norms.safetensors", arrays)
    for hook, counts in zip(document["hooks"], arrays["counts"], strict=True):
        total = int(counts.sum())
        _expect(check, "norms.safetensors", f"the rows of {hook['hook']} in its counts", total <= hook["rows"])


def _sae(folder: Path, document: Document, check: Check) -> None:
    saved = load_sae(folder)
    _finite(check, "sae_weights.safetensors", {name: _array(tensor) for name, tensor in saved.sae.named().items()})
    features = folder / "features.safetensors"
    if features.is_file():
        density = read_arrays(features, document)["density"]
        right = density.shape == (document["d_sae"],) and bool(((density >= 0) & (density <= 1)).all())
        _expect(check, features.name, f"a density from 0 to 1 of {document['d_sae']} features", right)
    if (folder / LOG).is_file():
        lines = read_data_file(folder / LOG, document).decode("utf-8").splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        counted = document.get("counts", {}).get("steps")
        right = steps == sorted(set(steps)) and (not steps or counted is None or steps[-1] == counted)
        _expect(check, LOG, f"lines of ascending steps, the last one {counted}", right)
    if (folder / CHECKPOINTS).exists():
        check.note(CHECKPOINTS, "left by a run that was killed in its last moment; the same command removes it")


def _top_norms(folder: Path, document: Document, check: Check) -> None:
    arrays = read_arrays(folder / "top_norms.safetensors", document)
    right = all(len(array) == document["rows"] for array in arrays.values())
    _expect(check, "top_norms.safetensors", f"{document['rows']:,} rows in every tensor", right)
    _finite(check, "top_norms.safetensors", arrays)


def _eval(folder: Path, document: Document, check: Check) -> None:
    arrays = read_arrays(folder / "contexts.safetensors", document)
    contexts = document["rows"]["contexts"]
    right = all(len(array) == contexts for array in arrays.values())
    _expect(check, "contexts.safetensors", f"{contexts:,} contexts in every tensor", right)
    _finite(check, "contexts.safetensors", arrays)


def _features(folder: Path, document: Document, check: Check) -> None:
    arrays = read_arrays(folder / "features.safetensors", document)
    right = len(arrays["density"]) == document["d_sae"]
    _expect(check, "features.safetensors", f"{document['d_sae']:,} features", right)


def _table(folder: Path, document: Document, check: Check) -> None:
    for figure in document["figures"]:
        if not is_plain_name(figure):
            check.damaged(Kind.TABLE.mark, f"names the figure {str(figure)[:80]!r}, which is not one of this folder")
        elif not (folder / figure).is_file():
            check.note(figure, "the figure is missing; the same command draws it again")


def _audit(folder: Path, document: Document, check: Check) -> None:
    for key in ("sae", "rows", "options", "metrics"):
        _expect(check, Kind.AUDIT.mark, f"the key {key}", key in document)


_CONTENTS: dict[Kind, Callable[[Path, Document, Check], None]] = {
    Kind.NORMS: _norms,
    Kind.SAE: _sae,
    Kind.TOP_NORMS: _top_norms,
    Kind.EVAL: _eval,
    Kind.FEATURES: _features,
    Kind.TABLE: _table,
    Kind.AUDIT: _audit,
}


def _expect(check: Check, file: str, what: str, right: bool) -> None:
    if not right:
        check.damaged(file, f"expected {what}")


def _finite(check: Check, file: str, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and (bad := int((~np.isfinite(array)).sum())):
            check.damaged(file, f"{name} holds {bad:,} values that are not finite")


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array

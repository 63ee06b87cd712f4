"""Re-checking an activation store from its bytes, and making one go back to where only damaged shards are missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nsae_cli.errors import NsaeError
from nsae_cli.store import commit
from nsae_cli.store.findings import Check, check_json, check_strangers, plain_file, short
from nsae_cli.store.manifest import MANIFEST, Manifest, ShardEntry, read_manifest
from nsae_cli.store.progress import PROGRESS, merged, progress_files, progress_text, read_progress
from nsae_cli.store.shards import shard_name, shards_text

#: Rows that are looked at together: what is computed of them is in float64.
_ROWS = 8192
#: Relative error of a norm that was summed up in float32, with room to spare.
_NORM_SLACK = 1e-4
#: What a shard holds of its rows beside their vectors.
_PER_ROW = ("norms", "tokens", "positions", "documents")


@dataclass
class StoreCheck:
    """What was found in a store.

    Attributes:
        check: the findings.
        manifest: None where there is none that can be read.
        bad_shards: numbers of the shards with damage.
    """

    check: Check
    manifest: Manifest | None = None
    bad_shards: set[int] = field(default_factory=set)


def check_store(folder: Path, check: Check) -> StoreCheck:
    """Re-checks everything of a store: the manifest, and every shard from its bytes (never from `verified.jsonl`)."""
    result = StoreCheck(check)
    if not (folder / MANIFEST).exists():
        _check_unfinished(folder, result)
        return result
    if check_json(check, folder / MANIFEST) is None:
        return result
    try:
        result.manifest, _ = read_manifest(folder)
    except NsaeError as error:
        check.damaged(MANIFEST, short(error, folder / MANIFEST))
        return result
    manifest = result.manifest
    progress = {path.name for path in progress_files(folder)}
    for name in sorted(progress):
        check.note(name, "left by a run that was killed after its last shard")
    last_document = 0
    for index, entry in enumerate(manifest.shards):
        check.poll()
        before = len(check.findings)
        last_document = _Shard(folder, entry, manifest, check).run(last_document)
        if any(finding.level == "damaged" for finding in check.findings[before:]):
            result.bad_shards.add(index)
    check_strangers(check, folder, {MANIFEST, *progress, *(entry.file for entry in manifest.shards)})
    return result


def _check_unfinished(folder: Path, result: StoreCheck) -> None:
    """Progress lines against shards; each worker that has written into the store has a file of them."""
    check, files = result.check, progress_files(folder)
    if not files:
        check.unfinished("", f"neither {MANIFEST} nor {PROGRESS}: nothing is durable yet")
        check_strangers(check, folder, ())
        return
    read = []
    for path in files:
        try:
            progress = read_progress(path)
        except (NsaeError, OSError) as error:
            check.damaged(path.name, short(error, path))
            continue
        read.append(progress)
        if not progress.whole:
            check.note(path.name, "a torn or damaged line: its shard is made again")
    if any(finding.level == "damaged" for finding in check.findings):
        return
    entries = merged(folder, read)
    workers = f", by {len(files)} workers" if len(files) > 1 else ""
    check.unfinished("", f"not finished: {shards_text(len(entries))} so far{workers}")
    for index, entry in sorted(entries.items()):
        check.poll()
        before = len(check.findings)
        _Shard(folder, entry, None, check).run(0)
        if len(check.findings) > before:
            result.bad_shards.add(index)
    check_strangers(check, folder, {*(path.name for path in files), *(entry.file for entry in entries.values())})


@dataclass
class _Shard:
    """One shard's check. Without a manifest (the store is unfinished) only what its line says is looked at."""

    folder: Path
    entry: ShardEntry
    manifest: Manifest | None
    check: Check

    def run(self, last_document: int) -> int:
        """Looks at the shard; `last_document` is the one before's, and the result is this one's."""
        path = self.folder / self.entry.file
        if not plain_file(self.check, path):
            return last_document
        size = path.stat().st_size
        if self.entry.bytes is not None and size != self.entry.bytes:
            self._damaged(f"{size:,} bytes, expected {self.entry.bytes:,}")
            return last_document
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                return self._tensors(file, last_document)
        except (SafetensorError, OSError) as error:
            commit.refuse_unread(error, path)  # --repair must not drop what may be whole
            self._damaged(f"not a readable safetensors file ({str(error).splitlines()[0]})")
        return last_document

    def _tensors(self, file: Any, last_document: int) -> int:
        manifest, hashes = self.manifest, self.entry.tensors or {}
        hooks = manifest.hooks if manifest is not None else []
        present = set(file.keys())
        for name in sorted({*hooks, *hashes} - present):
            self._damaged(f"no tensor {name!r}")
        if hashes and (unknown := sorted(present - set(hashes))):
            self._damaged(f"a tensor {unknown[0]!r} that was not written")
        index: dict[str, torch.Tensor] = {}
        nonfinite = torch.zeros(self.entry.rows, dtype=torch.bool)
        whole = True
        squares: dict[str, torch.Tensor] = {}
        for name in sorted(present):
            tensor = file.get_tensor(name)
            if name in hashes and commit.tensor_sha256(tensor) != hashes[name]:
                self._damaged(f"the content of {name} is not what was written (SHA-256 differs)")
            if manifest is None:
                if not tensor.ndim or len(tensor) != self.entry.rows:
                    self._damaged(f"{name} is {list(tensor.shape)}, expected {self.entry.rows} rows")
            elif not self._shape(name, tensor, manifest):
                whole = False
            elif name in hooks:
                squares[name], bad = _square_norms(tensor)
                nonfinite |= bad
            elif name in _PER_ROW:
                index[name] = tensor
        if manifest is None or not whole:
            return last_document
        if rows := int(nonfinite.sum()):
            self._damaged(f"{rows:,} rows hold NaN or infinity, the first is row {int(nonfinite.nonzero()[0]):,}")
        self._norms(index.get("norms"), squares, manifest)
        return self._index(index, manifest, last_document)

    def _shape(self, name: str, tensor: torch.Tensor, manifest: Manifest) -> bool:
        if name not in manifest.hooks and name not in _PER_ROW:
            return True
        shape, dtypes = manifest.layout(name, self.entry.rows)
        if tuple(tensor.shape) == shape and tensor.dtype in dtypes:
            return True
        found, expected = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, dtypes[0]))
        self._damaged(f"{name} is {list(tensor.shape)} {found}, the manifest says {list(shape)} {expected}")
        return False

    def _norms(self, norms: torch.Tensor | None, squares: dict[str, torch.Tensor], manifest: Manifest) -> None:
        """Stored norms are those of the vectors before they were rounded to the storage dtype."""
        if norms is None or manifest.norm_hooks is None:
            return
        if bad := int((~torch.isfinite(norms)).any(dim=1).sum()):
            self._damaged(f"{bad:,} rows of norms are not finite")
            return
        info = torch.finfo(manifest.torch_dtype)
        for hook, square in squares.items():
            if hook not in manifest.norm_hooks:
                continue
            stored, found = norms[:, manifest.norm_hooks.index(hook)].double(), square.sqrt()
            # |‖x̂‖ − ‖x‖| ≤ ‖x̂ − x‖ ≤ u‖x‖ + √d·(half the smallest step); an altered store was rounded twice (eps = 2u).
            room = (info.eps + _NORM_SLACK) * stored + info.smallest_normal * info.eps * manifest.d_in**0.5
            off = ((stored - found).abs() > room).nonzero().squeeze(1)
            if len(off):
                row = int(off[0])
                self._damaged(
                    f"{len(off):,} norms at {hook} are not those of the vectors, the first is row {row:,}: "
                    f"{float(stored[row]):.6g}, ‖x‖ is {float(found[row]):.6g}"
                )

    def _index(self, index: dict[str, torch.Tensor], manifest: Manifest, last_document: int) -> int:
        for name, tensor in index.items():
            if name != "norms" and len(tensor) and int(tensor.min()) < 0:
                self._damaged(f"{name} holds {int(tensor.min())}")
        positions, documents = index.get("positions"), index.get("documents")
        if positions is not None and len(positions) and manifest.context_size is not None:
            follows = torch.zeros(len(positions), dtype=torch.bool)
            follows[1:] = positions[1:] == positions[:-1] + 1
            odd = (~(follows | (positions == 0)) | (positions >= manifest.context_size)).nonzero().squeeze(1)
            if len(odd):
                row = int(odd[0])
                self._damaged(
                    f"{len(odd):,} positions do not go on from the row before, begin a context or fit a context of "
                    f"{manifest.context_size}, the first is row {row:,}: {int(positions[row])}"
                )
        if documents is None or not len(documents) or manifest.command is None:
            return last_document  # another tool may number documents as it likes
        if int(documents[0]) < last_document or bool((documents.diff() < 0).any()):
            self._damaged("documents are not in the order of the corpus")
        return int(documents[-1])

    def _damaged(self, text: str) -> None:
        self.check.damaged(self.entry.file, text)


def _square_norms(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """‖x‖² of each row in float64, and which rows are not finite."""
    squares = torch.empty(len(tensor), dtype=torch.float64)
    for start in range(0, len(tensor), _ROWS):
        part = tensor[start : start + _ROWS].double()
        squares[start : start + _ROWS] = torch.linalg.vecdot(part, part)
    return squares, ~torch.isfinite(squares)


def config_of(manifest: Manifest) -> dict[str, Any] | None:
    """What the command that made a store wrote into the first line of progress.jsonl; None where nsae did not."""
    if manifest.altered:
        return {key: value for key, value in manifest.altered[-1].items() if key != "hooks"}
    options = (manifest.command or {}).get("options")
    return options if isinstance(options, dict) else None


def drop_damaged_shards(folder: Path, result: StoreCheck) -> bool:
    """Makes a store unfinished again, with all but its damaged shards: the same command makes those anew.

    Returns:
        Whether it could: False for a store that another tool made, which no command of nsae can make again.
    """
    manifest = result.manifest
    if manifest is None:
        read = [read_progress(path) for path in progress_files(folder)]
        config, entries = read[0].config, merged(folder, read)
    else:
        found = config_of(manifest)
        if found is None or any(entry.file != shard_name(index) for index, entry in enumerate(manifest.shards)):
            return False
        config, entries = found, dict(enumerate(manifest.shards))
    kept = [entry for index, entry in sorted(entries.items()) if index not in result.bad_shards]
    commit.write_text(folder / PROGRESS, progress_text(config, kept))
    # In this order a kill in between leaves the manifest, and with it the damage to be found again.
    if manifest is not None:
        commit.remove_file(folder / MANIFEST)
    for index in sorted(result.bad_shards):
        commit.remove_file(folder / entries[index].file)
    for path in progress_files(folder):
        if path.name != PROGRESS:
            commit.remove_file(path)
    return True

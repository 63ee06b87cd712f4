"""Writing an activation store shard by shard, and reading one back with its content checked."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nsae_cli import catalogue
from nsae_cli.errors import ArtifactError
from nsae_cli.store import commit, presence
from nsae_cli.store.manifest import FORMAT_VERSION, MANIFEST, Manifest, ShardEntry, read_manifest
from nsae_cli.store.seal import is_sealed, seal, seal_fits

PROGRESS = "progress.jsonl"
VERIFIED = "verified.jsonl"
#: Norms, positions and tokens of this many bytes are kept in memory: passes over a store read them again and again.
_CACHE_BYTES = 256 * 2**20
#: Up to this share of a shard's rows, they are read one run at a time instead of the whole tensor.
_FEW_ROWS = 0.25


_SHARD_NAME = re.compile(r"shard-(\d{5,})\.safetensors")


def shard_name(index: int) -> str:
    """File name of a store's shard."""
    return f"shard-{index:05d}.safetensors"


@dataclass
class StoreWriter:
    """Appends shards to a store's folder; a background thread hashes and writes while the model runs on.

    A shard is durable once its line is in ``progress.jsonl``; the first line there is the resolved configuration. Each
    line is sealed. `finish` writes the manifest, the completion mark. At most one shard waits while another is being
    written, so that host memory does not grow with the number of tokens.

    Args:
        folder: the store's folder; created.
        config: the resolved, result-changing options of the run.

    Raises:
        UsageError: the folder holds an unfinished store with another configuration.
        ResourceError: the folder cannot be written.
    """

    folder: Path
    config: dict[str, Any]
    #: Shards that an earlier run of the same command left complete, by number; there may be gaps.
    durable: dict[int, ShardEntry] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        commit.make_folder(self.folder)
        commit.remove_leftovers(self.folder)
        progress = self.folder / PROGRESS
        if progress.exists():
            self.durable = recover_progress(progress, self.config)
        else:
            commit.write_text(progress, progress_text(self.config, []))
        self._entries = dict(self.durable)
        self._queue: queue.Queue[tuple[int, dict[str, torch.Tensor], int] | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="nsae-store-writer", daemon=True)
        self._thread.start()

    @property
    def durable_shards(self) -> int:
        """How many shards are on disk, from this run and an earlier one of the same command."""
        return len(self._entries)

    @property
    def durable_rows(self) -> int:
        """How many rows an earlier run of the same command left complete."""
        return sum(entry.rows for entry in self.durable.values())

    def missing_from(self, index: int) -> int:
        """Number of the first shard, from `index` on, that an earlier run did not leave complete."""
        while index in self.durable:
            index += 1
        return index

    def write(self, index: int, tensors: dict[str, torch.Tensor], nonfinite_rows: int) -> None:
        """Queues a shard. `tensors` must not be changed afterwards. Raises what the background thread met."""
        self._raise_failure()
        self._queue.put((index, tensors, nonfinite_rows))

    def wait(self) -> None:
        """Waits until everything queued is durable."""
        if self._thread.is_alive():
            self._queue.put(None)
        self._thread.join()
        self._raise_failure()

    def finish(self, description: dict[str, Any]) -> Manifest:
        """Writes the manifest from `description` (its keys without rows and shards) and ends the store."""
        self.wait()
        entries = [self._entries[index] for index in sorted(self._entries)]
        if (gap := next((i for i, entry in enumerate(entries) if entry.file != shard_name(i)), None)) is not None:
            raise catalogue.SHARD_MISSING(
                f"{self.folder}: {shard_name(gap)} is missing; delete the folder and run again"
            )
        manifest = Manifest.model_validate(
            {
                "format_version": FORMAT_VERSION,
                **description,
                "rows": sum(entry.rows for entry in entries),
                "shards": [entry.model_dump() for entry in entries],
            }
        )
        sealed = commit.write_document(self.folder / MANIFEST, manifest.model_dump(exclude={"checksum"}))
        commit.remove_file(self.folder / PROGRESS)
        return Manifest.model_validate(sealed)

    def abandon(self) -> None:
        """Stops the background thread after the shard in hand; what is durable stays for the next run."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=60)
        self._thread.join(timeout=60)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is not None:
                continue  # drain, so that the producer never blocks on a dead writer
            try:
                self._commit_shard(*item)
            except BaseException as failure:
                self._failure = failure

    def _commit_shard(self, index: int, tensors: dict[str, torch.Tensor], nonfinite_rows: int) -> None:
        path = self.folder / shard_name(index)
        commit.write_tensors(path, tensors)
        entry = ShardEntry(
            file=path.name,
            rows=next(iter(tensors.values())).shape[0],
            bytes=path.stat().st_size,
            tensors={name: commit.tensor_sha256(tensor) for name, tensor in sorted(tensors.items())},
            nonfinite_rows=nonfinite_rows,
        )
        commit.append_line(self.folder / PROGRESS, _progress_line(entry))
        self._entries[index] = entry


def unneeded_files(folder: Path) -> list[Path]:
    """What a run that was killed right after it had completed the store left in its folder."""
    return [*commit.leftovers(folder), *folder.glob(PROGRESS)]


def _progress_line(entry: ShardEntry) -> str:
    return commit.to_json(seal(entry.model_dump()), indent=None)


def progress_text(config: dict[str, Any], entries: Iterable[ShardEntry]) -> str:
    """progress.jsonl of a store that is being written."""
    first = commit.to_json(seal({"config": config}), indent=None)
    return "".join(f"{line}\n" for line in (first, *map(_progress_line, entries)))


def recover_progress(progress: Path, config: dict[str, Any]) -> dict[int, ShardEntry]:
    """The durable shards of an interrupted run, by number.

    A shard whose line is torn or damaged, or whose file is gone, is left out, to be written again.

    Raises:
        ArtifactError: the first line, the configuration, is damaged.
        UsageError: the store was begun with another configuration.
    """
    earlier, entries, whole = read_progress(progress)
    if earlier != config:
        changed = describe_changes(earlier, config)
        raise catalogue.OPTIONS_CHANGED(
            f"{progress.parent.name} was begun with other options ({changed}); give the same, or another --name"
        )
    there = {
        index: entry for index, entry in entries.items() if presence.is_there(progress.parent / entry.file, entry.bytes)
    }
    if len(there) != len(entries) or not whole:
        commit.write_text(progress, progress_text(earlier, (there[index] for index in sorted(there))))
    return there


def read_progress(progress: Path) -> tuple[dict[str, Any], dict[int, ShardEntry], bool]:
    """What progress.jsonl says.

    Returns:
        The configuration; the shards by number, of the lines that are what was written; whether every line is.

    Raises:
        ArtifactError: the first line, the configuration, is damaged.
    """
    text = progress.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    try:
        first = commit.parse_json(lines[0], progress)
        earlier = first["config"]
        if not seal_fits(first) or not isinstance(earlier, dict):
            raise ValueError("its checksum differs")
    except (IndexError, ValueError, KeyError, TypeError, ArtifactError) as error:
        raise catalogue.PROGRESS_DAMAGED(
            f"{progress} is damaged; delete the folder {progress.parent.name} and run again"
        ) from error
    entries: dict[int, ShardEntry] = {}
    for line in lines[1:]:
        with contextlib.suppress(ValueError, ArtifactError):
            document = commit.parse_json(line, progress)
            if is_sealed(document) and seal_fits(document):
                entry = ShardEntry.model_validate(document)
                if (named := _SHARD_NAME.fullmatch(entry.file)) is not None:
                    entries[int(named[1])] = entry
    return earlier, entries, len(entries) == len(lines) - 1 and text.endswith("\n")


def describe_changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """``--batch-size 8 -> 16, …``: every option in which two configurations differ."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"--{key.replace('_', '-')} {_show(old.get(key))} -> {_show(new.get(key))}" for key in keys)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_show(item) for item in value)
    return "none" if value is None else str(value)


class ActivationStore:
    """A complete activation store, opened for reading.

    Attributes:
        path: the folder.
        manifest: its validated manifest.
        manifest_sha256: SHA-256 of the manifest file; identifies the content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest, self.manifest_sha256 = read_manifest(path)
        self._verified = _VerifiedTensors(path / VERIFIED)
        self._checked: set[tuple[int, str]] = set()
        self._first_names: set[str] | None = None
        self._computed_norms: dict[tuple[int, str], torch.Tensor] = {}
        self._row_tensors: dict[tuple[int, str], torch.Tensor] = {}
        self._cache_left = _CACHE_BYTES

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def has_positions(self) -> bool:
        """Whether rows carry their position in the context (without it sink rule 1 and contexts are off)."""
        return self.has("positions")

    @property
    def has_tokens(self) -> bool:
        """Whether rows carry their token id."""
        return self.has("tokens")

    def has(self, tensor: str) -> bool:
        """Whether the shards hold a tensor of that name."""
        # A foreign manifest may list no tensors: then the first shard itself is asked.
        if not self.manifest.shards:
            return False
        first = self.manifest.shards[0]
        if first.tensors is not None:
            return tensor in first.tensors
        if self._first_names is None:
            with self._open(0) as file:
                self._first_names = set(file.keys())
        return tensor in self._first_names

    @contextlib.contextmanager
    def _open(self, shard: int) -> Iterator[Any]:
        entry = self.manifest.shards[shard]
        path = self.path / entry.file
        remedy = self._remedy()
        if path.is_symlink():
            raise catalogue.SHARD_LINK(
                f"{path} is a symbolic link; a store's shards must be files of its own, copy it there"
            )
        presence.bring(path)
        if not path.is_file():
            raise catalogue.SHARD_MISSING(f"{path}: the file is missing; {remedy}")
        size = path.stat().st_size
        if entry.bytes is not None and size != entry.bytes:
            raise catalogue.SHARD_SIZE(f"{path}: {size:,} bytes, expected {entry.bytes:,}; {remedy}")
        try:
            # pread, not mmap: a file that shrinks under a memory map kills the process without a word.
            with safe_open(path, framework="pt", backend="pread") as file:
                yield file
        except (SafetensorError, OSError) as error:
            commit.refuse_unread(error, path)
            raise catalogue.SHARD_UNREADABLE(
                f"{path}: not a readable safetensors file ({str(error).splitlines()[0]}); {remedy}"
            ) from error

    def read(self, shard: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Reads tensors of one shard, their hashes checked the first time that this version of the file is read.

        Args:
            shard: index into `manifest.shards`.
            names: hook names, ``tokens``, ``positions``, ``documents`` or ``norms``.

        Raises:
            ArtifactError: missing tensor, wrong shape or dtype, wrong hash, unreadable file.
            NumericalError: vectors of a store from elsewhere that are not finite.
        """
        entry = self.manifest.shards[shard]
        with self._open(shard) as file:
            present = set(file.keys())
            missing = [name for name in names if name not in present]
            if missing:
                raise catalogue.SHARD_MISMATCH(
                    f"{self.path / entry.file}: no tensor {missing[0]!r}; it holds {sorted(present)}; "
                    f"collect the store again"
                )
            tensors = {name: file.get_tensor(name) for name in names}
        for name, tensor in tensors.items():
            self._check(entry, name, tensor)
            if (shard, name) not in self._checked:
                self._refuse_non_finite(entry, name, tensor)
            self._checked.add((shard, name))
        return tensors

    def read_rows(self, shard: int, hook: str, keep: torch.Tensor) -> torch.Tensor:
        """The vectors of the rows of a shard that `keep` (bool [rows]) selects, [kept rows, d_in].

        A few rows of a tensor that was checked before are read without the others.

        Raises:
            ArtifactError: as `read`.
        """
        known = (shard, hook) in self._checked or self._verified.knows(
            self.path / self.manifest.shards[shard].file, hook
        )
        if not known or int(keep.sum()) > _FEW_ROWS * len(keep):
            return self.read(shard, [hook])[hook][keep]
        kept = keep.nonzero().squeeze(1)
        if not len(kept):
            return torch.empty(0, self.manifest.d_in, dtype=self.manifest.torch_dtype)
        breaks = (kept.diff() != 1).nonzero().squeeze(1) + 1
        with self._open(shard) as file:
            rows = file.get_slice(hook)
            runs = [rows[int(run[0]) : int(run[-1]) + 1] for run in kept.tensor_split(breaks)]
        return torch.cat(runs)

    def _remedy(self) -> str:
        """What to do about a damaged shard, for messages."""
        if self.manifest.command is None and not self.manifest.altered:
            return "the shard is damaged; get it again from where the store came from"
        command = "alter" if self.manifest.altered else "collect"
        repair = f"run `nsae verify --repair {self.path}`, then the same `nsae {command}` again"
        return f"{repair}: only this shard is made anew"

    def _check(self, entry: ShardEntry, name: str, tensor: torch.Tensor) -> None:
        shape, dtypes = self.manifest.layout(name, entry.rows)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise catalogue.SHARD_MISMATCH(
                f"{self.path / entry.file}: {name} is {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, "
                f"the manifest says {list(shape)} {str(dtypes[0]).removeprefix('torch.')}; collect the store again"
            )
        if entry.tensors is None or name not in entry.tensors:
            return
        if not self._verified.knows(self.path / entry.file, name):
            if commit.tensor_sha256(tensor) != entry.tensors[name]:
                remedy = self._remedy()
                raise catalogue.CONTENT_CHANGED(
                    f"{self.path / entry.file}: the content of {name} is not what was written (SHA-256 differs); "
                    f"{remedy}"
                )
            self._verified.remember(self.path / entry.file, name)

    def _refuse_non_finite(self, entry: ShardEntry, name: str, tensor: torch.Tensor) -> None:
        """Looks at the vectors of a shard that nobody has vouched for, whatever norms are stored beside them."""
        if entry.nonfinite_rows is not None or name not in self.manifest.hooks or bool(torch.isfinite(tensor).all()):
            return
        bad = (~torch.isfinite(tensor)).any(dim=1).nonzero().squeeze(1)
        raise catalogue.STORE_NOT_FINITE(
            f"{self.name}: {len(bad):,} rows at {name} are not finite, the first is row {int(bad[0]):,} of "
            f"{entry.file}; collect again with --dtype fp32, or leave such rows out of the store"
        )

    def norms(self, shard: int, hook: str) -> torch.Tensor:
        """‖x‖₂ of the raw rows at `hook`, float32 [rows]: the stored ones, or computed where a store has none."""
        if self.has_stored_norms(hook):
            norm_hooks = self.manifest.norm_hooks or []
            return self._read_row_tensor(shard, "norms")[:, norm_hooks.index(hook)].contiguous()
        # Only foreign stores come here; 4 bytes a row are kept so that their vectors are read once, not once a pass.
        if (shard, hook) not in self._computed_norms:
            vectors = self.read(shard, [hook])[hook].float()
            self._computed_norms[shard, hook] = torch.linalg.vector_norm(vectors, dim=1)
        return self._computed_norms[shard, hook]

    def has_stored_norms(self, hook: str) -> bool:
        """Whether the norms at `hook` were written when the activations were collected."""
        return hook in (self.manifest.norm_hooks or []) and self.has("norms")

    def positions(self, shard: int) -> torch.Tensor | None:
        """Position of each row in the context fed to the model, int64 [rows]; None where the store has none."""
        return self._read_row_tensor(shard, "positions").long() if self.has_positions else None

    def tokens(self, shard: int) -> torch.Tensor | None:
        """Token id of each row, int64 [rows]; None where the store has none."""
        return self._read_row_tensor(shard, "tokens").long() if self.has_tokens else None

    def _read_row_tensor(self, shard: int, name: str) -> torch.Tensor:
        key = (shard, name)
        if key not in self._row_tensors:
            tensor = self.read(shard, [name])[name]
            if tensor.nbytes > self._cache_left:
                return tensor
            self._cache_left -= tensor.nbytes
            self._row_tensors[key] = tensor
        return self._row_tensors[key]


class _VerifiedTensors:
    """Remembers which tensors of which file version were found intact: one line each, in a file beside the manifest.

    Losing it, or a torn line, costs one more hash; a folder that cannot be written is therefore no error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[str] = set()
        with contextlib.suppress(OSError):
            self._known.update(path.read_text(encoding="utf-8", errors="replace").splitlines())

    @staticmethod
    def _line(path: Path, tensor: str) -> str:
        status = path.stat()
        version = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
        return json.dumps({"file": path.name, "tensor": tensor, **version})

    def knows(self, path: Path, tensor: str) -> bool:
        with contextlib.suppress(OSError):
            return self._line(path, tensor) in self._known
        return False

    def remember(self, path: Path, tensor: str) -> None:
        with contextlib.suppress(OSError):
            line = self._line(path, tensor)
            self._known.add(line)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def open_activations(path: Path | str) -> ActivationStore:
    """Opens a complete activation store, written by nsae or by anything that follows docs/formats.md.

    Raises:
        ArtifactError: the store is missing, unfinished or damaged.
    """
    return ActivationStore(Path(path))

"""Reading an activation store with its content checked. `store.writer` writes one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nsae_cli import catalogue
from nsae_cli.store import commit, presence
from nsae_cli.store.manifest import ShardEntry, read_manifest
from nsae_cli.store.verified import VERIFIED, HashAhead, VerifiedTensors

#: Norms, positions and tokens of this many bytes are kept in memory: passes over a store read them again and again.
_CACHE_BYTES = 256 * 2**20
#: Up to this share of a shard's rows, they are read one run at a time instead of the whole tensor.
_FEW_ROWS = 0.25


def shard_name(index: int) -> str:
    """File name of a store's shard."""
    return f"shard-{index:05d}.safetensors"


def describe_changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """``--batch-size 8 -> 16, …``: every option in which two configurations differ."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"--{key.replace('_', '-')} {_show(old.get(key))} -> {_show(new.get(key))}" for key in keys)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_show(item) for item in value)
    return "none" if value is None else str(value)


def shards_text(number: int) -> str:
    """``1 shard``, ``2 shards``."""
    return "1 shard" if number == 1 else f"{number} shards"


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
        self._verified = VerifiedTensors(path / VERIFIED)
        self._ahead = HashAhead(self._verified)
        self._checked: set[tuple[int, str]] = set()
        self._first_names: set[str] | None = None
        self._computed_norms: dict[tuple[int, str], torch.Tensor] = {}
        self._row_tensors: dict[tuple[int, str], torch.Tensor] = {}
        self._cache_left = _CACHE_BYTES
        self._last_read, self._in_order = -1, True

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
        self._hash_ahead(shard, names)
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
        self._hash_ahead(shard, [hook])
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

    def _hash_ahead(self, shard: int, names: Sequence[str]) -> None:
        """Waits for what is being hashed of a shard; while shards are read one after the other, begins on the next."""
        entries = self.manifest.shards
        self._ahead.wait_for(self.path / entries[shard].file)
        if shard != self._last_read:
            self._in_order, self._last_read = shard == self._last_read + 1, shard
        if self._in_order and shard + 1 < len(entries):
            following = entries[shard + 1]
            expected = {name: sha256 for name, sha256 in (following.tensors or {}).items() if name in names}
            self._ahead.begin(self.path / following.file, expected)

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
            with contextlib.suppress(OSError):  # gone since it was read: nothing to remember
                self._verified.remember(self._verified.version(self.path / entry.file, name))

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


def open_activations(path: Path | str) -> ActivationStore:
    """Opens a complete activation store, written by nsae or by anything that follows docs/formats.md.

    Raises:
        ArtifactError: the store is missing, unfinished or damaged.
    """
    return ActivationStore(Path(path))

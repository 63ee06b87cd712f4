"""The manifest of an activation store: what is in it, validated when read.

Required of any store, also one that another tool wrote: `format_version`, `hooks`, `d_in`, `dtype`, `rows`, `shards`.
Everything else is what `nsae collect` records and may be null or absent elsewhere. See docs/formats.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nsae_cli import catalogue
from nsae_cli.store.commit import file_sha256, read_json
from nsae_cli.store.seal import is_plain_name

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ShardEntry(_Frozen):
    """One safetensors file of the store."""

    file: str = Field(description="file name inside the store's folder")
    rows: Annotated[int, Field(ge=0)]
    bytes: int | None = Field(default=None, description="file size")
    tensors: dict[str, str] | None = Field(default=None, description="SHA-256 of each tensor's bytes")
    nonfinite_rows: int | None = Field(default=None, description="rows that hold NaN or infinity")

    @field_validator("file")
    @classmethod
    def _stays_in_the_folder(cls, name: str) -> str:
        if not is_plain_name(name):
            raise ValueError(f"the name {name[:80]!r} leaves the folder or is not a plain file name")
        return name


class Manifest(_Frozen):
    """`manifest.json`. Dtypes are torch's names (float16, bfloat16, float32)."""

    format_version: int
    hooks: Annotated[list[str], Field(min_length=1)]
    d_in: Annotated[int, Field(ge=1)]
    dtype: Literal["float16", "bfloat16", "float32"]
    rows: Annotated[int, Field(ge=0)]
    shards: list[ShardEntry]

    norm_hooks: list[str] | None = None
    model: str | None = None
    model_sha256: str | None = None
    revision: str | None = None
    n_layers: int | None = None
    model_type: str | None = None
    tokenizer: dict[str, Any] | None = None
    special_token_ids: list[int] | None = None
    corpus: dict[str, Any] | None = None
    site: str | None = None
    context_size: int | None = None
    packing: bool | None = None
    bos: bool | None = None
    model_dtype: str | None = None
    dropped: dict[str, int] | None = None
    versions: dict[str, str] | None = None
    command: dict[str, Any] | None = None
    altered: list[dict[str, Any]] | None = Field(default=None, description="what `nsae alter` did, oldest first")
    checksum: str | None = Field(default=None, description="the seal, see `store.seal`; checked when it is read")

    @field_validator("format_version")
    @classmethod
    def _known_format(cls, version: int) -> int:
        if version != FORMAT_VERSION:
            raise ValueError(f"format {version} was written by another nsae; this one reads format {FORMAT_VERSION}")
        return version

    @model_validator(mode="after")
    def _rows_add_up(self) -> Manifest:
        total = sum(shard.rows for shard in self.shards)
        if total != self.rows:
            raise ValueError(f"rows is {self.rows} but the shards hold {total}")
        for label, names in (("hooks", self.hooks), ("shards", [shard.file for shard in self.shards])):
            if len(set(names)) != len(names):
                raise ValueError(f"{label} names one entry twice")
        return self

    def layout(self, tensor: str, rows: int) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
        """Shape of a tensor in a shard of so many rows, and the dtypes that it may have; the first is the usual one."""
        if tensor in self.hooks:
            return (rows, self.d_in), (self.torch_dtype,)
        if tensor == "norms":
            return (rows, len(self.norm_hooks or [])), (torch.float32,)
        return (rows,), (torch.int32, torch.int64, torch.int16)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The storage dtype."""
        return DTYPES[self.dtype]


def describe_alterations(manifest: Manifest) -> str | None:
    """What was done to the norms of a store, for people; None where they are as they were harvested."""
    if not manifest.altered:
        return None
    texts = []
    for change in manifest.altered:
        how = f"seed {change.get('seed')}" if "seed" in change else f"k = {change.get('k'):g}"
        texts.append(f"{change.get('change')} ({how}) of {change.get('activations')}")
    return "norms were altered: " + ", then ".join(texts)


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Reads and validates a store's manifest.

    Returns:
        The manifest and the SHA-256 of its file, which identifies the store's content.

    Raises:
        ArtifactError: missing (with the reason: not a store, or not finished), damaged, or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        # One for each worker; counted as they stand, without a look at the shards.
        if progress := [path for path in folder.glob("progress*.jsonl") if path.is_file()]:
            lines = (path.read_text(encoding="utf-8", errors="replace").splitlines() for path in progress)
            done = sum(max(0, len(one) - 1) for one in lines)
            raise catalogue.UNFINISHED(
                f"{folder.name} is not finished ({done} shards so far); run the same command again"
            )
        raise catalogue.NOT_AN_ARTIFACT(
            f"{folder} holds no {MANIFEST}: it is not an activation store; make one with `nsae collect`"
        )
    try:
        manifest = Manifest.model_validate(read_json(path))
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors()[:3])
        raise catalogue.MANIFEST_INVALID(
            f"{path}: {problems}; the manifest is damaged or of another version, collect the store again"
        ) from error
    return manifest, file_sha256(path)


def _describe(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message

"""Documents, one by one, from wherever ``--corpus`` points.

A source is described by a `Corpus`: who it is (name, split, hash or revision) and how to read it from the start.
Nothing is read ahead: memory holds one document (parquet: a few hundred) whatever the corpus's size.
"""

from __future__ import annotations

import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import HTTPError

from nsae_cli import assets, catalogue
from nsae_cli.lm.hub import ask_hub, looks_like_hub_id
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.lm.records import OPTIONS, Column, Content, Document
from nsae_cli.store.commit import file_sha256

BUILTIN = "builtin"
#: Plain web text in parquet files, which every current `datasets` reads; streamed, so only what is used is downloaded.
DEFAULT_HUB_CORPUS = ("HuggingFaceFW/fineweb", "sample-10BT")
DEFAULT_TEXT_COLUMN = "text"

_PARQUET_ROWS = 256
_HUB_REMEDY = "use --corpus builtin, which needs no network, or give a file"


@dataclass(frozen=True)
class CorpusChoice:
    """``--corpus`` and its companions as given; None where not given."""

    name: str
    config: str | None = None
    split: str | None = None
    text_column: str | None = None
    chat_column: str | None = None
    tokens_column: str | None = None

    @property
    def column(self) -> Column:
        """Where the documents are.

        Raises:
            UsageError: more than one column is named.
        """
        named: list[tuple[str | None, Content]] = [
            (self.text_column, "text"),
            (self.chat_column, "chat"),
            (self.tokens_column, "tokens"),
        ]
        given = [(name, content) for name, content in named if name is not None]
        if len(given) > 1:
            names = " and ".join(f"{OPTIONS[content]} {name}" for name, content in given)
            raise catalogue.REFUSED_COMBINATION(f"{names}: the documents are in one column; give one of them")
        return Column(*(given[0] if given else (DEFAULT_TEXT_COLUMN, "text")))


@dataclass(frozen=True)
class Corpus:
    """A readable corpus.

    Attributes:
        name: builtin, a file's or folder's base name, or a hub id.
        config: configuration of a hub data set.
        split: of the built-in corpus and of hub data sets.
        sha256: of the content; None for hub data sets.
        revision: commit of a hub data set, where the hub told it.
        text_bytes: about how much text it holds; None where unknown.
        documents: starts reading from the first document.
        column: where the documents are; of the built-in corpus and .txt files it has no meaning.
    """

    name: str
    config: str | None
    split: str | None
    sha256: str | None
    revision: str | None
    text_bytes: int | None
    documents: Callable[[], Iterator[Document]]
    column: Column = field(default=Column(DEFAULT_TEXT_COLUMN))

    @property
    def content(self) -> Content:
        """What its documents are."""
        return self.column.content

    @property
    def identity(self) -> dict[str, str | None]:
        """What the manifest records."""
        return {
            "name": self.name,
            "config": self.config,
            "split": self.split,
            "sha256": self.sha256,
            "revision": self.revision,
            **self.other_column,
        }

    @property
    def other_column(self) -> dict[str, str | None]:
        """``{"chat_column": …}`` or ``{"tokens_column": …}``; empty for text."""
        return {} if self.content == "text" else {f"{self.content}_column": self.column.name}


def default_corpus(embedded_model: bool) -> CorpusChoice:
    """The built-in corpus for the embedded models, a web corpus from the hub for others."""
    return CorpusChoice(BUILTIN) if embedded_model else CorpusChoice(*DEFAULT_HUB_CORPUS)


def open_corpus(choice: CorpusChoice) -> Corpus:
    """Finds a corpus: ``builtin``, a file or folder of .txt, .jsonl and .parquet, else a hub data set.

    Raises:
        UsageError: no such file, unknown kind of file, empty folder, an option that the source does not have, unknown
            configuration or split.
        ResourceError: the hub is not reachable or has no such data set.
    """
    if choice.name == BUILTIN:
        _refuse(choice, "the built-in corpus", config=choice.config, **_columns(choice))
        return _builtin(choice)
    if Path(choice.name).exists():
        _refuse(choice, "a local corpus", config=choice.config, split=choice.split)
        return _local(choice)
    if not looks_like_hub_id(choice.name) or Path(choice.name).suffix in _READERS:
        raise catalogue.CORPUS_NOT_FOUND(f"--corpus {choice.name}: no such file or folder; check the path")
    return _hub(choice)


def _refuse(choice: CorpusChoice, what: str, **options: str | None) -> None:
    given = [
        f"{'--corpus-config' if key == 'config' else '--' + key.replace('_', '-')} {value}"
        for key, value in options.items()
        if value is not None
    ]
    if given:
        raise catalogue.OPTION_WITHOUT_EFFECT(
            f"{' and '.join(given)}: {what} ({choice.name}) has no such choice; leave the option out"
        )


def _columns(choice: CorpusChoice) -> dict[str, str | None]:
    return {key: getattr(choice, key) for key in ("text_column", "chat_column", "tokens_column")}


def _builtin(choice: CorpusChoice) -> Corpus:
    split = choice.split or assets.BUILTIN_SPLITS[0]
    if split not in assets.BUILTIN_SPLITS:
        raise catalogue.OPTION_VALUE(f"--split {split}: the built-in corpus has {', '.join(assets.BUILTIN_SPLITS)}")
    digest, size = hashlib.sha256(), 0
    for text in assets.builtin_documents(split):
        content = text.encode("utf-8")
        digest.update(content + b"\0")
        size += len(content)
    return Corpus(BUILTIN, None, split, digest.hexdigest(), None, size, lambda: assets.builtin_documents(split))


# Local files --------------------------------------------------------------------------------------------------------


def _local(choice: CorpusChoice) -> Corpus:
    root = Path(choice.name)
    files = [root] if root.is_file() else sorted(_corpus_files(root))
    kinds = ", ".join(_READERS)
    if not files:
        raise catalogue.CORPUS_NOT_FOUND(f"--corpus {choice.name}: the folder holds no {kinds} file; check the path")
    if files[0].suffix not in _READERS:
        raise catalogue.CORPUS_FORMAT(
            f"--corpus {choice.name}: unknown kind of file; known are {kinds} and folders of these"
        )
    column = choice.column
    plain = next((path for path in files if path.suffix == ".txt"), None)
    if column.content != "text" and plain is not None:
        raise catalogue.OPTION_WITHOUT_EFFECT(
            f"{OPTIONS[column.content]} {column.name}: {plain.name} is plain text and has no columns; leave the option "
            f"out, or give .jsonl or .parquet files"
        )

    def documents() -> Iterator[Document]:
        for path in files:
            try:
                yield from _READERS[path.suffix](path, column)
            except OSError as error:
                raise catalogue.READ_FAILED(
                    f"--corpus {path.name}: cannot be read ({error.strerror or error}); check its permissions"
                ) from error

    try:
        sha256 = file_sha256(root) if root.is_file() else _folder_sha256(root, files)
        size = sum(path.stat().st_size for path in files if path.suffix != ".parquet")
    except OSError as error:
        raise catalogue.READ_FAILED(
            f"--corpus {choice.name}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    # Parquet is compressed, so its size says little; so does that of messages and numbers written out.
    unknown = column.content != "text" or any(path.suffix == ".parquet" for path in files)
    return Corpus(root.resolve().name, None, None, sha256, None, None if unknown else size, documents, column)


def _corpus_files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.suffix in _READERS and path.is_file())


def refuse_output_in_corpus(choice: CorpusChoice, workspace: Path) -> None:
    """What is written below a corpus's folder would be text of it when the same command is run again.

    Raises:
        UsageError: the workspace lies in the folder that ``--corpus`` names.
    """
    root = Path(choice.name)
    if choice.name == BUILTIN or not root.is_dir():
        return
    root, place = root.resolve(), workspace.resolve()
    if root == place or root in place.parents:
        raise catalogue.OUTPUT_IS_INPUT(
            f"--corpus {choice.name} holds the workspace {workspace}, whose files would become text; choose a "
            f"--workspace outside of it"
        )


def _folder_sha256(root: Path, files: list[Path]) -> str:
    """SHA-256 over ``<hash>  <path in the folder>`` lines, as ``sha256sum`` prints them."""
    lines = (f"{file_sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in files)
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def _read_txt(path: Path, column: Column) -> Iterator[Document]:
    try:
        yield path.read_bytes().removeprefix(BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise catalogue.CORPUS_ENCODING(
            f"corpus {path.name} is not UTF-8 text (byte {error.start:,}); convert it to UTF-8"
        ) from error


def _read_jsonl(path: Path, column: Column) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path.name} line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads((line.removeprefix(BOM_UTF8) if number == 1 else line).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise catalogue.CORPUS_ENCODING(
                    f"corpus {place} is not UTF-8 text; convert the file to UTF-8"
                ) from error
            except (ValueError, RecursionError) as error:
                raise catalogue.CORPUS_FORMAT(
                    f"corpus {place} is not JSON; a .jsonl file holds one object per line"
                ) from error
            if not isinstance(record, dict):
                raise catalogue.CORPUS_FORMAT(
                    f"corpus {place} is not a JSON object; a .jsonl file holds one object per line"
                )
            yield column.of(record, place)


def _read_parquet(path: Path, column: Column) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column.name not in names:
                raise column.missing(path.name, names)
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column.name]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield column.of({column.name: value}, f"{path.name} row {row}")
    except pyarrow.ArrowException as error:
        raise catalogue.CORPUS_FORMAT(
            f"corpus {path.name} is not a readable parquet file ({str(error).splitlines()[0]}); get it again"
        ) from error


_READERS: dict[str, Callable[[Path, Column], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# The hub ------------------------------------------------------------------------------------------------------------


def _hub(choice: CorpusChoice) -> Corpus:
    column = choice.column
    split = choice.split or "train"
    with quiet_libraries():
        found = ask_hub("dataset", choice.name, None, _HUB_REMEDY)
    if not found.reachable:
        raise catalogue.HUB_UNREACHABLE(f"--corpus {choice.name}: the Hugging Face hub is not reachable; {_HUB_REMEDY}")

    def documents() -> Iterator[Document]:
        import datasets

        datasets.disable_progress_bars()
        try:
            # Streaming, so that only what is used is downloaded; the commit, so that a resumed run reads the same.
            rows = datasets.load_dataset(choice.name, choice.config, split=split, streaming=True, revision=found.commit)
            for number, row in enumerate(rows):
                # What is wrong with the first text is wrong with the choice of the column.
                place = choice.name if number == 0 and column.content == "text" else f"{choice.name} row {number + 1}"
                yield column.of(row, place)
        except (HTTPError, OSError) as error:
            raise catalogue.DOWNLOAD_FAILED(
                f"--corpus {choice.name}: reading from the hub failed ({type(error).__name__}); "
                f"run the same command again, or {_HUB_REMEDY}"
            ) from error
        except (ValueError, RuntimeError) as error:
            # Unknown configuration or split (datasets lists the known ones), or a data set that needs a script.
            reason = " ".join(str(error).split())[:300]
            raise catalogue.CORPUS_CHOICE(
                f"--corpus {choice.name}: {reason}; check --corpus-config and --split"
            ) from error

    return Corpus(choice.name, choice.config, split, None, found.commit, None, documents, column)

"""Build the built-in corpus from the standard library of the running CPython.

    python build_corpus.py [--out DIR]

Documents are the help topics of `pydoc_data`, docstrings, and top-level functions and classes. Nothing is written
twice: a docstring long enough to be a document of its own is cut out of the source it came from.

The split is by *unit* - a top-level module or package (with all its submodules), or one help topic - so a held-out
document never has a sibling in train. On top of that, held-out documents that repeat train text are dropped.

The text depends on the CPython patch release, so the committed files are the source of truth: the later scripts
read those, and running this one again on another release gives a slightly different corpus.
"""

import argparse
import ast
import json
import lzma
import platform
import random
import shutil
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
ASSETS = Path(__file__).resolve().parents[2] / "src" / "nsae_cli" / "assets"

# Tests are repetitive, encodings are tables, topics are read apart from their module.
SKIPPED_DIRS = {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
# Files with a licence notice of their own are left out, so that the one LICENSE file covers every document.
FOREIGN_LICENCE = ("Permission to use", "Permission is hereby", "Redistribution and use", "freely, subject")

SEED = 0
HELDOUT_SHARE = 0.05
MIN_DOCSTRING_CHARS = 60
MIN_SOURCE_CHARS = 200
TOPIC_PIECE_CHARS = 4000
SOURCE_PIECE_CHARS = 3000
SHINGLE_WORDS = 13
MAX_SHARED_SHINGLES = 0.2


@dataclass(frozen=True)
class Document:
    """One text, with what it is and the unit of the split it belongs to."""

    unit: str
    kind: str  # "topic", "docstring" or "source"
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS / "builtin", help="folder of the corpus files")
    args = parser.parse_args()

    documents = drop_repeats([*topic_documents(), *module_documents()])
    train, heldout = split_by_unit(documents)
    n_before = len(heldout)
    heldout = drop_overlap(heldout, train)

    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    for name, split in (("train", train), ("heldout", heldout)):
        rng.shuffle(split)  # neighbours in the packed token stream should not come from one module
        write_jsonl(args.out / f"{name}.jsonl.xz", split)
    shutil.copyfile(STDLIB / "LICENSE.txt", args.out / "LICENSE")
    (args.out / "README.md").write_text(readme(train, heldout, n_before - len(heldout)), encoding="utf-8")


def topic_documents() -> Iterator[Document]:
    """Help topics (`help("with")`), each one a unit, long ones cut into pieces."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        for piece in pieces(text, TOPIC_PIECE_CHARS):
            yield Document(f"help topic {name}", "topic", piece)


def module_documents() -> Iterator[Document]:
    """Docstrings and top-level definitions of every pure-Python module that this corpus takes."""
    for path in sorted(STDLIB.rglob("*.py")):
        relative = path.relative_to(STDLIB)
        if SKIPPED_DIRS.intersection(relative.parts) or is_generated(relative):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # lib2to3 ships Python 2 files
            continue
        if not any(notice in source for notice in FOREIGN_LICENCE):
            yield from documents_of(relative, source, tree)


def is_generated(relative: Path) -> bool:
    """Build configuration names the machine that CPython was built on, so it is no part of the corpus."""
    return relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")


def documents_of(relative: Path, source: str, tree: ast.Module) -> Iterator[Document]:
    """Documents of one module; `relative` is its path below the standard library."""
    unit = relative.parts[0].removesuffix(".py")
    lines = source.splitlines(keepends=True)
    moved: set[int] = set()  # 0-based lines of docstrings that became documents of their own
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or len(docstring) < MIN_DOCSTRING_CHARS:
            continue
        yield Document(unit, "docstring", f"{heading(node, relative)}\n{docstring}")
        if len(node.body) > 1:  # a body needs at least one statement, so a lone docstring stays
            moved.update(range(node.body[0].lineno - 1, node.body[0].end_lineno))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            text = "".join(lines[i] for i in range(first, node.end_lineno) if i not in moved)
            if len(text) >= MIN_SOURCE_CHARS:
                for piece in pieces(text, SOURCE_PIECE_CHARS):
                    yield Document(unit, "source", piece)


def heading(node: ast.AST, relative: Path) -> str:
    """What a docstring describes, as one line of code."""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"def {node.name}({ast.unparse(node.args)})"
    return "module " + ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def pieces(text: str, target_chars: int) -> Iterator[str]:
    """Cut `text` at empty lines into pieces that end as soon as they reach `target_chars`."""
    piece = ""
    for paragraph in text.strip().split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= target_chars:
            yield piece.rstrip()
            piece = ""
    if piece.strip():
        yield piece.rstrip()


def drop_repeats(documents: Iterable[Document]) -> list[Document]:
    """Keep the first of all documents that are equal up to white space."""
    first: dict[str, Document] = {}
    for document in documents:
        first.setdefault(" ".join(document.text.split()), document)
    return list(first.values())


def split_by_unit(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Train and held-out documents: whole units, drawn at random until `HELDOUT_SHARE` of the characters is reached."""
    chars = Counter()
    for document in documents:
        chars[document.unit] += len(document.text)
    target = HELDOUT_SHARE * chars.total()
    units = sorted(chars)
    random.Random(SEED).shuffle(units)
    heldout_units, taken = set(), 0
    for unit in units:
        # A large package (tkinter, idlelib) would make up most of the held-out text: at most a tenth of it each.
        if chars[unit] <= target / 10 and taken + chars[unit] <= target:
            heldout_units.add(unit)
            taken += chars[unit]
    train = [document for document in documents if document.unit not in heldout_units]
    heldout = [document for document in documents if document.unit in heldout_units]
    return train, heldout


def drop_overlap(heldout: list[Document], train: list[Document]) -> list[Document]:
    """Held-out documents of whose 13-word shingles at most a fifth also occur in train (shared boilerplate stays)."""
    seen = set()
    for document in train:
        seen |= shingles(document.text)
    return [d for d in heldout if len(shingles(d.text) & seen) <= MAX_SHARED_SHINGLES * len(shingles(d.text))]


def shingles(text: str) -> set[str]:
    """All runs of `SHINGLE_WORDS` words, white space normalised."""
    words = text.split()
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def write_jsonl(path: Path, documents: list[Document]) -> None:
    """One `{"text": ...}` per line, xz-compressed."""
    with lzma.open(path, "wt", encoding="utf-8", preset=9) as file:
        for document in documents:
            file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")


def readme(train: list[Document], heldout: list[Document], n_overlapping: int) -> str:
    """The corpus card, with the counts of this build."""
    rows = []
    for name, split in (("train", train), ("heldout", heldout)):
        kinds = Counter(document.kind for document in split)
        chars = sum(len(document.text) for document in split)
        size = sum(len(document.text.encode()) for document in split)
        units = len({document.unit for document in split})
        counts = " | ".join(str(kinds[kind]) for kind in ("topic", "docstring", "source"))
        rows.append(f"| `{name}` | {len(split)} | {counts} | {units} | {chars} | {size} |")
    heldout_units = ", ".join(sorted({document.unit for document in heldout}))
    return f"""# The built-in corpus

Text of the standard library of CPython {platform.python_version()}: help topics, docstrings, and top-level functions
and classes, under the PSF licence (`LICENSE`, copied from that installation). Written by
`experiments/000-mini-model/build_corpus.py`; these files are the source of truth for everything trained on them.

One document per line: `{{"text": "..."}}`, xz-compressed, in shuffled order.

| split | documents | help topics | docstrings | source | units | characters | bytes (UTF-8) |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

- **Split.** By unit: a top-level module or package with all its submodules, or one help topic. No unit is in both
  splits, so held-out text is from modules that a model of `train` has not seen.
- **Repeats.** Documents equal up to white space are kept once. A docstring of {MIN_DOCSTRING_CHARS} characters or
  more is a document of its own and is cut out of its source document. {n_overlapping} held-out documents were dropped
  since more than {MAX_SHARED_SHINGLES:.0%} of their {SHINGLE_WORDS}-word runs also occur in train.
- **Length.** Topics are cut at empty lines after {TOPIC_PIECE_CHARS} characters, source after {SOURCE_PIECE_CHARS}.
- **Left out.** Tests, encodings, build configuration, and every file that carries a licence notice of its own.

{textwrap.fill(f"Held-out units: {heldout_units}.", 118)}
"""


if __name__ == "__main__":
    main()

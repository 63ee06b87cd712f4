from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import HfApi

from nsae_cli import assets
from nsae_cli.errors import NsaeError, ResourceError, UsageError
from nsae_cli.lm.corpus import DEFAULT_HUB_CORPUS, CorpusChoice, default_corpus, open_corpus

TEXTS = ["first\r\nline", "", "naïve → 🙂", "   "]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "id": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def read(path: Path | str, **options: str) -> list[str]:
    return list(open_corpus(CorpusChoice(str(path), **options)).documents())


def test_txt_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n")
    assert read(path) == ["one\r\ntwo\n"]


def test_jsonl_is_one_document_per_line(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", TEXTS)) == TEXTS
    assert read(write_jsonl(tmp_path / "b.jsonl", TEXTS, "content"), text_column="content") == TEXTS


def test_parquet_rows_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None], "n": list(range(5))}), path, row_group_size=2)
    assert read(path) == [*TEXTS, ""]


def test_folder_by_sorted_path(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("third")
    (tmp_path / "c.txt").write_text("fourth")
    (tmp_path / "notes.md").write_text("not a corpus file")
    write_jsonl(tmp_path / "a.jsonl", ["first", "second"])
    corpus = open_corpus(CorpusChoice(str(tmp_path)))
    assert list(corpus.documents()) == ["first", "second", "third", "fourth"]
    assert corpus.name == tmp_path.name


def test_documents_can_be_read_again(tmp_path: Path) -> None:
    corpus = open_corpus(CorpusChoice(str(write_jsonl(tmp_path / "a.jsonl", TEXTS))))
    assert list(corpus.documents()) == list(corpus.documents()) == TEXTS


def test_identity_is_name_and_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"some text")
    first = open_corpus(CorpusChoice(str(path))).identity
    assert first["name"] == "a.txt"
    assert first["sha256"] == hashlib.sha256(b"some text").hexdigest()
    path.write_bytes(b"other text")
    assert open_corpus(CorpusChoice(str(path))).identity["sha256"] != first["sha256"]


def test_folder_identity_notices_content_and_names(tmp_path: Path) -> None:
    def identity() -> str | None:
        return open_corpus(CorpusChoice(str(tmp_path))).sha256

    (tmp_path / "a.txt").write_text("x")
    before = identity()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    renamed = identity()
    (tmp_path / "b.txt").write_text("y")
    assert len({before, renamed, identity()}) == 3


def test_builtin_corpus_and_its_splits() -> None:
    corpus = open_corpus(CorpusChoice("builtin", split="heldout"))
    texts = list(corpus.documents())
    assert texts == list(assets.builtin_documents("heldout"))
    assert corpus.text_bytes == sum(len(text.encode()) for text in texts)
    assert corpus.identity["split"] == "heldout"
    assert len(corpus.sha256 or "") == 64


def test_default_corpus() -> None:
    assert default_corpus(embedded_model=True).name == "builtin"
    assert (default_corpus(False).name, default_corpus(False).config) == DEFAULT_HUB_CORPUS


def test_unusable_files(tmp_path: Path) -> None:
    cases: dict[str, tuple[bytes, str]] = {
        "latin.txt": ("naïve".encode("latin-1"), "latin.txt is not UTF-8 text (byte 2)"),
        "latin.jsonl": ('{"text": "naïve"}'.encode("latin-1"), "latin.jsonl line 1 is not UTF-8"),
        "broken.jsonl": (b'{"text": "a"}\n{"text"\n', "broken.jsonl line 2 is not JSON"),
        "list.jsonl": (b"[1]\n", "list.jsonl line 1 is not a JSON object"),
        "number.jsonl": (b'{"text": 3}\n', "column 'text' is int, not text"),
        "half.jsonl": (b'{"text": "a\\ud800"}\n', "half a surrogate pair at character 1"),
        "column.jsonl": (b'{"content": "a"}\n', "has no column 'text'; found 'content'"),
        "damaged.parquet": (b"PAR1 no", "damaged.parquet is not a readable parquet file"),
        "data.csv": (b"a,b", "unknown kind of file; known are .txt, .jsonl, .parquet"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError) as caught:
            read(tmp_path / name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"corpus a.parquet has no column 'text'; found 'content', 'n'"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["missing.txt", "data/missing.jsonl", "/no/such/folder", "./here", "a b"])
def test_missing_files_are_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UsageError, match="no such file or folder"):
        read(name)


def test_folder_without_corpus_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the folder holds no .txt, .jsonl, .parquet file"):
        read(tmp_path)


def test_options_that_a_source_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="--corpus-config c and --split train"):
        read(tmp_path / "a.txt", config="c", split="train")
    with pytest.raises(UsageError, match="--text-column text"):
        read("builtin", text_column="text")
    with pytest.raises(UsageError, match="--split test: the built-in corpus has train, heldout"):
        read("builtin", split="test")


def test_unreachable_hub_names_the_builtin_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    with pytest.raises(ResourceError, match="not reachable; use --corpus builtin"):
        read("owner/data")


def test_unknown_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    with pytest.raises(ResourceError, match="the hub has no such dataset"):
        read("owner/data")


class FakeInfo:
    sha = "c0ffee"
    siblings = ()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"), UsageError),
        (RuntimeError("Dataset scripts are no longer supported"), UsageError),
        (ConnectionError("reset"), ResourceError),
        (FileNotFoundError("gone"), ResourceError),
    ],
)
def test_hub_failures(raised: Exception, expected: type[NsaeError], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: FakeInfo())
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(expected, match="owner/data"):
        read("owner/data")


def test_hub_data_set_is_streamed_at_the_resolved_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, object] = {}

    def load(name: str, config: str | None, **options: object) -> list[dict[str, str]]:
        asked.update(name=name, config=config, **options)
        return [{"content": "a"}, {"content": "b"}]

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: FakeInfo())
    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = open_corpus(CorpusChoice("owner/data", config="small", text_column="content"))
    assert list(corpus.documents()) == ["a", "b"]
    assert asked == {
        "name": "owner/data", "config": "small", "split": "train", "streaming": True, "revision": "c0ffee",
    }  # fmt: skip
    assert (corpus.sha256, corpus.identity["revision"]) == (None, "c0ffee")
    with pytest.raises(UsageError, match="corpus owner/data has no column 'text'; found 'content'"):
        read("owner/data")

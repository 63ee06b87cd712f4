"""Corpora that are token ids already: `--tokens-column`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.hf_api import HfApi
from tiny_models import TINY
from torch import Tensor

from command import Outcome, nsae
from nsae_cli.errors import UsageError
from nsae_cli.lm.corpus import CorpusChoice, open_corpus
from nsae_cli.lm.records import TokenRow
from nsae_cli.store.shards import open_activations

CONTEXT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["mistral"].save(tmp_path_factory.mktemp("rows") / "tiny-mistral")


@pytest.fixture
def rows() -> list[list[int]]:
    """Whole contexts, each with the beginning-of-text token 0 first."""
    draw = random.Random(0)
    return [[0, *(draw.randrange(1, 257) for _ in range(CONTEXT - 1))] for _ in range(25)]


def write_jsonl(path: Path, rows: list[Any], column: str = "input_ids") -> Path:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path


def collect(model: Path, corpus: object, *options: object) -> Outcome:
    return nsae(
        "--workspace", model.parent / "runs", "collect", "--model", model, "--corpus", corpus, "--device", "cpu",
        "--tokens-column", "input_ids", *options,
    )  # fmt: skip


def read(model: Path, name: str) -> tuple[Any, dict[str, Tensor]]:
    store = open_activations(model.parent / "runs" / "activations" / name)
    return store.manifest, store.read(0, ["tokens", "positions", "documents"])


def test_rows_are_contexts_as_they_are(model: Path, tmp_path: Path, rows: list[list[int]]) -> None:
    outcome = collect(model, write_jsonl(tmp_path / "a.jsonl", rows), "--no-packing", "--name", "whole")
    assert outcome.code == 0, outcome.err
    manifest, found = read(model, "whole")
    assert found["tokens"].view(-1, CONTEXT).tolist() == rows
    assert found["positions"].view(-1, CONTEXT).tolist() == [list(range(CONTEXT))] * len(rows)
    assert found["documents"].unique().tolist() == list(range(len(rows)))
    assert (manifest.context_size, manifest.packing, manifest.bos) == (CONTEXT, False, True)
    assert manifest.dropped == {"tokens": 0, "documents": 0}
    assert manifest.corpus["tokens_column"] == "input_ids"
    assert manifest.command["options"]["tokens_column"] == "input_ids"


def test_longer_rows_are_cut_off_and_counted(model: Path, tmp_path: Path, rows: list[list[int]]) -> None:
    options = ("--no-packing", "--context", 8, "--tokens", 40, "--name", "cut")
    outcome = collect(model, write_jsonl(tmp_path / "a.jsonl", rows), *options)
    assert outcome.code == 0, outcome.err
    manifest, found = read(model, "cut")
    assert found["tokens"].view(-1, 8).tolist() == [row[:8] for row in rows[:5]]
    assert manifest.dropped == {"tokens": 5 * 4, "documents": 0}
    assert "20 tokens behind --context dropped" in outcome.err


def test_rows_without_the_first_token(model: Path, tmp_path: Path, rows: list[list[int]]) -> None:
    bare = write_jsonl(tmp_path / "a.jsonl", [row[1:] for row in rows])
    outcome = collect(model, bare, "--no-packing", "--name", "bare")
    assert outcome.code == 2
    assert outcome.message.startswith("--bos: row 0 of the corpus begins with token ")
    assert "give --no-bos" in outcome.message
    outcome = collect(model, bare, "--no-packing", "--no-bos", "--name", "bare")
    assert outcome.code == 0, outcome.err
    manifest, found = read(model, "bare")
    assert found["tokens"].view(-1, CONTEXT - 1).tolist() == [row[1:] for row in rows]
    assert (manifest.context_size, manifest.bos) == (CONTEXT - 1, False)


def test_packing_takes_rows_for_documents(model: Path, tmp_path: Path, rows: list[list[int]]) -> None:
    """As the same documents of text would be packed: a separator before each, unless it is there."""
    mixed = [row[1:] if number % 2 else row for number, row in enumerate(rows)]
    outcome = collect(model, write_jsonl(tmp_path / "a.jsonl", mixed), "--context", 10, "--name", "packed")
    assert outcome.code == 0, outcome.err
    manifest, found = read(model, "packed")
    stream = [token for row in rows for token in row]
    contexts = [[0, *stream[i : i + 9]] for i in range(0, len(stream) - 8, 9)]
    assert found["tokens"].view(-1, 10).tolist() == contexts
    assert manifest.dropped == {"tokens": len(stream) % 9, "documents": 0}


@pytest.mark.parametrize(("bad", "index"), [(257, 3), (-1, 0), (2**40, 2)])
def test_ids_that_the_model_lacks(model: Path, tmp_path: Path, rows: list[list[int]], bad: int, index: int) -> None:
    rows[20][index] = bad
    outcome = collect(model, write_jsonl(tmp_path / "a.jsonl", rows), "--no-packing", "--no-bos", "--name", "bad")
    assert outcome.code == 2
    said = f"corpus a.jsonl line 21: token {index} is id {bad}, tiny-mistral has 0-256; give ids of the model's own"
    assert outcome.message.startswith(said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x", "column 'input_ids' is str; expected a list of token ids"),
        ([1, "a"], "is a list that holds 'a'"),
        ([1, 2.5], "is a list that holds 2.5"),
        ([True], "is a list that holds True"),
        ([1, 10**30], "is a list that holds 1000000"),
        ({"a": 1}, "column 'input_ids' is dict"),
    ],
)
def test_values_that_are_no_ids(tmp_path: Path, value: object, said: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [value])
    with pytest.raises(UsageError, match=said):
        list(open_corpus(CorpusChoice(str(path), tokens_column="input_ids")).documents())


def test_parquet_and_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]) -> None:
    import datasets

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"ids": pyarrow.array([*rows, None], pyarrow.list_(pyarrow.uint16()))}), path
    )

    class Info:
        sha = "c0ffee"
        siblings = ()

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: Info())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"ids": row} for row in [*rows, None]])
    for source in (str(path), "owner/data"):
        corpus = open_corpus(CorpusChoice(source, tokens_column="ids"))
        found = list(corpus.documents())
        assert all(isinstance(document, TokenRow) for document in found)
        assert [document.ids.tolist() for document in found] == [*rows, []]  # type: ignore[union-attr]
        assert found[1].place.endswith("row 2")  # type: ignore[union-attr]
        assert corpus.text_bytes is None


def test_a_column_of_ids_is_pointed_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [[1, 2]])
    with pytest.raises(UsageError, match=r"choose one with --text-column, or perhaps --tokens-column input_ids"):
        list(open_corpus(CorpusChoice(str(path))).documents())
    with pytest.raises(UsageError, match=r"is list, not text; check --text-column, or --tokens-column"):
        list(open_corpus(CorpusChoice(str(path), text_column="input_ids")).documents())


def test_no_tokenizer_is_a_remark(model: Path, tmp_path: Path, rows: list[list[int]]) -> None:
    folder = tmp_path / "numbers"
    TINY["mistral"].build().save_pretrained(folder)
    corpus = write_jsonl(tmp_path / "a.jsonl", rows)
    outcome = collect(folder, corpus, "--no-packing", "--name", "numbers")
    assert outcome.code == 0, outcome.err
    assert "numbers has no usable tokenizer: tokens are shown by number" in outcome.err
    manifest, found = read(folder, "numbers")
    assert found["tokens"].view(-1, CONTEXT).tolist() == rows
    assert manifest.tokenizer == {"name": None, "sha256": None, "bos_token": {"id": 0, "text": None}}
    assert manifest.special_token_ids == [0]
    shown = nsae("--workspace", tmp_path / "runs", "--json", "norms", "numbers")
    assert shown.code == 0, shown.err
    first = shown.json["result"]["hooks"][0]["top_tokens"][0]
    assert first["text"] == f"#{first['token']}"

    text = tmp_path / "a.txt"
    text.write_text("some text")
    refused = nsae("--workspace", tmp_path / "runs", "collect", "--model", folder, "--corpus", text, "--device", "cpu")
    assert refused.code == 3
    assert "no tokenizer" in refused.message

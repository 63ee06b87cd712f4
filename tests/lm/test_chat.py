"""Conversations through the model's chat template: `--chat-column`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_models import TINY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from command import nsae
from nsae_cli.errors import UsageError
from nsae_cli.lm.corpus import CorpusChoice, open_corpus
from nsae_cli.lm.loading import inspect_model
from nsae_cli.lm.tokenizing import TextTokenizer, load_tokenizer
from nsae_cli.store.manifest import Manifest, read_manifest
from nsae_cli.store.shards import open_activations

BEGIN, START, END = 0, 1, 2
#: After Llama 3's: a beginning, the date in the system message, a header per message, an end of turn.
TEMPLATE = (
    "{{ bos_token }}{% if date is not defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
    "<h>system<e>Today: {{ date }}<e>{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "<h>{{ message.role }}<e>{{ message.content | trim }}<e>{% endfor %}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Hello <e>!"}],
    [],
    [{"role": "user", "content": "naïve → ?"}, {"role": "assistant", "content": "yes", "weight": 1}],
]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and three special tokens, of which two are known as added tokens only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        character: i for i, character in enumerate(alphabet[:254], start=3)
    }  # the model's 257 less three; what is left out is not used here
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "<h>": 1, "<e>": 2, **vocabulary}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<h>", "<e>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    if template is not None:
        fast.chat_template = template
    return fast


def save_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    TINY["llama"].build().save_pretrained(folder)
    chat_tokenizer(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat") / "tiny-chat")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TextTokenizer:
    return load_tokenizer(inspect_model(str(model)))


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": i, "messages": chat}) + "\n" for i, chat in enumerate(CHATS)))
    return path


def encoded(tokenizer: TextTokenizer, path: Path, column: str = "messages") -> list[list[int]]:
    documents = open_corpus(CorpusChoice(str(path), chat_column=column)).documents()
    return [ids.tolist() for batch in tokenizer.encode_batches(documents) for ids in batch]


def test_tokens_are_those_of_transformers(tokenizer: TextTokenizer, jsonl: Path) -> None:
    found = encoded(tokenizer, jsonl)
    reference = chat_tokenizer()
    expected = [
        reference.apply_chat_template(chat, date="26 Jul 2024", return_dict=False) if chat else [] for chat in CHATS
    ]
    assert found == expected
    text = reference.decode(found[0])
    assert text == "<s><h>system<e>Today: 26 Jul 2024<e><h>user<e>Hi<e><h>assistant<e>Hello <e>!<e>"
    assert (found[0].count(START), found[0].count(END)) == (3, 7), "control tokens are themselves"


def test_dates_in_other_forms(tmp_path: Path, jsonl: Path) -> None:
    save_model(tmp_path / "model", "{{ strftime_now('%Y-%m-%d, %A %d %B %y, %H:%M') }}|")
    tokenizer = load_tokenizer(inspect_model(str(tmp_path / "model")))
    text = chat_tokenizer().decode(encoded(tokenizer, jsonl)[0])
    assert text == "2024-07-26, Friday 26 July 24, 00:00|"


def test_parquet_rows(tokenizer: TextTokenizer, tmp_path: Path, jsonl: Path) -> None:
    path = tmp_path / "chats.parquet"
    chats = [[{key: m[key] for key in ("role", "content")} for m in chat] for chat in CHATS]
    pyarrow.parquet.write_table(pyarrow.table({"talk": [*chats, None], "n": [1, 2, 3, 4]}), path)
    assert encoded(tokenizer, path, "talk") == [*encoded(tokenizer, jsonl), []]


def test_special_tokens_are_those_that_the_tokenizer_marks(tokenizer: TextTokenizer) -> None:
    assert tokenizer.special_token_ids == [BEGIN, START, END]
    assert (tokenizer.separator, tokenizer.separator_text) == (BEGIN, "<s>")
    [[ids]] = list(tokenizer.encode_batches(["<h>"]))
    assert START not in ids, "in a text they are characters"


def collect(model: Path, corpus: Path, workspace: Path, *options: object) -> tuple[Manifest, dict[str, torch.Tensor]]:
    outcome = nsae(
        "--workspace", workspace, "collect", "--model", model, "--corpus", corpus, "--device", "cpu",
        "--name", "chat", *options,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    store = open_activations(workspace / "activations" / "chat")
    return store.manifest, store.read(0, ["tokens", "positions", "documents"])


def test_a_store_of_conversations(model: Path, tokenizer: TextTokenizer, tmp_path: Path, jsonl: Path) -> None:
    manifest, rows = collect(model, jsonl, tmp_path / "runs", "--chat-column", "messages", "--context", 8)
    first, _, last = encoded(tokenizer, jsonl)
    # The template begins with <s>, so the stream does not put it there again; the empty conversation has only it.
    stream = [*first, BEGIN, *last]
    contexts = [[BEGIN, *stream[i : i + 7]] for i in range(0, len(stream) - 6, 7)]
    assert rows["tokens"].tolist() == [token for context in contexts for token in context]
    assert manifest.dropped == {"tokens": len(stream) % 7, "documents": 0}
    assert manifest.corpus is not None
    assert manifest.corpus["chat_column"] == "messages"
    assert manifest.special_token_ids == [BEGIN, START, END]
    assert manifest.tokenizer is not None
    assert manifest.tokenizer["bos_token"] == {"id": 0, "text": "<s>"}
    assert len(manifest.tokenizer["chat_template_sha256"]) == 64
    assert manifest.command is not None
    options = manifest.command["options"]
    assert (options["chat_column"], options["text_column"]) == ("messages", None)


def test_one_conversation_per_context(model: Path, tokenizer: TextTokenizer, tmp_path: Path, jsonl: Path) -> None:
    options = ("--chat-column", "messages", "--context", 32, "--no-packing")
    manifest, rows = collect(model, jsonl, tmp_path / "runs", *options)
    expected = []
    for ids in encoded(tokenizer, jsonl):
        rest = ids[1:]
        expected += [token for i in range(0, len(rest), 31) for token in [BEGIN, *rest[i : i + 31]]]
    assert rows["tokens"].tolist() == expected
    assert manifest.dropped == {"tokens": 0, "documents": 1}


def test_a_model_without_a_template(tmp_path: Path, jsonl: Path) -> None:
    save_model(tmp_path / "plain", None)
    outcome = nsae(
        "--workspace", tmp_path / "runs", "collect", "--model", tmp_path / "plain", "--corpus", jsonl,
        "--chat-column", "messages", "--device", "cpu",
    )  # fmt: skip
    assert outcome.code == 2
    assert "--chat-column: the tokenizer of plain has no chat template" in outcome.message


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, r"a.jsonl line 1: the chat template .* \(no role tool\)"),
        ({"messages": [{"role": "user"}, 3]}, "message 1 of column 'messages' is int"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"message 0 .* has no role, it has 'from', 'value'"),
        ({"messages": ["x"]}, "message 0 of column 'messages' is str"),
        ({"messages": "x"}, "column 'messages' is str; expected a list of"),
        ({"text": "x"}, "no column 'messages'; found 'text'; choose one with --chat-column$"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
    ],
)
def test_records_that_are_no_conversation(
    tokenizer: TextTokenizer, tmp_path: Path, record: dict[str, Any], said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UsageError, match=said):
        encoded(tokenizer, path)


def test_a_column_of_messages_is_pointed_out(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(UsageError, match=r"found 'id', 'messages'; choose one with --text-column, or perhaps --chat"):
        list(open_corpus(CorpusChoice(str(jsonl))).documents())
    with pytest.raises(UsageError, match=r"is list, not text; check --text-column, or --chat-column"):
        list(open_corpus(CorpusChoice(str(jsonl), text_column="messages")).documents())


def test_options_that_exclude_each_other(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(UsageError, match=r"--chat-column m and --tokens-column t: .* give one of them"):
        open_corpus(CorpusChoice(str(jsonl), chat_column="m", tokens_column="t"))
    with pytest.raises(UsageError, match="--chat-column m: the built-in corpus"):
        open_corpus(CorpusChoice("builtin", chat_column="m"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"--chat-column m: a\.txt is plain text and has no columns"):
        open_corpus(CorpusChoice(str(tmp_path / "a.txt"), chat_column="m"))


def test_training_on_a_model_as_it_reads_conversations(model: Path, tmp_path: Path, jsonl: Path) -> None:
    corpus = tmp_path / "many.jsonl"
    corpus.write_text(jsonl.read_text() * 40)
    outcome = nsae(
        "--workspace", tmp_path / "runs", "--json", "train", "--from-model", model, "--corpus", corpus,
        "--chat-column", "messages", "--context", 16, "--site", "mlp_out", "--layers", 1, "--d-sae", 32,
        "--batch-size", 64, "--tokens", "2k", "--device", "cpu", "--name", "live",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    run = outcome.json["result"]
    assert run["hook"] == "blocks.1.hook_mlp_out"
    assert run["inputs"]["corpus"]["chat_column"] == "messages"
    again = nsae(
        "--workspace", tmp_path / "runs", "--json", "eval", "live", "--corpus", corpus, "--chat-column", "messages",
        "--model", model, "--device", "cpu",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert again.json["result"]["rows"]["held_out"] is True
    assert again.json["result"]["rows"]["corpus"]["chat_column"] == "messages"


def test_stores_of_text_name_neither_column(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    manifest, _ = collect(model, tmp_path / "a.txt", tmp_path / "runs", "--context", 16)
    document = json.loads((tmp_path / "runs" / "activations" / "chat" / "manifest.json").read_text())
    assert not {"chat_column", "tokens_column"} & ({*document["corpus"]} | {*document["command"]["options"]})
    assert manifest == read_manifest(tmp_path / "runs" / "activations" / "chat")[0]
    assert "chat_template_sha256" not in document["tokenizer"]

"""Text, models, configurations and options as they come from outside: right rows, or one line that says what is wrong.

Rows of a packed or padded text against an independent counter: tests/lm/test_packing.py. Malformed YAML:
tests/experiment/test_config.py. Options, names, layers, devices, empty corpora: tests/cli/test_failures.py.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import random
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from command import contents, nsae
from hand_store import make_rows, write_full
from lm.tiny_gpt2 import build_model, build_tokenizer
from nsae_cli import interrupt
from nsae_cli.lm import collect as collecting
from nsae_cli.lm import hub, packing, tokenizing
from nsae_cli.lm.loading import ModelInfo, inspect_model
from nsae_cli.lm.packing import Layout, Packer
from nsae_cli.store import commit
from nsae_cli.training.cell import Cell

CONTEXT = 8


@pytest.fixture(autouse=True)
def no_signal() -> Iterator[None]:
    interrupt.clear()
    yield
    interrupt.clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token per byte: rows can be counted by hand."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def collect(model: Path, corpus: Path, workspace: Path, *options: object) -> Any:
    command = ("collect", "--model", model, "--context", CONTEXT, "--device", "cpu", "--tokens", "all")
    return nsae("--workspace", workspace, "--json", *command, "--corpus", corpus, *options)


def stored(workspace: Path, name: str) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in sorted((workspace / "activations" / name).glob("shard-*"))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


# I2: rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_rows_of_documents_of_every_length(packing: bool, bos: bool, model: Path, tmp_path: Path) -> None:
    lengths = [0, 1, CONTEXT - 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 10 * CONTEXT, 0]
    lines = [json.dumps({"text": "x" * length}) for length in lengths]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    flags = ("--packing" if packing else "--no-packing", "--bos" if bos else "--no-bos", "--name", "s")
    outcome = collect(model, tmp_path / "c.jsonl", tmp_path / "runs", *flags)
    assert outcome.code == 0, outcome.err
    room = CONTEXT - bos
    if packing:
        stream = sum(length + 1 for length in lengths)
        rows, dropped = stream // room * CONTEXT, stream % room
    else:
        rows, dropped = sum(length + bos * -(-length // room) for length in lengths), 0
    assert outcome.json["result"]["rows"] == rows
    assert outcome.json["result"]["dropped"]["tokens"] == dropped
    found = stored(tmp_path / "runs", "s")
    assert len(found["tokens"]) == rows
    if not packing:  # no context holds two documents
        starts = (found["positions"] == 0).nonzero().squeeze(1).tolist()
        for first, last in itertools.pairwise([*starts, rows]):
            assert len(found["documents"][first:last].unique()) == 1


SPECIAL = st.sampled_from(
    [
        *" \n\t'’_.,",
        "é",
        "e\u0301",
        "א",
        "👩‍👩‍👧",
        "<|endoftext|>",
        "\u00a0",
        "\u3000",
        "\x1c",
        "\x00",
        "don't",
        " 7",
        "漢字。",
    ]
)
LONG = st.lists(SPECIAL | st.text("abcXYZ 019", min_size=1, max_size=9), max_size=60).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=LONG, size=st.integers(1, 40))
def test_a_long_document_makes_the_same_tokens_in_pieces(text: str, size: int) -> None:
    tokenizer = tokenizing.load_tokenizer(inspect_model("mini"))
    [[whole]] = list(tokenizer.encode_batches([text])) if text else [[np.empty(0, np.int32)]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "_PIECE_CHARACTERS", size)
        patch.setattr(tokenizing, "_PIECES", 2)
        [[pieces]] = list(tokenizer.encode_batches([text])) if text else [[np.empty(0, np.int32)]]
    assert pieces.tolist() == whole.tolist()


def test_the_tokenizer_is_never_given_a_whole_long_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs some 150 bytes for each character at work."""
    tokenizer = tokenizing.load_tokenizer(inspect_model("mini"))
    draw = random.Random(0)
    text = " ".join(draw.choices(("the", "residual", "naïve", "→", "0"), k=400_000))
    given_characters: list[int] = []
    encode = tokenizing.TextTokenizer._encode

    def watched(self: tokenizing.TextTokenizer, texts: list[str]) -> Any:
        given_characters.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(tokenizing.TextTokenizer, "_encode", watched)
    batches = list(tokenizer.encode_batches(["short", text, "after"]))
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert max(given_characters) <= 8 * 2**17 + 1000
    assert sum(given_characters) == len(text) + len("short") + len("after")


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), bos=st.booleans(), part=st.integers(1, 20))
def test_a_long_document_is_packed_the_same_in_parts(lengths: list[int], bos: bool, part: int) -> None:
    ids = iter(range(10, 10_000))
    documents = [[np.array([next(ids) for _ in range(length)], np.int32)] for length in lengths]

    def pack() -> tuple[list[tuple[list[int], list[int]]], int, int]:
        packer = Packer(Layout(CONTEXT, True, bos, 9, None))
        made = [(context.tokens.tolist(), context.documents.tolist()) for context in packer.contexts(documents)]
        return made, packer.dropped_tokens, packer.dropped_documents

    whole = pack()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PART_TOKENS", part)
        assert pack() == whole


# I3: Unicode ----------------------------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[str, bytes, bytes | str]] = {
    # name: file, content, the bytes of the text, or what is said
    "byte order mark": ("a.txt", b"\xef\xbb\xbfhello, this is text", b"hello, this is text"),
    "byte order mark before JSON": (
        "a.jsonl", b'\xef\xbb\xbf{"text": "hello, this is text"}\n', b"hello, this is text",
    ),
    "CRLF is kept": ("a.txt", b"one\r\ntwo\r\nthree\r\n", b"one\r\ntwo\r\nthree\r\n"),
    "CRLF between records": ("a.jsonl", b'{"text": "hello, this is text"}\r\n\r\n', b"hello, this is text"),
    "NUL": ("a.txt", b"hello\x00this is text", b"hello\x00this is text"),
    "NUL in JSON": ("a.jsonl", b'{"text": "hello\\u0000this is text"}', b"hello\x00this is text"),
    "marks, right to left, joiners": ("a.txt", "e\u0301 עברית 👩‍👩‍👧".encode(), "e\u0301 עברית 👩‍👩‍👧".encode()),
    "a pair of surrogates": ("a.jsonl", b'{"text": "hello hello \\ud83d\\ude00"}', "hello hello 😀".encode()),
    "line separators are no line ends": (
        "a.jsonl", '{"text": "one\u2028two\u0085three"}'.encode(), "one\u2028two\u0085three".encode(),
    ),
    "half a pair": (
        "a.jsonl", b'{"text": "fine"}\n{"text": "hello \\ud83d"}',
        "a.jsonl line 2: half a surrogate pair at character 6",
    ),
    "invalid UTF-8": ("a.txt", b"good text \xff", "a.txt is not UTF-8 text (byte 10)"),
    "a surrogate in UTF-8": ("a.txt", b"good \xed\xa0\x80", "a.txt is not UTF-8 text (byte 5)"),
    "invalid UTF-8 in a record": ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', "a.jsonl line 2 is not UTF-8 text"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "a.txt is not UTF-8 text (byte 0)"),
    "only empty records": ("a.jsonl", b'{"text": ""}\n{"text": " \\n "}\n{"text": null}', "corpus a.jsonl is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_text_of_every_kind(case: str, model: Path, tmp_path: Path) -> None:
    name, content, expected = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    outcome = collect(model, tmp_path / name, tmp_path / "runs", "--name", "s", "--no-packing", "--no-bos")
    if isinstance(expected, str):
        assert outcome.code == 2
        assert expected in outcome.message
        return
    assert outcome.code == 0, outcome.err
    decode = build_tokenizer().decode(stored(tmp_path / "runs", "s")["tokens"].tolist())
    assert decode.encode() == expected


PLACES = [
    "with space",
    "ünïcode",
    "עברית",
    "👩‍👩‍👧",
    "e\u0301",
    "new\nline",
    "tab\t",
    "quote'\"",
    "$(touch canary)",
    "[1]*?",
    "{a}",
    "~",
    "%2e%2e",
    "-dash",
]


@pytest.mark.parametrize("place", PLACES)
def test_paths_of_every_kind(place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / place
    (folder / "corpus").mkdir(parents=True)
    (folder / "corpus" / f"{place}.txt").write_text("hello world, this is text of a file " * 8)
    monkeypatch.chdir(tmp_path)
    corpus = Path(f"./{place}/corpus")
    assert collect(model, corpus, folder / "runs", "--name", "s").code == 0
    for command in (("train", "--tokens", "64", "--batch-size", "8", "--d-sae", "8", "--name", "t"), ("list",)):
        outcome = nsae("--workspace", folder / "runs", "--json", *command)
        assert outcome.code == 0, outcome.err
        assert outcome.json
    assert not (tmp_path / "canary").exists()


def test_what_is_no_text_is_no_argument(model: Path) -> None:
    """Bytes that are not UTF-8 come from the command line as surrogates."""
    bad = os.fsdecode(b"bad\xff")
    for arguments in (
        ("collect", "--model", model, "--corpus", bad),
        ("collect", "--model", "mini", "--text-column", bad),
        ("--workspace", bad, "list"),
        ("norms", bad),
        ("run", bad),
    ):
        outcome = nsae(*arguments)
        assert outcome.code == 2
        assert len(outcome.message) <= 200
        assert "bad\\udcff' is not UTF-8 text" in outcome.message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("norms", "x" * 5000), "no such path"),
        (("collect", "--model", "y" * 5000), "too long"),
        (("--workspace", "z" * 5000, "list"), "too long"),
    ],
    ids=["artifact", "model", "workspace"],
)
def test_names_that_no_file_can_have(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    first = () if "--workspace" in arguments else ("--workspace", tmp_path)
    outcome = nsae(*first, *arguments)
    assert outcome.code == 2
    assert said in outcome.message
    assert len(outcome.message) <= 300


def test_an_empty_name_is_not_the_folder_of_all(tmp_path: Path) -> None:
    for command in ("norms", "train", "analyze-top-norms"):
        outcome = nsae("--workspace", tmp_path, command, "")
        assert outcome.code == 2
        assert "is empty; give a name" in outcome.message


def test_a_corpus_folder_holds_what_it_likes(model: Path, tmp_path: Path) -> None:
    """A folder called x.txt, a link to nothing and a pipe that nobody writes to are no documents."""
    folder = tmp_path / "corpus"
    (folder / "x.txt").mkdir(parents=True)
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "a.txt").write_text("hello world, this is text")
    outcome = collect(model, folder, tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    assert outcome.json["result"]["rows"] == 24


# I6: the hub ----------------------------------------------------------------------------------------------------------


class _Answer(BaseHTTPRequestHandler):
    """Answers as the hub does: the error is in a header."""

    code, error = 404, "RepoNotFound"

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.send_header("X-Error-Code", self.error)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An empty cache, and a hub that is asked; where it is, the test says."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return monkeypatch


HUB = [
    (404, "RepoNotFound", "has no such model"), (403, "GatedRepo", "access is restricted"),
    (404, "RevisionNotFound", "no revision 'v9'"), (500, "", "not reachable"), (429, "", "not reachable"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "error", "said"), HUB)
def test_what_the_hub_answers(code: int, error: str, said: str, online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handler = type("Handler", (_Answer,), {"code": code, "error": error})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        outcome = nsae("--workspace", tmp_path / "runs", "collect", "--model", "some/model", "--revision", "v9")
    finally:
        server.shutdown()
        server.server_close()
    assert outcome.code == 4
    assert "--model some/model" in outcome.message
    assert said in outcome.message


@pytest.mark.parametrize("kind", ["silent", "refused", "no such host", "silent proxy"])
def test_a_hub_that_does_not_answer(kind: str, online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online.setattr(hub, "_TIMEOUT_SECONDS", 1)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    if kind != "refused":
        listener.listen()  # connects, and then nothing
    here = f"http://127.0.0.1:{listener.getsockname()[1]}"
    endpoint = {"no such host": "http://nowhere.invalid", "silent proxy": "http://nowhere.invalid"}.get(kind, here)
    online.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    if kind == "silent proxy":
        online.setenv("HTTP_PROXY", here)
        online.setenv("http_proxy", here)
        online.delenv("NO_PROXY", raising=False)
        online.delenv("no_proxy", raising=False)
    for option, other in (("--model", ()), ("--corpus", ("--model", "mini"))):
        outcome = nsae("--workspace", tmp_path / "runs", "collect", option, "some/thing", *other)
        assert outcome.code == 4
        assert f"{option} some/thing" in outcome.message
        assert "not reachable" in outcome.message
    listener.close()


# I7: a revision that has moved ----------------------------------------------------------------------------------------


def test_a_revision_that_moved_while_collecting(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.txt").write_text("hello world, this is text")

    def at(commit: str) -> None:
        def inspect(name: str, revision: str | None) -> ModelInfo:
            return dataclasses.replace(inspect_model(str(model)), revision=commit)

        monkeypatch.setattr(collecting, "inspect_model", inspect)

    def full(operation: str, path: Path) -> None:
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    at("a" * 40)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "fault_hook", full)
        assert collect(model, tmp_path / "c.txt", tmp_path / "runs", "--name", "s").code == 4
    store = tmp_path / "runs/activations/s"
    assert (store / "shard-00000.safetensors").is_file()
    at("b" * 40)
    moved = collect(model, tmp_path / "c.txt", tmp_path / "runs", "--name", "s")
    assert moved.code == 2
    assert f"s was begun with other options (--revision {'a' * 40} -> {'b' * 40})" in moved.message
    at("a" * 40)
    assert collect(model, tmp_path / "c.txt", tmp_path / "runs", "--name", "s").code == 0
    assert json.loads((store / "manifest.json").read_text())["revision"] == "a" * 40


# I8: configurations ---------------------------------------------------------------------------------------------------

YAML: dict[str, tuple[bytes, list[str]]] = {
    "a typo of what an option means": (
        b"stages:\n- train: {activations: x, learning_rat: 3}\n",
        ["c.yaml:2: train has no option 'learning_rat'; did you mean 'lr'?"]
    ),
    "nothing like any option": (
        b"stages:\n- norms: {frobnicate: 3}\n", ["2: norms has no option 'frobnicate'; see `nsae norms --help`"],
    ),
    "a NUL": (b"stages:\n- norms\n\x00", ["c.yaml:3: not valid YAML (the character U+0000; remove it)"]),
    "yes is no key": (b"on: yes\nstages: [list]\n", ["c.yaml:1: unknown key 'on'"]),
    "numbers as they may be written": (
        b"stages:\n- collect: {model: mini}\n- train: {lr: [1e-4, '2e-4', .5e-3, 1E-4]}\n",
        ["c.yaml:3: lr", "expected each value once"]
    ),
    "an anchors bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (letter + 1, letter + 1, b",".join([b"*%c" % letter] * 9)) for letter in b"abcdefghijkl"
        ) + b"stages: *m\n", ["c.yaml:1: anchors and aliases"],
    ),
    "fifty megabytes": (b"# " + b"x" * 50_000_000, ["50,000,002 bytes is no configuration"]),
}  # fmt: skip


@pytest.mark.parametrize("case", YAML)
def test_configurations(case: str, tmp_path: Path) -> None:
    content, expected = YAML[case]
    (tmp_path / "c.yaml").write_bytes(content)
    outcome = nsae("--workspace", tmp_path / "runs", "run", tmp_path / "c.yaml")
    assert outcome.code == 2
    for text in expected:
        assert text in outcome.err
    assert not (tmp_path / "runs").exists()


# I9: what is written into what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [".", "runs", "a/b"])
def test_a_workspace_in_the_corpus_is_refused(inside: str, model: Path, tmp_path: Path) -> None:
    """Its log is .jsonl: text, the next time."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("hello world, this is text")
    live = ("train", "--from-model", model, "--corpus", corpus, "--context", "8", "--device", "cpu", "--tokens", "64")
    for outcome in (collect(model, corpus, corpus / inside), nsae("--workspace", corpus / inside, *live)):
        assert outcome.code == 2
        assert "holds the workspace" in outcome.message
        assert "choose a --workspace outside" in outcome.message
    assert [path.name for path in corpus.iterdir()] == ["a.txt"]
    assert collect(model, corpus, tmp_path / "corpus-runs").code == 0, "a name that only begins alike is another folder"


# I12: going on elsewhere, and with an nsae that has more options ------------------------------------------------------

TRAIN = ("--d-sae", "16", "--batch-size", "64", "--tokens", "1280", "--device", "cpu", "--name", "sae")


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a run that was stopped before its tenth step."""
    write_full(tmp_path / "runs/activations/store", make_rows(60, 8), [300, 180])
    step = Cell.train_step

    def stopping(cell: Cell, rows: Any, number: int) -> Any:
        if number == 9:
            interrupt._signum = 15
        return step(cell, rows, number)

    with monkeypatch.context() as patch:
        patch.setattr(Cell, "train_step", stopping)
        assert nsae("--workspace", tmp_path / "runs", "train", "store", *TRAIN).code == 143
    assert (tmp_path / "runs/saes/sae/checkpoints/step-10").is_dir()
    return tmp_path / "runs"


def edit(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document)
    for key in ("checksum", "files"):  # as an older nsae would have left it
        document.pop(key, None)
    path.write_text(json.dumps(document))


def test_going_on_under_another_torch_is_warned_of_once(cut: Path, tmp_path: Path) -> None:
    begun = cut / "saes/sae/checkpoints/begun.json"
    shutil.copytree(cut, tmp_path / "same")
    same = nsae("--workspace", tmp_path / "same", "train", "store", *TRAIN)
    assert same.code == 0
    assert "bit-exact" not in same.err
    edit(begun, lambda document: document["environment"].update(torch="1.0.0", threads=64))
    moved = nsae("--workspace", cut, "train", "store", *TRAIN)
    assert moved.code == 0
    warnings = [line for line in moved.err.splitlines() if "bit-exact" in line]
    assert warnings == [
        f"warning: resume is not bit-exact: torch 1.0.0 -> {torch.__version__}, threads 64 -> {torch.get_num_threads()}"
    ]
    assert "going on from the checkpoint at step 10" in moved.err
    assert contents(cut / "saes") == contents(tmp_path / "same/saes")


def test_a_run_begun_before_this_was_recorded_goes_on(cut: Path) -> None:
    edit(cut / "saes/sae/checkpoints/begun.json", lambda document: document.pop("environment"))
    outcome = nsae("--workspace", cut, "train", "store", *TRAIN)
    assert outcome.code == 0
    assert "going on from the checkpoint" in outcome.err
    assert "bit-exact" not in outcome.err


@pytest.mark.parametrize("option", ["probe_every", "target_l0", "row_weights"])
def test_options_that_nsae_has_got_since_have_their_defaults(option: str, cut: Path) -> None:
    train = ("--workspace", cut, "train", "store", *TRAIN, "--probe-every", "off")
    shutil.rmtree(cut / "saes")
    assert nsae(*train).code == 0
    run = cut / "saes/sae/run.json"
    edit(run, lambda document: document["config"].pop(option))
    before = run.read_bytes()
    again = nsae(*train)
    assert again.code == 0, again.err
    assert "already complete" in again.err
    assert run.read_bytes() == before
    other = nsae(*train, "--lr", "0.5")
    assert other.code == 2
    assert "--lr" in other.message
    assert option.replace("_", "-") not in other.message


def test_an_unfinished_run_without_such_an_option_goes_on(cut: Path) -> None:
    begun = cut / "saes/sae/checkpoints/begun.json"
    edit(begun, lambda document: document["cells"]["L2"].pop("row_weights"))
    outcome = nsae("--workspace", cut, "train", "store", *TRAIN)
    assert outcome.code == 0, outcome.err
    assert "going on from the checkpoint at step 10" in outcome.err


def test_an_option_of_a_later_nsae_is_another_option(cut: Path) -> None:
    begun = cut / "saes/sae/checkpoints/begun.json"
    edit(begun, lambda document: document["cells"]["L2"].update(from_the_future=3))
    outcome = nsae("--workspace", cut, "train", "store", *TRAIN)
    assert outcome.code == 2
    assert "--from-the-future 3 -> none" in outcome.message

"""Fixtures of the tests of `nsae_cli.lm`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_gpt2 import RecordingReporter, build_model, build_tokenizer

from nsae_cli import interrupt
from nsae_cli.lm.config import CollectConfig
from nsae_cli.store.workspace import Workspace

WORDS = ("the", "residual", "stream", "of", "tokens", "naïve", "→", "sink", "0", "norm", "\n", "def f(x):")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def documents() -> list[str]:
    """60 documents of 0 to 40 words: some empty, some longer than a context."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(41) if i % 7 else 0)) for i in range(60)]


@pytest.fixture
def corpus_folder(tmp_path: Path, documents: list[str]) -> Path:
    """The documents as one .txt each; the sorted paths are in the documents' order."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:03d}.txt").write_bytes(text.encode("utf-8"))
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs")


@pytest.fixture
def tiny_config(model_folder: Path, corpus_folder: Path) -> CollectConfig:
    return CollectConfig(
        model=str(model_folder), corpus=str(corpus_folder), context=16, batch_size=4, tokens="all", device="cpu"
    )


@pytest.fixture(autouse=True)
def no_signal() -> Iterator[None]:
    interrupt.clear()
    yield
    interrupt.clear()


@pytest.fixture
def reporter() -> RecordingReporter:
    return RecordingReporter()

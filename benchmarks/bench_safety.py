"""What it costs never to lose work: flushes, hashes and checkpoints, as shares of the time of `collect` and `train`.

    OMP_NUM_THREADS=1 python benchmarks/bench_safety.py [--rounds 5]       # about five minutes on one core

- ``collect``: `mini` (the fastest model there is, so that the share is the largest) and a random GPT-2 small, as they
  are, against the same without fsync and without SHA-256.
- ``first read``: one epoch of `train` on a store whose tensors have to be hashed, against one whose hashes are known.
- ``first analysis``: `analyze-top-norms` on a store that nobody has read yet, against one whose hashes are known. It
  uses a twentieth of the rows, so that hashing all of them weighs most here; the next shard is hashed in a thread.
- ``checkpoint``: `train` with a checkpoint every few steps against none; the time of one, and its share where one is
  saved every five minutes, as by default. Beside it the time for which a step waits (the copy of weights and moments).

Sides alternate within a round; rows of `data/safety.csv` hold medians over rounds. A share is the median of
(with − without) / without of each round. Goals: 3 % for collect and for first reads, 2 % for checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import nsae_cli
from nsae_cli.analysis.top_norms_artifact import TopNormsOptions, run_top_norms
from nsae_cli.assets import model_dir
from nsae_cli.experiment.train import TrainCommandOptions, choose_source
from nsae_cli.lm.collect import collect
from nsae_cli.lm.config import CollectConfig
from nsae_cli.reporter import SilentReporter
from nsae_cli.store import commit
from nsae_cli.store.verified import VERIFIED
from nsae_cli.store.workspace import Artifact, Kind, Workspace
from nsae_cli.store.writer import StoreWriter
from nsae_cli.training.checkpoint import CheckpointWriter
from nsae_cli.training.loop import train
from nsae_cli.training.steps import StepLoop
from record import append_rows, describe, spread, today

CSV = Path(__file__).parent / "data" / "safety.csv"
CHECKPOINT_SECONDS = 300
HOOK = "blocks.6.hook_resid_post"
D_IN = 768


@contextlib.contextmanager
def unsafe() -> Iterator[None]:
    """Nothing is flushed and nothing hashed."""
    with mock.patch.object(os, "fsync"), mock.patch.object(commit, "tensor_sha256", return_value="0" * 64):
        yield


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(with_it: Callable[[], float], without: Callable[[], float], rounds: int) -> list[tuple[float, float]]:
    """Seconds with and without, by round; the first round warms up and does not count."""
    found = []
    for number in range(rounds + 1):
        pair = (with_it(), without()) if number % 2 else (without(), with_it())[::-1]
        if number:
            found.append(pair)
    return found


def collect_seconds(model: str, corpus: str, tokens: int, safe: bool) -> float:
    """A whole collection."""
    config = CollectConfig(model=model, corpus=corpus, tokens=tokens, device="cpu", name="s", norms="stored")
    with tempfile.TemporaryDirectory() as folder, contextlib.nullcontext() if safe else unsafe():
        return seconds(lambda: collect(config, Workspace(Path(folder)), SilentReporter()))


def random_gpt2_small(folder: Path) -> str:
    """A GPT-2 small with random weights, and the embedded tokenizer."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_dir("mini") / name).read_bytes())
    return str(folder)


def write_store(workspace: Workspace, rows: int, name: str = "s", shards: int = 4) -> Artifact:
    """Random rows of GPT-2 small's width."""
    artifact = Artifact(Kind.ACTIVATIONS, name, workspace.folder(Kind.ACTIVATIONS, name))
    writer = StoreWriter(artifact.path, {})
    generator = torch.Generator().manual_seed(0)
    for index in range(shards):
        x = torch.randn(rows // shards, D_IN, generator=generator).half()
        writer.write(index, {HOOK: x, "norms": x.float().norm(dim=1)[:, None]}, nonfinite_rows=0)
    writer.finish({"hooks": [HOOK], "norm_hooks": [HOOK], "d_in": D_IN, "dtype": "float16"})
    return artifact


class Training:
    """`nsae train` on a store of random rows.

    Args:
        workspace: has the store; takes the SAEs.
        store: the store.
        d_sae: width.
        tokens: rows per run.
    """

    def __init__(self, workspace: Workspace, store: Artifact, d_sae: int, tokens: int) -> None:
        self._workspace, self._store, self._runs = workspace, store, 0
        self._options = {"d_sae": str(d_sae), "tokens": str(tokens), "device": "cpu", "probe_every": "off"}

    def seconds(self, *, hashed: bool = False, checkpoint_every: str = "1000000") -> float:
        """A whole run under a new name.

        Args:
            hashed: forget first that the store was ever read.
            checkpoint_every: steps.
        """
        if hashed:
            (self._store.path / VERIFIED).unlink(missing_ok=True)
        self._runs += 1
        options = TrainCommandOptions.model_validate(self._options | {"checkpoint_every": checkpoint_every})
        source = choose_source(options, self._store, self._workspace)
        return seconds(lambda: train(options, source, self._workspace, f"r{self._runs}", SilentReporter()))


def analysis_seconds(workspace: Workspace, store: Artifact, *, hashed: bool) -> float:
    """`analyze-top-norms` of the SAE ``r1`` under a new name; hashed: nothing is known of its store."""
    if hashed:
        (store.path / VERIFIED).unlink(missing_ok=True)
    name = f"t{len(list(workspace.complete(Kind.TOP_NORMS)))}"
    return seconds(lambda: run_top_norms(["r1"], store.name, TopNormsOptions(), workspace, name, SilentReporter()))


@contextlib.contextmanager
def waits() -> Iterator[list[float]]:
    """Seconds that training has waited at each checkpoint on the way, the copy included."""
    found: list[float] = []
    state, save_later = StepLoop._state, CheckpointWriter.save_later
    copied = [0.0]

    def timed_state(self: StepLoop, step: int, *, copy: bool) -> object:
        began = time.perf_counter()
        result = state(self, step, copy=copy)
        copied[0] = time.perf_counter() - began
        return result

    def timed_save(self: CheckpointWriter, *arguments: object) -> None:
        found.append(copied[0] + seconds(lambda: save_later(self, *arguments)))  # type: ignore[arg-type]

    with (
        mock.patch.object(StepLoop, "_state", timed_state),
        mock.patch.object(CheckpointWriter, "save_later", timed_save),
    ):
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16_384, help="of the store to train on, and of an epoch")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []

    def record(measure: str, setting: str, pairs: list[tuple[float, float]], share: float, waited: float | str) -> None:
        rows.append(
            {
                "date": today(),
                "nsae": nsae_cli.__version__,
                "torch": torch.__version__,
                "device": describe(torch.device("cpu")),
                "threads": torch.get_num_threads(),
                "rounds": len(pairs),
                "measure": measure,
                "setting": setting,
                "with_s": round(statistics.median(a for a, _ in pairs), 3),
                "without_s": round(statistics.median(b for _, b in pairs), 3),
                "share": round(share, 5),
                "waited_s": waited,
            }
        )
        low, high = spread([a / b - 1 for a, b in pairs])[1:]
        print(f"{measure}, {setting}: {share:.2%} of the time (rounds: {low:.2%} to {high:.2%}) {waited}", flush=True)

    def median_share(pairs: list[tuple[float, float]]) -> float:
        return statistics.median(a / b - 1 for a, b in pairs)

    with tempfile.TemporaryDirectory() as folder:
        models = [("mini", "builtin", 400_000), (random_gpt2_small(Path(folder)), "builtin", 8_192)]
        for (model, corpus, tokens), label in zip(models, ("mini", "random GPT-2 small"), strict=True):
            pairs = alternate(
                lambda model=model, corpus=corpus, tokens=tokens: collect_seconds(model, corpus, tokens, True),
                lambda model=model, corpus=corpus, tokens=tokens: collect_seconds(model, corpus, tokens, False),
                arguments.rounds,
            )
            record("collect", f"{label}, {tokens} tokens", pairs, median_share(pairs), "")
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        training = Training(workspace, write_store(workspace, arguments.rows), 6144, arguments.rows)
        pairs = alternate(lambda: training.seconds(hashed=True), training.seconds, arguments.rounds)
        record("first read", f"d_sae 6144, {arguments.rows} rows", pairs, median_share(pairs), "")
        store = write_store(workspace, 16 * arguments.rows, "large", shards=16)
        pairs = alternate(
            lambda: analysis_seconds(workspace, store, hashed=True),
            lambda: analysis_seconds(workspace, store, hashed=False),
            arguments.rounds,
        )
        setting = f"d_sae 6144, {16 * arguments.rows} rows"
        record("first analysis", setting, pairs, median_share(pairs), "")
        every, steps = 2, arguments.rows // 2048
        with waits() as waited:
            pairs = alternate(lambda: training.seconds(checkpoint_every=str(every)), training.seconds, arguments.rounds)
        each = statistics.median(a - b for a, b in pairs) / ((steps - 1) // every)
        setting = f"d_sae 6144, one of {each:.2f} s in {CHECKPOINT_SECONDS} s"
        record("checkpoint", setting, pairs, each / CHECKPOINT_SECONDS, round(statistics.median(waited), 3))
    append_rows(CSV, rows)


if __name__ == "__main__":
    main()

"""The commands that faults are tried on, each with the workspace that it begins in and what it leaves undisturbed."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import Ended, Server, Trial, fresh
from tiny_gpt2 import build_model, build_tokenizer

from command import contents
from hand_store import HOOKS, make_rows, write_full

#: Rows of a shard: two batches of four contexts of 16 tokens.
SHARD_ROWS = 128
#: Steps between the checkpoints of the trained stages, and their steps.
CHECKPOINT_EVERY, STEPS = 6, 20

#: Stands for a stage: a store that is written by hand, with sinks.
HAND_STORE = "hand store"

_COLLECT = (
    "collect", "--model", "{inputs}/tiny-gpt2", "--corpus", "{inputs}/corpus", "--context", "16", "--batch-size", "4",
    "--tokens", "1040", "--layers", "1,2", "--device", "cpu",
)  # fmt: skip
_TRAINED = (
    "--batch-size", "64", "--tokens", f"{64 * STEPS}", "--checkpoint-every", f"{CHECKPOINT_EVERY}",
    "--buffer", "300", "--lr", "0.003", "--d-sae", "24", "--device", "cpu",
)  # fmt: skip
_TRAIN = ("train", *_TRAINED)


@dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
        name: for tables.
        command: its arguments; ``{inputs}`` stands for the folder with model and corpus.
        after: names of the stages whose results it reads.
        resumes: what of its work is kept by a kill: ``shard``, ``step`` or None where it begins anew.
    """

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    resumes: str | None = None


_STAGES = [
    Stage("collect", (*_COLLECT, "--name", "acts"), resumes="shard"),
    Stage("norms", ("norms",), after=("collect",)),
    Stage("train", (*_TRAIN, "--layers", "2", "--name", "one"), after=("collect",), resumes="step"),
    Stage(
        "train grid",
        (*_TRAIN, "--layers", "all", "--act", "relu,tanh-relu", "--noise", "0.1", "--name", "grid"),
        after=("collect",),
        resumes="step",
    ),
    Stage(
        "train topk",
        (*_TRAIN, "--layers", "2", "--act", "topk", "--k", "4", "--dead-window", "128", "--name", "topk"),
        after=("collect",),
        resumes="step",
    ),
    Stage(
        "train target-l0",
        (*_TRAIN, "--layers", "2", "--target-l0", "5", "--resample-dead", "5", "--dead-window", "128", "--name", "l0"),
        after=("collect",),
        resumes="step",
    ),
    Stage(
        "train from model",
        ("train", "--from-model", "{inputs}/tiny-gpt2", "--corpus", "{inputs}/corpus", "--context", "16",
         "--harvest-batch-size", "4", *_TRAINED, "--layers", "2", "--name", "live"),
        resumes="step",
    ),
    Stage("analyze-top-norms", ("analyze-top-norms", "grid", "--top", "5%"), after=("collect", "train grid")),
    Stage("alter", ("alter", "acts", "--permute-norms", "--name", "permuted"), after=("collect",), resumes="shard"),
    Stage(
        "eval",
        ("eval", "one", "--model", "{inputs}/tiny-gpt2", "--corpus", "{inputs}/corpus", "--tokens", "500",
         "--batch-size", "4", "--device", "cpu", "--name", "evaluated"),
        after=("collect", "train"),
    ),
    Stage("compare", ("compare", "grid", "--name", "table"), after=("collect", "train grid")),
    Stage("report", ("report", "one", "--name", "page"), after=("collect", "norms", "train")),
]  # fmt: skip
STAGES = {stage.name: stage for stage in _STAGES}

_OTHER_STATES = [
    Stage(f"train {act}", (*_TRAIN, "--layers", "2", "--act", act, *options, "--name", act), ("collect",), "step")
    for act, options in {"batchtopk": ("--k", "4"), "jumprelu": ("--target-l0", "5")}.items()
]
#: On a store with sinks and with features that are silent for long, so that every item of the state can be told.
_OTHER_STATES.append(
    Stage(
        "train on sinks",
        ("train", "hand", *_TRAINED[:-4], "--d-sae", "160", "--device", "cpu", "--layers", "4", "--act", "topk",
         "--k", "1", "--dead-window", "128", "--name", "sinks"),
        after=(HAND_STORE,),
        resumes="step",
    )
)  # fmt: skip
#: All that train, and those whose checkpoints hold what those of the others do not.
TRAINED = {stage.name: stage for stage in (*_STAGES, *_OTHER_STATES) if stage.resumes == "step"}


@dataclass
class Prepared:
    """A stage that has been run undisturbed.

    Attributes:
        start: the workspace before the command, to be copied.
        whole: every file of the workspace after it.
        undisturbed: how the command ended.
        prefixes: where in the workspace its own files are.
    """

    stage: Stage
    arguments: tuple[str, ...]
    start: Path
    whole: dict[str, bytes]
    undisturbed: Ended

    def begin(self, folder: Path) -> Path:
        """A workspace in which the command has not been run."""
        workspace = fresh(folder)
        if self.start.exists():
            shutil.copytree(self.start, workspace)
        else:
            workspace.mkdir(parents=True)
        return workspace

    def trial(self, workspace: Path, **options: Any) -> Trial:
        """The command there, with a fault."""
        return Trial(workspace, self.arguments, {"shard_rows": SHARD_ROWS, **options})


@dataclass
class Stages:
    """Prepares stages when they are asked for; each once.

    Args:
        server: runs them.
        folder: for inputs and workspaces.
    """

    server: Server
    folder: Path
    _prepared: dict[str, Prepared] = field(default_factory=dict)

    def __post_init__(self) -> None:
        write_inputs(self.folder / "inputs")

    def get(self, name: str) -> Prepared:
        """The stage, run undisturbed.

        Its workspace begins with what the stages before it left.
        """
        if name not in self._prepared:
            stage = (STAGES | TRAINED)[name]
            start = fresh(self.folder)
            start.mkdir()
            for earlier in stage.after:
                if earlier == HAND_STORE:
                    write_full(start / "activations" / "hand", make_rows(65, 8, hooks=HOOKS), [200, 120, 0, 200])
                else:
                    self._run(self.get(earlier).arguments, start)
            arguments = tuple(word.format(inputs=self.folder / "inputs") for word in stage.command)
            # Run twice: what the first imports is kept by the server for all that follow.
            self.server.warm_up(self._trial(arguments, self._copy(start)))
            workspace = self._copy(start)
            undisturbed = self._run(arguments, workspace)
            if not self._prepared:
                self.server.warm_up(Trial(workspace, ("verify",), {"count_operations": False}))
            self._prepared[name] = Prepared(stage, arguments, start, contents(workspace), undisturbed)
            shutil.rmtree(workspace)
        return self._prepared[name]

    def _copy(self, start: Path) -> Path:
        workspace = fresh(self.folder)
        shutil.copytree(start, workspace)
        return workspace

    def _trial(self, arguments: tuple[str, ...], workspace: Path) -> Trial:
        return Trial(workspace, arguments, {"shard_rows": SHARD_ROWS, "count_phases": True})

    def _run(self, arguments: tuple[str, ...], workspace: Path) -> Ended:
        ended = self.server.run(self._trial(arguments, workspace))
        assert ended.code == 0, ended.describe()
        return ended


WORDS = ("the", "residual", "stream", "of", "tokens", "naïve", "→", "sink", "0", "norm", "\n", "def f(x):")


def write_inputs(folder: Path) -> None:
    """A tiny GPT-2 and a corpus of 60 documents."""
    build_model().save_pretrained(folder / "tiny-gpt2")
    build_tokenizer().save_pretrained(folder / "tiny-gpt2")
    draw = random.Random(0)
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(60):
        text = " ".join(draw.choices(WORDS, k=draw.randrange(41) if i % 7 else 0))
        (corpus / f"{i:03d}.txt").write_bytes(text.encode("utf-8"))

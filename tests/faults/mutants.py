"""Damaged files by the thousand: whoever reads one refuses it or gives exactly the values that were written.

``python tests/faults/mutants.py 10000 [SEED]`` runs so many and prints the counts as JSON; the suite runs a share.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from hand_store import HOOK, make_rows, write_full
from nsae_cli.analysis import gather
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.norms_artifact import NormsOptions, run_norms
from nsae_cli.analysis.top_norms_artifact import TopNormsOptions, load_rows, run_top_norms
from nsae_cli.analysis.verify import verify
from nsae_cli.errors import NsaeError
from nsae_cli.experiment.config import load_config
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.progress import PROGRESS, progress_text, recover_progress
from nsae_cli.store.sae_folder import load_sae
from nsae_cli.store.shards import open_activations
from nsae_cli.store.workspace import Artifact, Kind, Workspace
from nsae_cli.training.checkpoint import Checkpoints
from nsae_cli.training.loop import train
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.source import StoreSource
from nsae_cli.values import validate_options

#: No mutant may take longer to be refused.
SECONDS = 2.0
#: Each so many mutants `nsae verify` is asked about the damage too.
VERIFY_EVERY = 7

YAML = """\
stages:
  - collect: {model: mini-sink, tokens: 20k, layers: 2, name: acts}
  - norms: {activations: acts}
  - train:
      activations: acts
      act: [relu, tanh-relu]
      l2_norm: [none, sq]
      alpha: 0.2
      seed: [0, 1]
      tokens: 40k
  - analyze-top-norms: {top: 1%}
"""


@dataclass
class Target:
    """Files and the code that reads them.

    Attributes:
        name: for the counts.
        files: that are damaged, one at a time.
        read: what a reader gets from them; raises NsaeError where it refuses.
        artifact: the folder that `nsae verify` is asked about; None where damage is no finding of it.
        exact: whether what is read without an error has to be what was written (a changed configuration is another).
        accept: whether a reading is allowed, given the intact one.
    """

    name: str
    files: list[Path]
    read: Callable[[], Any]
    artifact: Path | None = None
    exact: bool = True
    accept: Callable[[Any, Any], bool] = field(default=lambda found, whole: bool(found == whole))


@dataclass
class Tally:
    """Counts of what became of mutants, by target."""

    mutants: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    same: Counter[str] = field(default_factory=Counter)
    verified: int = 0
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For people and for the table of results."""
        return {
            "mutants": sum(self.mutants.values()),
            "refused": sum(self.refused.values()),
            "same_values": sum(self.same.values()),
            "wrong": len(self.wrong),
            "found_by_verify": self.verified,
            "slowest_seconds": round(self.slowest, 3),
            "by_target": {
                name: {"mutants": count, "refused": self.refused[name], "same_values": self.same[name]}
                for name, count in sorted(self.mutants.items())
            },
            "examples": self.wrong[:20],
        }


def make_targets(root: Path) -> list[Target]:
    """A small workspace with one artifact of each kind that is read from tensors, and who reads it."""
    workspace, quiet = Workspace(root / "runs"), SilentReporter()
    folder = write_full(workspace.folder(Kind.ACTIVATIONS, "s"), make_rows(), [160, 160, 160])
    store = open_activations(folder)
    run_norms(store, NormsOptions(), workspace, "n", quiet)
    given = {"d_sae": "20", "tokens": "2560", "batch_size": "64", "act": "topk", "k": "4", "checkpoint_every": "20"}
    options = validate_options(TrainOptions, given)
    kept = root / "checkpoints"

    class Keeper(SilentReporter):
        @contextlib.contextmanager
        def task(self, description: str, total: int | None, unit: str) -> Iterator[Any]:
            if description == "evaluating":  # the last moment at which checkpoints are there
                shutil.copytree(workspace.root / "saes" / "t" / "checkpoints", kept)
            with super().task(description, total, unit) as task:
                yield task

    train(options, StoreSource(store, options), workspace, "t", Keeper())
    run_top_norms(["t"], None, TopNormsOptions(), workspace, None, quiet)
    (root / "config.yaml").write_text(YAML)
    progress = root / "unfinished" / PROGRESS
    progress.parent.mkdir()
    begun = {"model": "m", "tokens": 480, "layers": [1, 2]}
    progress.write_text(progress_text(begun, store.manifest.shards))
    for entry in store.manifest.shards:
        shutil.copy(folder / entry.file, progress.parent)
    return [
        _store(folder),
        _norms(Artifact(Kind.NORMS, "n", workspace.folder(Kind.NORMS, "n"))),
        _sae(Artifact(Kind.SAE, "t", workspace.folder(Kind.SAE, "t"))),
        _top_norms(Artifact(Kind.TOP_NORMS, "t", workspace.folder(Kind.TOP_NORMS, "t"))),
        _checkpoint(kept),
        _progress(progress, begun),
        Target(
            "config.yaml", [root / "config.yaml"], lambda: load_config(root / "config.yaml", workspace), exact=False
        ),
    ]


def _digests(tensors: dict[str, Any]) -> dict[str, str]:
    arrays = {name: t.numpy() if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
    return {name: f"{a.dtype}{a.shape}{hashlib.sha256(a.tobytes()).hexdigest()}" for name, a in sorted(arrays.items())}


def _unsealed(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "checksum"}


def _store(folder: Path) -> Target:
    def read() -> Any:
        (folder / "verified.jsonl").unlink(missing_ok=True)
        store = open_activations(folder)
        names = [HOOK, "norms", "tokens", "positions", "documents"]
        shards = [_digests(store.read(shard, names)) for shard in range(len(store.manifest.shards))]
        return _unsealed(store.manifest.model_dump()), shards

    return Target("store", [folder / "manifest.json", *sorted(folder.glob("shard-*"))], read, folder)


def _norms(artifact: Artifact) -> Target:
    def read() -> Any:
        found = gather.read_norms(artifact)
        return _unsealed(found.document), _digests(found.arrays)

    files = [artifact.path / "norms.json", artifact.path / "norms.safetensors"]
    return Target("norms", files, read, artifact.path)


def _sae(artifact: Artifact) -> Target:
    def read() -> Any:
        saved = load_sae(artifact.path)
        return (
            _unsealed(saved.run),
            saved.sae.act,
            saved.sae.k,
            _digests(saved.sae.named()),
            gather.read_curves(artifact),
        )

    names = ("run.json", "cfg.json", "sae_weights.safetensors", "metrics.jsonl")
    return Target("sae", [artifact.path / name for name in names], read, artifact.path)


def _top_norms(artifact: Artifact) -> Target:
    def read() -> Any:
        document = read_document(artifact, required=("sae", "activations", "groups"))
        return _unsealed(document), _digests(load_rows(artifact, document))

    files = [artifact.path / "top_norms.json", artifact.path / "top_norms.safetensors"]
    return Target("top-norms", files, read, artifact.path)


def _checkpoint(folder: Path) -> Target:
    """The newest checkpoint or, where it is damaged, the one before: each as it was."""
    written = {step: folder / f"step-{step}" for step in Checkpoints(folder).steps()}

    def read() -> Any:
        checkpoints = Checkpoints(folder)
        configs = checkpoints.configs()
        damaged = checkpoints.damaged()
        states = {}
        for step in written.keys() - damaged.keys():
            found = checkpoints._read(step)  # `latest` would remove the damaged one
            states[step] = (found.step, {cell: _digests(s) for cell, s in found.cells.items()}, found.logs)
        return _unsealed(configs or {}), states

    def accept(found: Any, whole: Any) -> bool:
        # A seal whose key was damaged is an unknown key, which is ignored, beside what was written.
        return all(found[0].get(key) == value for key, value in whole[0].items()) and all(
            whole[1][step] == state for step, state in found[1].items()
        )

    newest = written[max(written)]
    files = [folder / "begun.json", *(newest / name for name in ("state.safetensors", "state.json", "files.json"))]
    return Target("checkpoint", files, read, accept=accept)


def _progress(progress: Path, begun: dict[str, Any]) -> Target:
    """Shards whose lines are damaged are made again; no line is believed with other values."""
    intact = progress.read_bytes()

    def read() -> Any:
        found = {index: entry.model_dump() for index, entry in recover_progress(progress, begun).items()}
        return found if progress.read_bytes() == intact or found else {}

    def accept(found: Any, whole: Any) -> bool:
        return all(whole.get(index) == entry for index, entry in found.items())

    return Target("progress.jsonl", [progress], read, accept=accept)


# Damage


def mutate(content: bytes, name: str, rng: random.Random) -> tuple[str, bytes]:
    """One way in which a file is damaged, and the damaged content."""
    kinds: list[Callable[[bytearray, random.Random], None]] = [
        _flip, _flip, _byte, _truncate, _insert, _delete, _swap, _repeat, _zero
    ]  # fmt: skip
    if name.endswith((".json", ".jsonl")) and rng.random() < 0.5:
        return "json", _edit_json(content, rng)
    damaged = bytearray(content)
    chosen = rng.choice(kinds)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if damaged:
            chosen(damaged, rng)
    return chosen.__name__.strip("_"), bytes(damaged)


def _span(content: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content))
    return start, min(len(content), start + rng.choice([1, 2, 8, 64, 512]))


def _flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _byte(content: bytearray, rng: random.Random) -> None:
    # Half of the time in the beginning, where lengths and headers are.
    content[rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 64))] = rng.randrange(256)


def _truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _insert(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content) + 1)
    content[start:start] = rng.randbytes(rng.choice([1, 4, 16, 300]))


def _delete(content: bytearray, rng: random.Random) -> None:
    start, end = _span(content, rng)
    del content[start:end]


def _swap(content: bytearray, rng: random.Random) -> None:
    length = rng.choice([1, 4, 64, 512])
    if len(content) < 2 * length + 1:
        return
    first, second = sorted(rng.randrange(len(content) - length) for _ in range(2))
    if second - first >= length:
        one, two = bytes(content[first : first + length]), bytes(content[second : second + length])
        content[first : first + length], content[second : second + length] = two, one


def _repeat(content: bytearray, rng: random.Random) -> None:
    start, end = _span(content, rng)
    content[end:end] = content[start:end]


def _zero(content: bytearray, rng: random.Random) -> None:
    start, end = _span(content, rng)
    content[start:end] = bytes(end - start)


def _edit_json(content: bytes, rng: random.Random) -> bytes:
    """Another value, a missing or a renamed key; the seal is left as it was."""
    lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
    number = rng.randrange(len(lines))
    document = copy.deepcopy(json.loads(lines[number]))
    places = list(_places(document))
    holder, key = rng.choice(places)
    value = holder[key]
    action = rng.choice(["value", "value", "value", "delete", "rename"])
    if action == "delete" or (action == "rename" and isinstance(holder, list)):
        del holder[key]
    elif action == "rename":
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = _other(value, rng)
    lines[number] = json.dumps(document, ensure_ascii=False)
    return ("\n".join(lines) + "\n").encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield value, key
        yield from _places(child)


def _other(value: Any, rng: random.Random) -> Any:
    odd = [None, True, -1, 0, 1e308, "", "..", "../../x", [], {}, 2**63, "NaN", 10**30]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int) and rng.random() < 0.7:
        return value + rng.choice([-1, 1, 1000])
    if isinstance(value, float) and rng.random() < 0.7:
        return value * 1.0000001 + 1e-9
    if isinstance(value, str) and rng.random() < 0.5:
        return value[::-1] + "0"
    return rng.choice(odd)


def run_mutants(count: int, seed: int, targets: list[Target]) -> Tally:
    """Damages files one after the other; each is whole again afterwards."""
    rng, tally = random.Random(seed), Tally()
    intact = {path: path.read_bytes() for target in targets for path in target.files}
    whole = {target.name: target.read() for target in targets}
    for number in range(count):
        target = targets[number % len(targets)]
        path = rng.choice(target.files)
        how, damaged = mutate(intact[path], path.name, rng)
        if damaged == intact[path]:
            continue
        path.write_bytes(damaged)
        label = f"seed {seed}, mutant {number}: {how} of {target.name}/{path.name}"
        tally.mutants[target.name] += 1
        started = time.perf_counter()
        try:
            found = target.read()
        except NsaeError as error:
            tally.refused[target.name] += 1
            if "\n" in str(error):
                tally.wrong.append(f"{label}: a message of several lines: {error}")
            if target.artifact is not None and number % VERIFY_EVERY == 0:
                _ask_verify(target.artifact, label, tally)
        except Exception as error:
            tally.wrong.append(f"{label}: {type(error).__name__}: {error}")
        else:
            tally.same[target.name] += 1
            if target.exact and not target.accept(found, whole[target.name]):
                tally.wrong.append(f"{label}: read with other values")
        seconds = time.perf_counter() - started
        tally.slowest = max(tally.slowest, seconds)
        if seconds > SECONDS:
            tally.wrong.append(f"{label}: took {seconds:.1f} s")
        path.write_bytes(intact[path])
    for target in targets:
        if target.read() != whole[target.name]:
            tally.wrong.append(f"{target.name}: not whole again after its mutants")
    return tally


def _ask_verify(folder: Path, label: str, tally: Tally) -> None:
    [result] = verify([str(folder)], Workspace(folder.parents[1]), repair=False, reporter=SilentReporter())
    if result.state == "damaged":
        tally.verified += 1
    else:
        tally.wrong.append(f"{label}: nsae verify says {result.state}")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as scratch:
        result = run_mutants(*(*arguments, 0)[:2], make_targets(Path(scratch)))
    print(json.dumps(result.to_json(), indent=2))
    sys.exit(bool(result.wrong))

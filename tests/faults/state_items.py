"""Every item of a checkpoint matters: without it, or with another value, going on is refused or found out (G7)."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import checks
import torch
from forked import Server
from safetensors.torch import load_file, save_file
from stages import Stages
from tally import Tally

#: Kinds of items by a pattern of their names; what fits none is a kind of its own.
_KINDS = {
    r"W_enc|b_enc|W_dec|b_dec|log_threshold": "weights",
    r"adam/exp_avg/.*": "Adam's first moments",
    r"adam/exp_avg_sq/.*": "Adam's second moments",
}
#: What decides how fast a step is and nothing else: a changed value changes no bit of the result.
_OF_SPEED = ("kernel/refused",)
#: What tells in the result only where features fall silent or sinks are there: changed on that stage alone.
_ON_SINKS, _TELLING_STAGE = ("window/", "probe/"), "train on sinks"


def kind_of(item: str) -> str:
    """What an item of a checkpoint is, for the table."""
    return next((kind for pattern, kind in _KINDS.items() if re.fullmatch(pattern, item)), item)


def change_items(
    server: Server, stages: Stages, folder: Path, names: list[str], step: int = 11, every: int = 1
) -> list[Tally]:
    """Stops training at `step`; for each item of the checkpoint: drops it, or changes it, and goes on.

    The checkpoint's hashes are made to fit: that they would find the damage is another test's concern.

    Args:
        names: stages.
        every: only each so many of the items.
    """
    tallies = []
    for name in names:
        prepared = stages.get(name)
        calls = sum(fields == ("train step",) for fields in prepared.undisturbed.of("phase"))
        stopped = prepared.begin(folder)
        wanted = {"phase": "train step", "call": calls * step // 20, "signum": int(signal.SIGINT)}
        ended = server.run(prepared.trial(stopped, signal=wanted))
        assert ended.code == 130, ended.describe()
        [checkpoint] = stopped.glob(f"saes/*/checkpoints/step-{step}")
        items = load_file(checkpoint / "state.safetensors", backend="pread")
        dropped = Tally("an item of a checkpoint dropped", name)
        changed = Tally("an item of a checkpoint changed", name)
        detected: Counter[str] = Counter()
        for key in sorted(items)[::every]:
            for tally, value in ((dropped, None), (changed, _another(items[key]))):
                if value is not None and torch.equal(value, items[key]):
                    continue  # of no elements
                if value is not None and key.partition("/")[2] in _OF_SPEED:
                    tally.counts["not tried: steers speed only"] += 1
                    continue
                if value is not None and name != _TELLING_STAGE and key.partition("/")[2].startswith(_ON_SINKS):
                    continue
                workspace = prepared.begin(folder)
                shutil.rmtree(workspace)
                shutil.copytree(stopped, workspace)
                rest = {other: tensor for other, tensor in items.items() if other != key}
                _rewrite(workspace / checkpoint.relative_to(stopped), rest | ({} if value is None else {key: value}))
                again = server.run(prepared.trial(workspace))
                problems = []
                if again.code == 0 and not checks.differences(prepared, workspace):
                    problems.append("nobody noticed")
                elif again.code not in (0, 3):
                    problems.append(again.describe())
                elif value is None and again.code != 3:
                    problems.append("it went on without")
                detected[kind_of(key.partition("/")[2])] += not problems
                tally.counts["refused" if again.code == 3 else "found by its bytes"] += not problems
                tally.add(key, problems)
                shutil.rmtree(workspace)
        for tally in (dropped, changed):
            tally.counts["kinds of items"] = len(detected)
            tallies.append(tally)
    return tallies


def _another(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same type with other values: of bytes and truth values the middle one, else all of them."""
    if tensor.is_floating_point():
        return torch.where(tensor.isfinite(), tensor * 1.25 + 0.01, torch.full_like(tensor, 0.5))
    if tensor.dtype == torch.int64:
        return tensor + 100_003
    value = tensor.clone()
    flat = value.reshape(-1)
    if len(flat):
        middle = len(flat) // 2
        flat[middle] = ~flat[middle] if tensor.dtype == torch.bool else flat[middle] ^ 1
    return value


def _rewrite(checkpoint: Path, items: dict[str, torch.Tensor]) -> None:
    """Writes a checkpoint's tensors anew, with hashes that fit."""
    save_file({key: tensor.contiguous() for key, tensor in items.items()}, checkpoint / "state.safetensors")
    hashes = json.loads((checkpoint / "files.json").read_text())
    hashes["state.safetensors"] = hashlib.sha256((checkpoint / "state.safetensors").read_bytes()).hexdigest()
    (checkpoint / "files.json").write_text(json.dumps(hashes))

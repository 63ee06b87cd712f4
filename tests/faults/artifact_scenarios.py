"""Exit code 3: scenarios."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import pytest
import torch
from provoking import Place, edit, flip, rewrite_shard, scenario
from safetensors.torch import load_file, save_file

from command import nsae
from hand_store import make_rows, write_foreign
from nsae_cli import interrupt

ANALYZE = ["analyze-top-norms", "--name", "new"]
AUDIT = ["audit", "--hook", "blocks.1.hook_resid_post", "--model", "mini"]
TRAIN = ["train", "--seed", "9", "--device", "cpu"]


@scenario("UNFINISHED")
def _(place: Place) -> list[Any]:
    place.damaged()
    (place.cell / "run.json").unlink()
    return ["analyze-top-norms", place.cell_name]


@scenario("NOT_AN_ARTIFACT")
def _(place: Place) -> list[Any]:
    return ["train", place.tmp]


@scenario("FORMAT_VERSION")
def _(place: Place) -> list[Any]:
    place.damaged()
    edit(place.cell / "run.json", format_version=2)
    return ["analyze-top-norms", place.cell_name]


@scenario("JSON_DAMAGED")
def _(place: Place) -> list[Any]:
    place.damaged()
    (place.store / "manifest.json").write_text("{")
    return TRAIN


@scenario("DOCUMENT_INVALID")
def _(place: Place) -> list[Any]:
    place.damaged()
    [norms] = (place.workspace / "norms").glob("*/norms.json")
    norms.write_text("[]")
    return ["plot", "norms"]


@scenario("RESULTS_DAMAGED")
def _(place: Place) -> list[Any]:
    place.damaged()
    [norms] = (place.workspace / "norms").glob("*/norms.safetensors")
    os.truncate(norms, 100)
    edit(norms.with_name("norms.json"))  # of an older nsae, which states no hashes
    return ["plot", "norms"]


@scenario("MANIFEST_INVALID")
def _(place: Place) -> list[Any]:
    place.damaged()
    edit(place.store / "manifest.json", shards=[{"file": "../../x", "rows": 1}], rows=1)
    return TRAIN


@scenario("PROGRESS_DAMAGED")
def _(place: Place) -> list[Any]:
    folder = place.empty() / "activations" / "torn"
    folder.mkdir(parents=True)
    (folder / "progress.jsonl").write_text("{")
    return ["collect", "--model", "mini", "--tokens", "2k", "--device", "cpu", "--name", "torn"]


@scenario("CHECKPOINT_INCOMPLETE")
def _(place: Place) -> list[Any]:
    place.damaged()
    command = [*TRAIN, "--d-sae", "32", "--tokens", "8k"]
    with pytest.MonkeyPatch.context() as patch:
        polls = iter(range(2))
        patch.setattr(interrupt, "stop_requested", lambda: None if next(polls, None) is not None else 2)
        assert nsae("--workspace", place.workspace, *command).code == 130
    [state] = place.workspace.glob("saes/*/checkpoints/step-*/state.safetensors")
    items = load_file(state, backend="pread")
    save_file({key: item for key, item in items.items() if not key.endswith("/zero_rows")}, state)
    files = state.with_name("files.json")
    hashes = json.loads(files.read_text()) | {state.name: hashlib.sha256(state.read_bytes()).hexdigest()}
    files.write_text(json.dumps(hashes))
    return command


@scenario("SHARD_MISSING")
def _(place: Place) -> list[Any]:
    place.damaged()
    (place.store / "shard-00000.safetensors").unlink()
    return TRAIN


@scenario("SHARD_SIZE")
def _(place: Place) -> list[Any]:
    place.damaged()
    os.truncate(place.store / "shard-00000.safetensors", 1000)
    return TRAIN


@scenario("SHARD_LINK")
def _(place: Place) -> list[Any]:
    place.damaged()
    shard = place.store / "shard-00000.safetensors"
    shard.rename(place.tmp / "moved")
    shard.symlink_to(place.tmp / "moved")
    return TRAIN


@scenario("SHARD_UNREADABLE")
def _(place: Place) -> list[Any]:
    place.empty()
    store = write_foreign(place.tmp / "foreign", make_rows(), [480])
    (store / "part0.safetensors").write_bytes(b"\x80\x04 no safetensors")
    return ["train", store, "--device", "cpu"]


@scenario("SHARD_MISMATCH")
def _(place: Place) -> list[Any]:
    place.empty()
    return ["train", write_foreign(place.tmp / "foreign", make_rows(), [480], d_in=13), "--device", "cpu"]


@scenario("CONTENT_CHANGED")
def _(place: Place) -> list[Any]:
    place.damaged()
    flip(place.store / "shard-00000.safetensors")
    return TRAIN


@scenario("DAMAGE_FOUND")
def _(place: Place) -> list[Any]:
    place.damaged()
    flip(place.store / "shard-00000.safetensors")
    return ["verify", place.store.name]


@scenario("SAE_INVALID")
def _(place: Place) -> list[Any]:
    place.damaged()
    edit(place.cell / "cfg.json", architecture="transcoder")
    edit(place.cell / "run.json")  # of an older nsae, which states no hashes
    return ["analyze-top-norms", place.cell_name, "--name", "new"]


@scenario("SAE_DAMAGED")
def _(place: Place) -> list[Any]:
    place.damaged()
    (place.cell / "sae_weights.safetensors").write_bytes(b"no safetensors")
    return ["analyze-top-norms", place.cell_name, "--name", "new"]


@scenario("STORE_CHANGED")
def _(place: Place) -> list[Any]:
    place.damaged()
    edit(place.store / "manifest.json", dropped={"tokens": 1, "documents": 0})
    return ANALYZE


@scenario("HOOK_MISMATCH")
def _(place: Place) -> list[Any]:
    rows = make_rows(d_in=64, hooks=("blocks.5.hook_resid_post",))
    return [*ANALYZE, "--activations", write_foreign(place.tmp / "foreign", rows, [480])]


@scenario("WIDTH_MISMATCH")
def _(place: Place) -> list[Any]:
    return [*ANALYZE, "--activations", write_foreign(place.tmp / "foreign", make_rows(), [480])]


@scenario("MODEL_MISMATCH")
def _(place: Place) -> list[Any]:
    store = write_foreign(place.tmp / "foreign", make_rows(d_in=64), [480], model="gpt2")
    return [*ANALYZE, "--activations", store]


@scenario("TOKENS_OF_ANOTHER_MODEL")
def _(place: Place) -> list[Any]:
    place.damaged()
    rewrite_shard(place.store, lambda tensors: tensors["tokens"].fill_(10**6))
    return ["eval", place.cell_name, "--activations", place.store.name, "--name", "new", "--device", "cpu"]


@scenario("TEXT_CUT")
def _(place: Place) -> list[Any]:
    place.damaged()
    context = json.loads((place.store / "manifest.json").read_text())["context_size"]

    def shift(tensors: dict[str, torch.Tensor]) -> None:
        tensors["positions"] = (torch.arange(len(tensors["positions"])) % context + 1).int()

    rewrite_shard(place.store, shift)
    return ["eval", place.cell_name, "--activations", place.store.name, "--name", "new", "--device", "cpu"]


@scenario("NOTHING_TO_MEASURE")
def _(place: Place) -> list[Any]:
    place.empty()
    return ["norms", write_foreign(place.tmp / "none", make_rows(contexts=0), [0]), "--name", "new"]


@scenario("HOOK_UNSUPPORTED")
def _(place: Place) -> list[Any]:
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.1.attn.hook_z", "model_name": "gpt2"}
    return ["audit", place.golden("saelens6-standard", metadata=metadata)]


@scenario("NOT_TRAINED_HERE")
def _(place: Place) -> list[Any]:
    place.damaged()
    config = json.loads((place.cell / "run.json").read_text())["config"]
    del config["act"]
    edit(place.cell / "run.json", config=config)
    return ["compare", place.group.name, "--name", "new"]


# SAEs of other packages ----------------------------------------------------------------------------------------------


@scenario("PICKLE")
def _(place: Place) -> list[Any]:
    return [*AUDIT, place.corpus("ae.pt", b"\x80\x04cposix\nsystem\n")]


@scenario("FOREIGN_CONFIG")
def _(place: Place) -> list[Any]:
    return [*AUDIT, place.golden("saelens6-standard", d_in=None)]


@scenario("FOREIGN_ARCHITECTURE")
def _(place: Place) -> list[Any]:
    return [*AUDIT, place.golden("saelens6-standard", architecture="transcoder")]


@scenario("FOREIGN_SCALE")
def _(place: Place) -> list[Any]:
    return [*AUDIT, place.golden("saelens5-relu", normalize_activations=True)]


@scenario("FOREIGN_TENSORS")
def _(place: Place) -> list[Any]:
    return [*AUDIT, place.golden("saelens6-standard", d_in=9)]


# Models --------------------------------------------------------------------------------------------------------------


@scenario("MODEL_INCOMPLETE")
def _(place: Place) -> list[Any]:
    return ["collect", "--model", place.tmp]


@scenario("MODEL_CONFIG")
def _(place: Place) -> list[Any]:
    folder = place.model()
    (folder / "config.json").write_text("{")
    return ["collect", "--model", folder]


@scenario("MODEL_WEIGHTS")
def _(place: Place) -> list[Any]:
    place.empty()
    folder = place.model()
    tensors = load_file(folder / "model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ["collect", "--model", folder, "--corpus", "builtin", "--tokens", "2k", "--device", "cpu"]


@scenario("TOKENIZER")
def _(place: Place) -> list[Any]:
    place.empty()
    folder = place.model()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return ["collect", "--model", folder, "--corpus", "builtin", "--tokens", "2k", "--device", "cpu"]

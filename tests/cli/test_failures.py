"""What can go wrong at the command line: one line that names option or file and a remedy, and the exit code."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command import contents, nsae
from hand_store import make_rows, write_foreign
from nsae_cli.store import commit
from sealed_json import edit_json, seal_again

# Usage ---------------------------------------------------------------------------------------------------------------

USAGE: list[tuple[str, list[str]]] = [
    # unknown words
    ("colect", ["'colect'", "collect", "nsae --help"]),
    ("frobnicate", ["'frobnicate'", "known are collect, norms, "]),
    ("--frob list", ["--frob", "nsae --help"]),
    ("train --frob 3", ["--frob", "nsae train --help"]),
    ("list --json", ["--json stands before the command"]),
    ("train a b", ["extra argument", "b"]),
    ("train --act", ["--act", "requires an argument"]),
    ("run", ["CONFIG.yaml"]),
    ("plot", ["activation, training, bias, pareto, norms, top-norms"]),
    ("plot foo", ["'foo'", "'activation', 'training'"]),
    ("plot norms --format gif", ["--format gif", "png, svg, pdf"]),
    ("plot norms --format png,", ["--format png,", "comma list"]),
    ("plot norms a b", ["a b", "one at a time"]),
    ("report --browse none --browse x", ["--browse none", "--browse x"]),
    ("report --text --name x", ["--text", "--name x"]),
    ("report --rows 0", ["--rows 0", "more than 0"]),
    ("report --rows few", ["--rows few", "a number"]),
    ("report --contexts 51", ["--contexts 51", "at most 50"]),
    ("plot activation x", ["nsae plot training x"]),
    # choices: the known values are listed
    ("train --act gelu", ["--act gelu", "relu, tanh-relu, topk, batchtopk or jumprelu"]),
    ("train --act relu,gelu", ["--act gelu", "relu, tanh-relu, topk, batchtopk or jumprelu"]),
    ("train --l2-norm 2", ["--l2-norm 2", "none, norm, sq or cosine"]),
    ("train --l1-norm sq", ["--l1-norm sq", "none or norm"]),
    ("train --decoder x", ["--decoder x", "unit, free or bounded"]),
    ("train --sparsity l2", ["--sparsity l2", "l1, l1-decoder-norm, tanh or l0"]),
    ("train --alpha-scale x", ["--alpha-scale x", "layer-norm, none or note"]),
    ("train --sinks x", ["--sinks x", "keep or drop"]),
    ("train --kernel fast", ["--kernel fast", "auto, dense or sparse"]),
    ("train --precision bf16", ["--precision bf16", "auto, fp32 or certified"]),
    ("train --max-memory 0", ["--max-memory 0", "more than 0"]),
    ("train --max-memory lots", ["--max-memory lots", "a number"]),
    ("bench --rounds 0", ["--rounds 0", "more than 0"]),
    ("bench --threads two", ["--threads two", "a number"]),
    ("bench --l0 500 --d-sae 512", ["--l0 500", "9 of 10", "--d-sae 512"]),
    ("bench --device gpu", ["--device gpu", "auto, cpu, cuda, cuda:N or mps"]),
    ("train --device gpu", ["--device gpu", "auto, cpu, cuda, cuda:N or mps"]),
    ("collect --model mini --dtype float16", ["--dtype float16", "fp16, bf16 or fp32"]),
    ("collect --model mini --model-dtype x", ["--model-dtype x", "auto", "fp16, bf16 or fp32"]),
    ("collect --model mini --site mid", ["--site mid", "resid_post, resid_pre, resid_mid, attn_out or mlp_out"]),
    ("collect --model mini --norms few", ["--norms few", "all or stored"]),
    ("collect --model mini --split foo", ["--split foo", "train, heldout"]),
    # numbers
    ("train --alpha x", ["--alpha x", "a number"]),
    ("train --alpha -1", ["--alpha -1", "at least 0"]),
    ("train --alpha nan", ["--alpha nan", "finite"]),
    ("train --lr inf", ["--lr inf", "finite"]),
    ("train --lr 0", ["--lr 0", "more than 0"]),
    ("train --lr 1e-3,-1", ["--lr -1", "more than 0"]),
    ("train --tokens 0", ["--tokens 0", "more than 0"]),
    ("train --tokens -5", ["--tokens -5", "not negative"]),
    ("train --tokens 1.5", ["--tokens 1.5", "whole number"]),
    ("train --tokens 5q", ["--tokens 5q", "500k"]),
    ("train --tokens 1e300", ["--tokens 1e300", "below 2^63"]),
    ("train --tokens 1e999", ["--tokens 1e999", "whole number"]),
    ("train --tokens 100", ["--tokens 100", "2,048"]),
    ("train --seed 99999999999999999999", ["--seed 9999", "below 2^63"]),
    ("train --seed -1", ["--seed -1", "not negative"]),
    ("train --batch-size 0", ["--batch-size 0", "more than 0"]),
    ("train --act relu,relu", ["--act relu,relu", "once"]),
    ("train --act relu,", ["--act relu,", "without gaps"]),
    ("train --d-sae 0", ["--d-sae 0", "at least 1"]),
    ("train --expansion-factor 1e-9", ["--expansion-factor", "at least 1"]),
    ("train --clip 0", ["--clip 0", "more than 0"]),
    ("train --input-scale 0", ["--input-scale 0: expected auto or more than 0"]),
    ("train --input-scale x", ["--input-scale x: expected auto or a number"]),
    ("train --alpha-warm-up 2", ["--alpha-warm-up 2", "at most 1"]),
    ("train --alpha-warm-up nan", ["--alpha-warm-up nan", "1% or 0.01"]),
    ("train --checkpoint-every 0", ["--checkpoint-every 0", "5m"]),
    ("analyze-top-norms --top 0", ["--top 0", "more than 0"]),
    ("analyze-top-norms --top 60%", ["--top 60%", "at most 0.5"]),
    ("analyze-top-norms --top nan", ["--top nan", "1% or 0.01"]),
    ("analyze-top-norms --top x", ["--top x", "1% or 0.01"]),
    ("analyze-top-norms --rows 0", ["--rows 0", "more than 0"]),
    ("collect --model mini --tokens nan", ["--tokens nan", "a number"]),
    ("collect --model mini --tokens 5", ["--tokens 5", "128"]),
    ("collect --model mini --context 1", ["--context 1", "at least 2"]),
    ("collect --model mini --context 129", ["--context 129", "at most 128"]),
    ("collect --model mini --batch-size 0", ["--batch-size 0", "at least 1"]),
    # layers
    ("collect --model mini --layers 4", ["layer 4: mini has 0-3"]),
    ("collect --model mini --layers 1000000000", ["layer 1000000000: mini has 0-3"]),
    ("collect --model mini --layers -1", ["--layers -1"]),
    ("collect --model mini --layers five", ["--layers five"]),
    ("train --layers 0", ["--layers 0" , "2"]),
    ("train --layers five", ["--layers five", "0-3"]),
    # several options
    ("train --d-sae 96 --expansion-factor 4", ["--d-sae", "--expansion-factor", "one of them"]),
    ("train --act tanh-relu --decoder unit", ["--act tanh-relu", "--decoder unit", "use --decoder free"]),
    ("train --act relu --decoder free", ["--act relu", "--decoder free", "use --decoder unit"]),
    ("train --act topk --alpha 0.1", ["--alpha 0.1", "--act topk", "no sparsity penalty", "--k"]),
    ("train --act batchtopk,topk --sparsity tanh", ["--sparsity tanh", "--act batchtopk,topk"]),
    ("train --act topk --l1-norm norm", ["--l1-norm norm", "--act topk"]),
    ("train --k 4", ["--k 4", "--act relu", "topk, batchtopk"]),
    ("train --act jumprelu --aux-k 4", ["--aux-k 4", "--act jumprelu"]),
    ("train --act topk --bandwidth 0.1", ["--bandwidth 0.1", "only with jumprelu"]),
    ("train --act topk --k 0", ["--k 0", "at least 1"]),
    ("train --act topk --k 4,97 --d-sae 96", ["--k 97", "96 features"]),
    ("train --act topk --aux-k x", ["--aux-k x"]),
    ("train --act jumprelu --sparsity l1", ["--act jumprelu", "--sparsity l1", "use --sparsity l0"]),
    ("train --act relu --sparsity l0", ["--act relu", "--sparsity l0", "use --act jumprelu"]),
    ("collect --model mini --corpus builtin --text-column x", ["--text-column x", "built-in"]),
    ("collect --model mini --revision x", ["--revision x", "no hub model"]),
    # names
    ("train nope", ["'nope'", "there are: {store}"]),
    ("norms nope", ["'nope'", "there are: {store}"]),
    ("analyze-top-norms nope", ["'nope'", "there are: "]),
    ("analyze-top-norms --activations nope", ["'nope'", "there are: {store}"]),
    ("plot training nope", ["'nope'", "there are: "]),
    ("plot pareto nope", ["'nope'", "there are: "]),
    ("report nope", ["'nope'", "there are: "]),
    ("report --browse nope", ["'nope'", "there are: "]),
    ("train --name a/b", ["--name 'a/b'", "letters, digits"]),
    ("train --name ..", ["--name '..'"]),
    ("norms --name -x", ["--name '-x'"]),
    ("collect --model mini --name a/b", ["--name 'a/b'"]),
    ("analyze-top-norms --name a\\b", ["--name"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), USAGE, ids=[arguments for arguments, _ in USAGE])
def test_usage(arguments: str, expected: list[str], finished: Path, store: str) -> None:
    outcome = nsae("--workspace", finished, *arguments.split())
    assert outcome.code == 2
    for text in expected:
        assert text.format(store=store) in outcome.message
    assert len(outcome.message) <= 200


@pytest.mark.parametrize("name", ["", "a\nb", "a b", "é", "x" * 121, "~", "%2e%2e"])
@pytest.mark.parametrize("command", ["collect", "norms", "train", "analyze-top-norms"])
def test_names_that_are_none(command: str, name: str, finished: Path) -> None:
    assert "--name" in nsae("--workspace", finished, command, "--name", name).message


def test_every_problem_at_once(finished: Path) -> None:
    outcome = nsae("--workspace", finished, "train", "--act", "gelu", "--lr", "x", "--tokens", "-1", "--top", "3")
    assert "--top" in outcome.message, "Typer's own complaint comes first"
    outcome = nsae(
        "--workspace", finished, "train", "--act", "gelu", "--alpha", "x", "--lr", "-1",
        "--tokens", "foo", "--noise", "nan", "--sinks", "x",
    )  # fmt: skip
    assert outcome.code == 2
    assert (
        "--act gelu: expected relu, tanh-relu, topk, batchtopk or jumprelu (and 5 more, listed above)"
        in outcome.message
    )
    for option in ("--act gelu", "--alpha x", "--lr -1", "--tokens foo", "--noise nan", "--sinks x"):
        assert [line for line in outcome.err.splitlines()[:-1] if line.startswith(f"{option}: expected")]


def test_empty_workspace(tmp_path: Path) -> None:
    for command, maker in (("norms", "collect"), ("train", "collect"), ("analyze-top-norms", "train")):
        outcome = nsae("--workspace", tmp_path / "new", command)
        assert outcome.code == 2
        assert f"run `nsae {maker}` first" in outcome.message
    assert not (tmp_path / "new").exists()


def test_same_name_with_other_options(workspace: Path, store: str) -> None:
    train = ("train", "--d-sae", "64", "--tokens", "4096", "--name", "t")
    assert nsae("--workspace", workspace, *train).code == 0
    for change, expected in (
        (("--batch-size", "1024"), "--batch-size 2048 -> 1024"),
        (("--seed", "1"), "--seed 0 -> 1"),
        (("--act", "tanh-relu"), "--act relu -> tanh-relu"),
    ):
        outcome = nsae("--workspace", workspace, *train, *change)
        assert outcome.code == 2
        assert "--name t" in outcome.message
        assert expected in outcome.message
    collect = ("collect", "--model", "mini-sink", "--device", "cpu", "--name", store, "--tokens")
    assert "--tokens 20000 -> 30000" in nsae("--workspace", workspace, *collect, "30k").message
    analyze = ("analyze-top-norms", "t", "--name", "a", "--top")
    assert nsae("--workspace", workspace, *analyze, "5%").code == 0
    assert "--top 0.05 -> 0.1" in nsae("--workspace", workspace, *analyze, "10%").message
    other = nsae("--workspace", workspace, "analyze-top-norms", "--name", "a", "--top", "5%")
    assert other.code == 0, "the newest SAEs are a single one now, t"
    shutil.move(workspace / "activations" / store, workspace / "activations" / "moved")
    outcome = nsae("--workspace", workspace, "norms", "moved", "--name", store)
    assert outcome.code == 2
    assert f"--name {store} holds the norms of {store}, not of moved" in outcome.message


# Corpora and models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("e.txt", b"", "corpus e.txt is empty"),
        ("blank.txt", b" \n\n ", "corpus blank.txt is empty"),
        ("short.txt", b"too short", "--context"),
        ("c.jsonl", b'{"content": "a", "id": 1}\n', "no column 'text'; found 'content', 'id'"),
        ("g.jsonl", b"not json\n", "g.jsonl line 1 is not JSON"),
        ("l.txt", b"\xff\xfe", "not UTF-8"),
        ("p.pkl", b"\x80\x04", "known are .txt, .jsonl, .parquet"),
    ],
)
def test_corpora(file: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    outcome = nsae("--workspace", tmp_path / "runs", "collect", "--model", "mini", "--corpus", tmp_path / file)
    assert outcome.code == 2
    assert expected in outcome.message
    assert not list((tmp_path / "runs").rglob("shard-*"))


def test_corpus_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for corpus in (tmp_path / "empty", tmp_path / "none.txt"):
        outcome = nsae("--workspace", tmp_path, "collect", "--model", "mini", "--corpus", corpus)
        assert (outcome.code, str(corpus) in outcome.message) == (2, True)


@pytest.mark.parametrize("model", ["gpt2-nope", "no/such/thing", "./nowhere", "gpt2"])
def test_models_offline(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    outcome = nsae("--workspace", tmp_path / "runs", "collect", "--model", model)
    assert outcome.code == 4
    assert f"--model {model}" in outcome.message
    assert "use --model mini" in outcome.message
    assert not (tmp_path / "runs").exists()


def test_layer_and_context_are_checked_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsae_cli.lm.collect.load_model", lambda *_: pytest.fail("the weights were loaded"))
    for options in (("--layers", "9"), ("--context", "4096")):
        assert nsae("--workspace", tmp_path, "collect", "--model", "mini", *options).code == 2


# Artifacts -----------------------------------------------------------------------------------------------------------


def _one(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def _digit(path: Path) -> None:
    """Another number where there was one, the JSON still valid."""
    path.write_text(re.sub(r'("(?:d_sae|d_in|rows)": )(\d)', r"\g<1>1\2", path.read_text(), count=1))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str, list[str]]] = {
    "flipped byte in a shard": (
        "activations/*/shard-00000.safetensors", _flip, "train --seed 7", ["shard-00000", "SHA-256", "nsae collect"]
    ),
    "shard cut short": (
        "activations/*/shard-00000.safetensors", lambda p: os.truncate(p, 1000), "train", ["shard-00000", "1,000 bytes"]
    ),
    "shard gone": ("activations/*/shard-00000.safetensors", Path.unlink, "train", ["shard-00000", "missing"]),
    "manifest is no JSON": ("activations/*/manifest.json", lambda p: p.write_text("{"), "train", ["manifest.json"]),
    "manifest of another version": (
        "activations/*/manifest.json", lambda p: edit_json(p, format_version=9), "train", ["format 9"]
    ),
    "manifest leaves the folder": (
        "activations/*/manifest.json",
        lambda p: edit_json(p, rows=1, shards=[{"file": "../../x", "rows": 1}]), "train", ["leaves the folder"],
    ),
    "manifest with other rows": ("activations/*/manifest.json", lambda p: edit_json(p, rows=7), "norms", ["rows is 7"]),
    "manifest with NaN": (
        "activations/*/manifest.json", lambda p: p.write_text('{"rows": NaN}'), "norms", ["NaN"]
    ),
    "norms.json is no JSON": ("norms/*/norms.json", lambda p: p.write_text("{"), "norms", ["norms.json"]),
    "norms.json is a list": ("norms/*/norms.json", lambda p: p.write_text("[]"), "norms", ["norms.json", "delete"]),
    "norms.json lacks a key": ("norms/*/norms.json", lambda p: edit_json(p, hooks=None), "norms", ["hooks", "delete"]),
    "run.json is no JSON": ("saes/*/L2-relu/run.json", lambda p: p.write_text("{"), "analyze-top-norms", ["run.json"]),
    "run.json of another version": (
        "saes/*/L2-relu/run.json",
        lambda p: edit_json(p, format_version=2), "analyze-top-norms", ["run.json", "format 1"],
    ),
    "weights flipped": (
        "saes/*/L2-relu/sae_weights.safetensors", _flip, "analyze-top-norms --name new", ["sae_weights", "SHA-256"]
    ),
    "weights gone": (
        "saes/*/L2-relu/sae_weights.safetensors", Path.unlink, "analyze-top-norms --name new", ["sae_weights"]
    ),
    "top_norms.json is empty": (
        "top-norms/*L2-relu/top_norms.json",
        lambda p: p.write_text(""), "analyze-top-norms --top 2%", ["top_norms.json"],
    ),
    "metrics.jsonl torn": (
        "saes/*/L2-relu/metrics.jsonl", lambda p: p.write_text('{"step": '), "plot training", ["metrics.jsonl"]
    ),
    "metrics.jsonl gone": ("saes/*/L2-relu/metrics.jsonl", Path.unlink, "report --browse none", ["metrics.jsonl"]),
    "metrics.jsonl holds a number": (
        "saes/*/L2-relu/metrics.jsonl",
        lambda p: (p.write_text("3\n"), seal_again(p.parent / "run.json")),
        "plot bias", ["metrics.jsonl", "train"],
    ),
    "metrics.jsonl with another digit": (
        "saes/*/L2-relu/metrics.jsonl", _flip, "compare", ["metrics.jsonl", "SHA-256", "nsae verify --repair"]
    ),
    "run.json with another number": (
        "saes/*/L2-relu/run.json", _digit, "analyze-top-norms --name new", ["run.json", "checksum", "nsae verify"]
    ),
    "manifest with another number": ("activations/*/manifest.json", _digit, "norms --name new", ["checksum"]),
    "cfg.json with another number": (
        "saes/*/L2-relu/cfg.json", _digit, "analyze-top-norms --name new", ["cfg.json", "SHA-256"]
    ),
    "run.json lacks its metrics": (
        "saes/*/L2-relu/run.json", lambda p: edit_json(p, metrics=None), "report --browse none", ["run.json", "metrics"]
    ),
    "run.json's configuration is a number": (
        "saes/*/L2-relu/run.json", lambda p: edit_json(p, config=3), "plot pareto", ["run.json", "config"]
    ),
    "histogram of norms torn": (
        "norms/*/norms.safetensors", lambda p: p.write_bytes(p.read_bytes()[:100]), "plot norms", ["norms.safetensors"]
    ),
    "rows of the top norms gone": (
        "top-norms/*L2-relu/top_norms.safetensors", Path.unlink, "report --browse none", ["top_norms.safetensors"]
    ),
    "top_norms.json lacks its groups": (
        "top-norms/*L2-relu/top_norms.json", lambda p: edit_json(p, groups=None), "report --browse none", ["groups"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_artifacts(damage: str, workspace: Path) -> None:
    pattern, apply, command, expected = DAMAGE[damage]
    apply(_one(workspace, pattern))
    outcome = nsae("--workspace", workspace, *command.split())
    assert outcome.code == 3, outcome.err
    for text in expected:
        assert text in outcome.message


def test_unfinished_artifacts(workspace: Path, store: str) -> None:
    [group] = (workspace / "saes").iterdir()
    cell = group / "L2-relu"
    (cell / "run.json").unlink()
    outcome = nsae("--workspace", workspace, "analyze-top-norms", f"{group.name}/L2-relu")
    assert outcome.code == 3
    assert "run.json" in outcome.message
    folder = workspace / "activations" / store
    (folder / "manifest.json").unlink()
    (folder / "progress.jsonl").write_text("{}\n{}\n")
    for command in (("norms", store), ("train", store), ("analyze-top-norms", "--activations", store)):
        outcome = nsae("--workspace", workspace, *command)
        assert outcome.code == 3
        assert "not finished (1 shards so far)" in outcome.message
    (folder / "progress.jsonl").unlink()
    outcome = nsae("--workspace", workspace, "train", store)
    assert (outcome.code, "no manifest.json" in outcome.message) == (3, True)


@pytest.mark.parametrize("name", ["sae.pkl", "sae.pt", "sae.safetensors"])
def test_a_file_is_no_sae(name: str, finished: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n")
    outcome = nsae("--workspace", finished, "analyze-top-norms", tmp_path / name)
    assert outcome.code == 3
    assert name in outcome.message
    assert "safetensors only" in outcome.message


def test_sae_and_store_of_other_shape(workspace: Path, tmp_path: Path) -> None:
    narrow = write_foreign(tmp_path / "narrow", make_rows(d_in=12), [480])
    outcome = nsae("--workspace", workspace, "analyze-top-norms", "--activations", narrow)
    assert outcome.code == 3
    assert "width 64, narrow holds width 12" in outcome.message
    elsewhere = write_foreign(tmp_path / "elsewhere", make_rows(d_in=64, hooks=("blocks.5.hook_resid_post",)), [480])
    outcome = nsae("--workspace", workspace, "analyze-top-norms", "--activations", elsewhere)
    assert outcome.code == 3
    assert "blocks.2.hook_resid_post, elsewhere holds blocks.5.hook_resid_post" in outcome.message


def test_store_changed_since_training(workspace: Path, store: str) -> None:
    edit_json(workspace / "activations" / store / "manifest.json", dropped={"tokens": 1, "documents": 0})
    outcome = nsae("--workspace", workspace, "analyze-top-norms", "--name", "new")
    assert outcome.code == 3
    assert "its manifest has changed" in outcome.message
    assert f"--activations {store}" in outcome.message


# Machine -------------------------------------------------------------------------------------------------------------


def test_a_file_where_the_workspace_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        for command in (("collect", "--model", "mini"), ("train",), ("list",), ("plot", "activation")):
            outcome = nsae("--workspace", root, *command)
            assert outcome.code == 4
            assert "is a file, not a folder; choose --workspace" in outcome.message


@pytest.mark.parametrize(
    ("stage", "code", "expected"),
    [
        ("collect", errno.ENOSPC, "disk full"),
        ("norms", errno.ENOSPC, "disk full"),
        ("train", errno.ENOSPC, "disk full"),
        ("analyze-top-norms", errno.ENOSPC, "disk full"),
        ("collect", errno.EACCES, "no permission"),
        ("train", errno.EIO, "check the disk"),
    ],
)
def test_disk(stage: str, code: int, expected: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [group] = (workspace / "saes").iterdir()
    commands = {
        "collect": ("collect", "--model", "mini", "--tokens", "4k", "--name", "new", "--device", "cpu"),
        "norms": ("norms", "--name", "new"),
        "train": ("train", "--d-sae", "64", "--tokens", "4096", "--name", "new"),
        "analyze-top-norms": ("analyze-top-norms", f"{group.name}/L2-relu", "--name", "new"),
    }

    def fail(operation: str, path: Path) -> None:
        if operation == "fsync":
            raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(commit, "fault_hook", fail)
    outcome = nsae("--workspace", workspace, *commands[stage])
    assert outcome.code == 4
    assert expected in outcome.message
    assert str(workspace) in outcome.message or "new" in outcome.message
    monkeypatch.setattr(commit, "fault_hook", None)
    assert nsae("--workspace", workspace, *commands[stage]).code == 0, "the same command goes on once it can"
    assert not list(workspace.rglob("*.tmp*"))


def test_device_that_is_not_there(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (("collect", "--model", "mini"), ("train", "--seed", "5"), ("norms", "--probe")):
        for device in ("cuda", "cuda:9", "mps"):
            if device == "mps" and torch.backends.mps.is_available():
                continue
            outcome = nsae("--workspace", workspace, *command, "--device", device)
            assert outcome.code == 4
            assert f"--device {device}" in outcome.message
            assert "use --device cpu" in outcome.message


def test_device_index_that_is_not_there(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    outcome = nsae("--workspace", finished, "train", "--seed", "5", "--device", "cuda:9")
    assert outcome.code == 4
    assert "cuda:0 to cuda:1" in outcome.message


@pytest.mark.parametrize(
    ("command", "place", "option"),
    [
        (("train", "--seed", "5"), "nsae_cli.kernels.dense.DenseStep.__call__", "--batch-size"),
        (("analyze-top-norms", "--name", "new"), "nsae_cli.sae.autoencoder.SparseAutoencoder.encode", "--d-sae"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory(
    command: tuple[str, ...],
    place: str,
    option: str,
    error: Exception,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    outcome = nsae("--workspace", workspace, *command)
    assert outcome.code == 4
    assert "out of memory" in outcome.message
    assert option in outcome.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    rows = make_rows()
    rows.x["blocks.2.hook_resid_post"][470, 3] = value  # in a held-out context
    store = write_foreign(tmp_path / "store", rows, [300, 180])
    outcome = nsae("--workspace", tmp_path / "runs", "norms", store)
    assert outcome.code == 5
    assert "1 rows at blocks.2.hook_resid_post are not finite, the first is row 170 of part1" in outcome.message


# Bugs ----------------------------------------------------------------------------------------------------------------


def test_a_bug_is_reported_and_its_traceback_kept(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("nsae_cli.analysis.inventory.take_inventory", fail)
    monkeypatch.chdir(workspace.parent)
    outcome = nsae("--workspace", workspace, "list")
    assert outcome.code == 1
    assert "a bug in nsae (ZeroDivisionError: division)" in outcome.message
    assert str(workspace / "error.log") in outcome.message
    assert "in fail" in (workspace / "error.log").read_text()
    assert not (workspace.parent / "nsae-runs").exists()
    shown = nsae("--workspace", workspace, "--debug", "list")
    assert shown.err.splitlines()[-1].startswith("nsae: a bug")
    assert "Traceback" in shown.err


def test_debug_shows_the_traceback_of_any_failure(finished: Path) -> None:
    outcome = nsae("--workspace", finished, "--debug", "norms", "nope")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("nsae: no activations named 'nope'")


def test_failures_leave_no_file_behind(finished: Path, workspace: Path) -> None:
    before = contents(workspace)
    for arguments in ("train --act gelu", "norms nope", "train --device cuda:99 --seed 9", "plot foo"):
        assert nsae("--workspace", workspace, *arguments.split()).code != 0
    assert contents(workspace) == before == contents(finished)

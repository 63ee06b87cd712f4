"""`nsae alter` as it is typed, and as a stage of a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import nsae
from hand_store import HOOKS, make_rows, write_full


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_full(tmp_path / "runs" / "activations" / "two", make_rows(65, 8, hooks=HOOKS), [200, 120, 200])
    return tmp_path / "runs"


def test_the_newest_store_is_altered_and_the_next_command_takes_the_result(workspace: Path) -> None:
    made = nsae("--workspace", workspace, "alter", "--permute-norms")
    assert made.code == 0, made.err
    assert "using the newest activations: two" in made.err
    assert "permute-norms, seed 0, from two" in made.out
    norms = nsae("--workspace", workspace, "--json", "norms")
    assert norms.json["result"]["activations"]["name"] == "two-permuted-norms-seed0"
    assert "norms were altered: permute-norms (seed 0) of two" in norms.err
    before = nsae("--workspace", workspace, "--json", "norms", "two").json["result"]["hooks"]
    for hook, original in zip(norms.json["result"]["hooks"], before, strict=True):
        assert hook["sinks"] == original["sinks"]
        for key in ("mean", "median", "p1", "p99", "max", "sink_share_sq"):
            assert hook[key] == pytest.approx(original[key]), key
    again = nsae("--workspace", workspace, "--json", "alter", "two", "--permute-norms")
    assert again.json["artifact"]["name"] == "two-permuted-norms-seed0"
    assert "already complete" in again.err
    assert "permute-norms" in nsae("--workspace", workspace, "list").out


def test_trained_on_it_an_sae_says_so(workspace: Path) -> None:
    train = ("train", "two-stretched-norms-0.5", "--layers", "1", "--d-sae", "16", "--batch-size", "64")
    assert nsae("--workspace", workspace, "alter", "two", "--stretch-norms", "0.5").code == 0
    trained = nsae("--workspace", workspace, *train, "--tokens", "1k", "--name", "sae", "--device", "cpu")
    assert trained.code == 0, trained.err
    assert "two-stretched-norms-0.5: norms were altered: stretch-norms (k = 0.5) of two" in trained.err
    run = json.loads((workspace / "saes/sae/run.json").read_text(encoding="utf-8"))
    assert run["inputs"]["activations"]["name"] == "two-stretched-norms-0.5"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "--permute-norms or --stretch-norms: give one of them"),
        (("--stretch-norms", "many"), 2, "--stretch-norms many"),
        (("--stretch-norms", "2", "--seed", "1"), 2, "--seed 1: only with --permute-norms"),
        (("--permute-norms", "--name", "two"), 2, "--name two is the store itself"),
        (("--stretch-norms", "40"), 5, "does not fit float16"),
    ],
)
def test_failures_end_with_one_line(workspace: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    outcome = nsae("--workspace", workspace, "alter", *arguments)
    assert outcome.code == code
    assert message in outcome.message


def test_a_stage_of_a_configuration(workspace: Path, tmp_path: Path) -> None:
    config = tmp_path / "controls.yaml"
    config.write_text(
        "stages:\n"
        "  - alter: {activations: two, permute_norms: true, seed: 4, name: shuffled}\n"
        "  - norms: {name: of-shuffled}\n"
        "  - alter: {activations: two, stretch_norms: 0, name: equal}\n"
        "  - norms: {activations: shuffled, name: of-shuffled-again}\n"
    )
    outcome = nsae("--workspace", workspace, "run", config)
    assert outcome.code == 0, outcome.err
    for name in ("of-shuffled", "of-shuffled-again"):
        document = json.loads((workspace / f"norms/{name}/norms.json").read_text(encoding="utf-8"))
        assert document["activations"]["name"] == "shuffled"
    manifest = json.loads((workspace / "activations/equal/manifest.json").read_text(encoding="utf-8"))
    assert manifest["altered"][0]["k"] == 0

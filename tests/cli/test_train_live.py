"""`nsae train --from-model` on the command line and in a configuration: chaining, signals, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_process import _MAIN, run

from command import contents, nsae

#: Three windows of the built-in corpus and a grid of two SAEs.
LIVE = (
    "train", "--from-model", "mini-sink", "--act", "relu,tanh-relu", "--d-sae", "48", "--batch-size", "256",
    "--buffer", "8k", "--tokens", "20k", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the group `s`."""
    workspace = tmp_path_factory.mktemp("live") / "runs"
    outcome = nsae("--workspace", workspace, *LIVE, "--name", "s")
    assert outcome.code == 0, outcome.err
    (workspace / "out").write_text(outcome.out)
    (workspace / "err").write_text(outcome.err)
    return workspace


def test_no_activations_are_written(live: Path) -> None:
    assert not (live / "activations").exists()
    assert "pilot: the first 7,168 rows of builtin" in (live / "err").read_text()
    out = (live / "out").read_text()
    assert "mini-sink on builtin, live" in out
    assert "context 128, packed" in out


def test_the_other_commands_know_what_it_was_trained_on(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    monkeypatch.setattr("nsae_cli.report.figures.training_curves", lambda _, caption: captions.append(caption))
    monkeypatch.setattr("nsae_cli.report.figures.save_figure", lambda figure, path, formats: [])
    assert nsae("--workspace", live, "plot", "training").code == 0
    assert captions[0].startswith("mini-sink on builtin, live, context 128")
    assert "blocks.2.hook_resid_post, 48 features" in nsae("--workspace", live, "list").out


def test_run_again_it_is_already_complete(live: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (live / "saes").rglob("*")}
    outcome = nsae("--workspace", live, *LIVE, "--name", "s")
    assert (outcome.code, outcome.out) == (0, (live / "out").read_text())
    assert "already complete" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in (live / "saes").rglob("*")} == before


_WHILE_TRAINING = """
import os, signal
from nsae_cli.training import cell
step = cell.Cell.train_step
def train_step(self, rows, number):
    if number == 40 and self.config.act == "relu":
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, rows, number)
cell.Cell.train_step = train_step
"""
_WHILE_HARVESTING = """
import os, signal
from nsae_cli.lm import harvest
launch, count = harvest.Harvester._launch, 0
def launched(self, contexts):
    global count
    count += 1
    if count == {count}:
        os.kill(os.getpid(), signal.SIGTERM)
    return launch(self, contexts)
harvest.Harvester._launch = launched
"""


@pytest.mark.parametrize(
    ("code", "exit_code", "step"),
    [
        (_WHILE_TRAINING, 130, 41),
        (_WHILE_HARVESTING.format(count=9), 143, 27),  # 7 passes are the pilot's: 54 contexts to train on, 27 batches
        (_WHILE_HARVESTING.format(count=3), 143, None),
    ],
    ids=["training", "harvesting", "pilot"],
)
def test_a_signal_and_the_same_command_again(
    live: Path, tmp_path: Path, code: str, exit_code: int, step: int | None
) -> None:
    command = ("--workspace", tmp_path, *LIVE, "--name", "s")
    done = run(*command, code=code + _MAIN)
    assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    if step is None:
        assert last == "nsae: stopped while harvesting, no step is lost; run the same command to go on"
    else:
        assert last == f"nsae: stopped at step {step} of 78, checkpoint saved; run the same command to go on"
    again = nsae(*command)
    assert again.code == 0, again.err
    assert (f"going on from the checkpoint at step {step}" in again.err) == (step is not None)
    assert contents(tmp_path / "saes") == contents(live / "saes")


def test_analysis_needs_a_store_and_says_which(live: Path, tmp_path: Path) -> None:
    outcome = nsae("--workspace", live, "analyze-top-norms", "s/L2-relu")
    assert outcome.code == 2
    assert "blocks.2.hook_resid_post" in outcome.message
    assert "--activations" in outcome.message
    collect = ("collect", "--model", "mini-sink", "--tokens", "6k", "--device", "cpu", "--name", "acts")
    assert nsae("--workspace", tmp_path, *collect).code == 0
    outcome = nsae(
        "--workspace", tmp_path, "analyze-top-norms", live / "saes/s/L2-relu",
        "--activations", tmp_path / "activations/acts",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("acts", "--from-model", "mini"), "ACTIVATIONS acts and --from-model mini both say where rows come from"),
        (("--corpus", "builtin"), "--corpus: only with --from-model"),
        (("acts", "--no-packing", "--context", "16"), "--context, --packing: only with --from-model"),
        (("--harvest-batch-size", "4"), "--harvest-batch-size: only with --from-model"),
        (("--from-model", "mini", "--site", "mlp"), "--site mlp: expected resid_post, resid_pre, resid_mid,"),
        (("--from-model", "mini", "--context", "1"), "--context 1: expected at least 2"),
        (("--from-model", "mini", "--layers", "7"), "layer 7: mini has 0-3"),
        (("--from-model", "mini", "--revision", "main"), "--revision main: mini is no hub model"),
        (("--from-model", "mini", "--harvest-batch-size", "0"), "--harvest-batch-size 0: expected at least 1"),
        (("--from-model", "mini", "--corpus", "nowhere.txt"), "--corpus nowhere.txt: no such file"),
    ],
)
def test_refused(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    outcome = nsae("--workspace", tmp_path / "runs", "train", *options)
    assert outcome.code == 2, outcome.err
    assert said in outcome.message
    assert not (tmp_path / "runs").exists()


def test_options_of_the_model_are_named_as_train_has_them(tmp_path: Path) -> None:
    outcome = nsae("--workspace", tmp_path / "runs", "train", "--from-model", "./nowhere")
    assert outcome.code == 4
    assert outcome.message.startswith("--from-model ./nowhere: no such folder")


def test_unknown_size_of_the_corpus_needs_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsae_cli.lm.live.COUNTED_BYTES", 1000)
    outcome = nsae("--workspace", tmp_path, "train", "--from-model", "mini", "--device", "cpu")
    assert outcome.code == 2
    assert outcome.message.startswith("--tokens is missing")


CONFIG = """
stages:
  - train: {from_model: mini-sink, corpus: ./texts, context: 32, bos: false, layers: [1, 2], d_sae: 16,
            batch_size: 64, tokens: 2k, buffer: 1024, device: cpu, name: live}
"""


def test_a_stage_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("All work and no play makes Jack a dull boy. " * 300)
    (tmp_path / "config.yaml").write_text(CONFIG)
    for reused in (False, True):
        outcome = nsae("--workspace", tmp_path / "runs", "--json", "run", tmp_path / "config.yaml")
        assert outcome.code == 0, outcome.err
        assert [artifact["name"] for artifact in outcome.json["artifact"]] == ["live/L1", "live/L2"]
        assert ("reused" in outcome.err) == reused
    result = outcome.json["result"][0]
    assert (result["inputs"]["corpus"]["name"], result["inputs"]["harvest"]["bos"]) == ("texts", False)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("{activations: a, from_model: mini}", "activations and from_model both say what is read"),
        ("{corpus: builtin}", "corpus: only with --from-model"),
        ("{from_model: mini, contxt: 3}", "did you mean 'context'?"),
        ("{tokens: 1k}", "train reads activations, but no stage before it makes any"),
    ],
)
def test_what_is_wrong_with_a_stage(tmp_path: Path, stage: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(f"stages:\n  - train: {stage}\n")
    outcome = nsae("--workspace", tmp_path / "runs", "run", tmp_path / "config.yaml")
    assert outcome.code == 2
    assert said in outcome.err

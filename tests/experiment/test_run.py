"""`nsae run`: stages in order, what is finished is reused, what fails leaves the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import contents, nsae

CONFIG = """
stages:
  - collect: {model: mini-sink, tokens: 6k, device: cpu, name: s}
  - norms: {activations: s, name: s}
  - train: {activations: s, act: [relu, tanh-relu], d_sae: 32, batch_size: 128, tokens: 4k, device: cpu, name: g}
  - analyze-top-norms: {saes: g, top: 5%, name: a}
"""


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is run only to see what is run."""
    for module in ("norms_artifact", "top_norms_artifact"):
        monkeypatch.setattr(f"nsae_cli.analysis.{module}.save_png", lambda _, path: path.write_bytes(b"figure"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml and the workspace that running it made."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(CONFIG)
    outcome = nsae("--workspace", folder / "runs", "run", folder / "config.yaml")
    assert outcome.code == 0, outcome.err
    (folder / "out").write_text(outcome.out)
    (folder / "err").write_text(outcome.err)
    return folder


def test_ends_with_tables_and_the_paths_of_the_figures(finished: Path) -> None:
    out = (finished / "out").read_text()
    places = [out.index(part) for part in ("Norms of mini-sink", "Trained SAEs", "High-norm tokens", "\nFigures\n")]
    assert places == sorted(places)
    figures = [Path(line.strip()) for line in out[places[-1] :].splitlines()[2:]]
    assert figures == [path for path in figures if path.is_file()]
    assert {path.relative_to(finished / "runs").as_posix() for path in figures} == {
        "norms/s/norms.png", "norms/s/norms-position0.png",
        "top-norms/a-L2-relu/l0.png", "top-norms/a-L2-relu/l1.png",
        "top-norms/a-L2-tanh-relu/l0.png", "top-norms/a-L2-tanh-relu/l1.png",
        "top-norms/a-l0.png", "top-norms/a-l1.png",
    }  # fmt: skip
    err = (finished / "err").read_text()
    assert [line for line in err.splitlines() if line.startswith("[")] == [
        "[1/4] collect s", "[2/4] norms s", "[3/4] train g", "[4/4] analyze-top-norms a",
    ]  # fmt: skip


def test_second_run_reuses_everything_and_says_so(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*.*")}
    outcome = nsae("--workspace", finished / "runs", "run", finished / "config.yaml")
    assert outcome.code == 0
    assert outcome.err.count("same inputs and options, reused") == 4
    assert outcome.out == (finished / "out").read_text()
    assert {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*.*")} == before


def test_json_holds_every_artifact(finished: Path) -> None:
    outcome = nsae("--workspace", finished / "runs", "--json", "-q", "run", finished / "config.yaml")
    assert outcome.err == ""
    assert [(a["kind"], a["name"]) for a in outcome.json["artifact"]] == [
        ("activations", "s"), ("norms", "s"), ("saes", "g/L2-relu"), ("saes", "g/L2-tanh-relu"),
        ("top-norms", "a-L2-relu"), ("top-norms", "a-L2-tanh-relu"),
    ]  # fmt: skip
    assert len(outcome.json["result"]) == 6


def test_a_changed_option_under_the_same_name_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG.replace("d_sae: 32", "d_sae: 16"))
    outcome = nsae("--workspace", finished / "runs", "run", tmp_path / "c.yaml")
    assert outcome.code == 2
    assert outcome.message.startswith(f"{tmp_path / 'c.yaml'}:5: train g: --name g exists with other options")
    assert "--d-sae 32 -> 16" in outcome.message


@pytest.mark.usefixtures("quick_figures")
def test_without_names_every_stage_reads_the_latest(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "stages:\n"
        "  - collect: {model: mini, tokens: 4k, device: cpu}\n"
        "  - norms\n"
        "  - train: {d_sae: 16, batch_size: 128, tokens: 1k, device: cpu}\n"
        "  - analyze-top-norms: {top: 10%}\n"
    )
    outcome = nsae("--workspace", tmp_path / "runs", "--json", "run", tmp_path / "c.yaml")
    assert outcome.code == 0, outcome.err
    store, norms, sae, analysis = outcome.json["artifact"]
    assert store["name"].startswith("mini-resid_post-")
    assert norms["name"] == store["name"]
    assert sae["name"].startswith(f"{store['name']}-L2-relu-none-")
    assert analysis["name"] == sae["name"]
    assert outcome.json["result"][3]["sae"]["name"] == sae["name"]


@pytest.mark.usefixtures("quick_figures")
def test_a_stage_that_fails_leaves_what_is_finished(tmp_path: Path) -> None:
    config = (
        "stages:\n"
        "  - collect: {model: mini, tokens: 4k, device: cpu, name: s}\n"
        "  - norms: {name: n}\n"
        "  - collect: {model: mini, tokens: 4k, layers: LAYERS, device: cpu, name: t}\n"
        "  - norms: {activations: t, name: t}\n"
    )
    (tmp_path / "c.yaml").write_text(config.replace("LAYERS", "9"))
    outcome = nsae("--workspace", tmp_path / "runs", "run", tmp_path / "c.yaml")
    assert outcome.code == 2
    assert outcome.message == f"{tmp_path / 'c.yaml'}:4: collect t: layer 9: mini has 0-3"
    made = contents(tmp_path / "runs")
    assert {"activations/s/manifest.json", "norms/n/norms.json"} <= set(made)
    (tmp_path / "c.yaml").write_text(config.replace("LAYERS", "1"))
    again = nsae("--workspace", tmp_path / "runs", "run", tmp_path / "c.yaml")
    assert again.code == 0
    assert again.err.count("reused") == 2
    assert made.items() <= contents(tmp_path / "runs").items()


@pytest.mark.usefixtures("quick_figures")
def test_a_signal_between_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsae_cli import interrupt
    from nsae_cli.experiment import stages

    run_norms = stages.run_norms

    def then_a_signal(*arguments: object) -> object:
        result = run_norms(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(interrupt, "_signum", 15)
        return result

    monkeypatch.setattr(stages, "run_norms", then_a_signal)
    (tmp_path / "c.yaml").write_text(CONFIG)
    outcome = nsae("--workspace", tmp_path / "runs", "run", tmp_path / "c.yaml")
    assert outcome.code == 143
    assert outcome.message == "stopped after 2 of 4 stages; the same command goes on"
    assert not (tmp_path / "runs" / "saes").exists()

"""`nsae report` and the figures of `nsae plot` through the command line, on a workspace of real artifacts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from command import contents, nsae


@pytest.fixture(scope="module")
def reported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A workspace with a report on all of it, and what the command printed on stdout and stderr."""
    workspace = Path(shutil.copytree(finished, tmp_path_factory.mktemp("report") / "runs"))
    outcome = nsae("--workspace", workspace, "report", "--contexts", "3")
    assert outcome.code == 0, outcome.err
    return workspace, outcome.out, outcome.err


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    value = json.loads(found[1])
    assert isinstance(value, dict)
    return value


def test_the_whole_workspace_in_one_page(reported: tuple[Path, str, str], store: str) -> None:
    workspace, out, err = reported
    page = workspace / "reports" / "workspace" / "report.html"
    assert out == f"{page}\n"
    assert re.search(r"^\d\.\d MB$", err, re.MULTILINE)
    assert page.stat().st_size <= 8_000_000
    data = data_of(page)
    assert [norms["name"] for norms in data["norms"]] == [store]
    assert len(data["saes"]["rows"]) == len(data["histograms"]) == len(data["curves"]) == len(data["features"]) == 2
    assert any("sinks are" in sentence for sentence in data["summary"])
    assert data["missing"] == []
    assert all(point["delta_ce"] is not None for point in data["pareto"]["points"])
    assert any("costs" in sentence and "nats" in sentence for sentence in data["summary"])
    for features in data["features"]:
        assert features["contexts"] == 3
        assert features["logits"]["final_scale"] > 0
        assert len(features["features"]) + features["dead"] == 96
        assert "<|endoftext|>" in features["tokens"]
    assert str(workspace) not in page.read_text(encoding="utf-8").replace(workspace.name, "")


def _group(workspace: Path) -> str:
    [group] = (workspace / "saes").iterdir()
    return group.name


def test_features_are_measured_once(reported: tuple[Path, str, str], tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(reported[0], tmp_path / "runs"))
    before = contents(workspace)
    again = nsae("--workspace", workspace, "report", "--contexts", "3")
    assert "features of" not in again.err
    assert contents(workspace) == before, "the same page, byte by byte"
    listed = nsae("--workspace", workspace, "list").out
    assert re.search(r"features +\S+-L2-relu +complete .* 96 features of \S+/L2-relu", listed)
    other = nsae("--workspace", workspace, "report", "--contexts", "2", "--name", "other")
    assert "measured again" in other.err
    assert data_of(workspace / "reports" / "other" / "report.html")["features"][0]["contexts"] == 2


def test_features_say_what_the_saved_sae_does(reported: tuple[Path, str, str]) -> None:
    from safetensors.torch import load_file

    workspace = reported[0]
    for cell in (workspace / "saes" / _group(workspace)).glob("L*"):
        found = load_file(workspace / "features" / f"{_group(workspace)}-{cell.name}" / "features.safetensors")
        assert found["density"].tolist() == load_file(cell / "features.safetensors")["density"].tolist()


def test_one_sae_named(reported: tuple[Path, str, str]) -> None:
    workspace, group = reported[0], _group(reported[0])
    outcome = nsae("--workspace", workspace, "--json", "report", f"{group}/L2-relu", "--contexts", "3")
    page = workspace / "reports" / f"{group}-L2-relu" / "report.html"
    assert outcome.json["artifact"] == {"kind": "file", "name": "report.html", "path": str(page)}
    data = data_of(page)
    assert [row[0] for row in data["saes"]["rows"]] == [f"{group}/L2-relu"]
    assert len(data["norms"]) == 1


def test_the_same_on_the_terminal(reported: tuple[Path, str, str]) -> None:
    workspace = reported[0]
    outcome = nsae("--workspace", workspace, "report", "--text", "--contexts", "3")
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    data = data_of(workspace / "reports" / "workspace" / "report.html")
    for sentence in (*data["summary"], *data["missing"]):
        assert sentence in text
    for heading in ("Norms and sinks per layer", "Trained SAEs", f"Features of {_group(workspace)}/L2-relu"):
        assert heading in text
    assert "'<|endoftext|>'" in text
    as_json = nsae("--workspace", workspace, "--json", "report", "--text", "--contexts", "3")
    assert as_json.json["result"] == {"summary": data["summary"], "missing": data["missing"]}


def test_no_browser_of_features(workspace: Path) -> None:
    assert nsae("--workspace", workspace, "report", "--browse", "none", "--name", "short").code == 0
    assert data_of(workspace / "reports" / "short" / "report.html")["features"] == []
    assert not (workspace / "features").exists()


def test_what_is_missing_is_said_with_the_command_that_makes_it(workspace: Path) -> None:
    shutil.rmtree(workspace / "norms")
    shutil.rmtree(workspace / "top-norms")
    shutil.rmtree(workspace / "evals")
    outcome = nsae("--workspace", workspace, "report", "--browse", "none")
    assert outcome.code == 0
    missing = data_of(workspace / "reports" / "workspace" / "report.html")["missing"]
    for command in ("nsae norms", f"nsae analyze-top-norms {_group(workspace)}", f"nsae eval {_group(workspace)}"):
        assert any(f"`{command}`" in sentence for sentence in missing)
    for what, command in (("norms", "nsae norms"), ("top-norms", "nsae analyze-top-norms")):
        refused = nsae("--workspace", workspace, "plot", what)
        assert refused.code == 2
        assert f"`{command}`" in refused.message
    refused = nsae("--workspace", workspace, "plot", "top-norms", _group(workspace))
    assert refused.code == 2
    assert "nsae analyze-top-norms" in refused.message


def test_only_norms(workspace: Path) -> None:
    shutil.rmtree(workspace / "saes")
    assert nsae("--workspace", workspace, "report").code == 0
    data = data_of(workspace / "reports" / "workspace" / "report.html")
    assert (data["saes"], len(data["norms"])) == (None, 1)


def test_an_empty_workspace(tmp_path: Path) -> None:
    outcome = nsae("--workspace", tmp_path / "none", "report")
    assert outcome.code == 2
    assert "nsae collect" in outcome.message
    assert not (tmp_path / "none").exists()


def test_a_store_that_is_gone_costs_the_features_only(workspace: Path) -> None:
    shutil.rmtree(workspace / "activations")
    outcome = nsae("--workspace", workspace, "report")
    assert outcome.code == 0
    assert "name a store with --activations" in outcome.err
    page = workspace / "reports" / "workspace" / "report.html"
    assert any("--activations" in sentence for sentence in data_of(page)["missing"])
    asked = nsae("--workspace", workspace, "report", "--browse", _group(workspace))
    assert asked.code == 2
    assert "--activations" in asked.message


@pytest.mark.parametrize("file", ["features.json", "features.safetensors"])
def test_damaged_features(reported: tuple[Path, str, str], tmp_path: Path, file: str) -> None:
    workspace = Path(shutil.copytree(reported[0], tmp_path / "runs"))
    for path in (workspace / "features").glob(f"*/{file}"):
        path.write_bytes(path.read_bytes()[:50])
    outcome = nsae("--workspace", workspace, "report", "--contexts", "3")
    assert outcome.code == 3
    assert file in outcome.message


def test_an_evaluation_gives_the_change_of_cross_entropy(workspace: Path) -> None:
    group = _group(workspace)
    run = json.loads((workspace / "saes" / group / "L2-relu" / "run.json").read_text())
    sae = {"name": f"{group}/L2-relu", "weights_sha256": run["weights_sha256"]}
    number = {"value": 0.125, "low": 0.1, "high": 0.15}
    evaluation = {"format_version": 1, "sae": sae, "behaviour": {"delta_ce_ns": number, "delta_ce_all": number}}
    folder = workspace / "evals" / f"{group}-L2-relu"
    shutil.rmtree(workspace / "evals")
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(evaluation))
    page = workspace / "reports" / "workspace" / "report.html"
    assert nsae("--workspace", workspace, "report", "--browse", "none").code == 0
    assert [point["delta_ce"] for point in data_of(page)["pareto"]["points"]] == [0.125, None]
    sae["weights_sha256"] = {"W_enc": "of another training"}
    (folder / "eval.json").write_text(json.dumps(evaluation))
    assert nsae("--workspace", workspace, "report", "--browse", "none").code == 0
    assert [point["delta_ce"] for point in data_of(page)["pareto"]["points"]] == [None, None]


@pytest.mark.parametrize(
    ("what", "files"),
    [
        ("activation", ["activation"]),
        ("training", ["{group}"]),
        ("bias", ["{group}-bias"]),
        ("pareto", ["{group}-pareto"]),
        ("norms", ["{store}-norms", "{store}-norms-position0"]),
        ("top-norms {group}", ["{group}-l0", "{group}-l1"]),
        ("top-norms {group}/L2-relu", ["{group}-L2-relu-l0", "{group}-L2-relu-l1"]),
        ("top-norms {group}-L2-relu", ["{group}-L2-relu-l0", "{group}-L2-relu-l1"]),
    ],
)
def test_every_figure_in_several_formats(workspace: Path, store: str, what: str, files: list[str]) -> None:
    names = {"group": _group(workspace), "store": store}
    forms = ("png", "svg", "pdf") if what in ("norms", "pareto", "bias") else ("svg",)
    command = ("plot", *what.format(**names).split(), "--format", ",".join(forms))
    outcome = nsae("--workspace", workspace, *command)
    assert outcome.code == 0, outcome.err
    expected = [f"{file.format(**names)}.{form}" for file in files for form in forms]
    paths = [workspace / "plots" / name for name in expected]
    assert outcome.out.splitlines() == [str(path) for path in paths]
    first = [path.read_bytes() for path in paths]
    for path, content in zip(paths, first, strict=True):
        assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[path.suffix])
        assert not re.search(rb"<dc:date>|CreationDate|/ModDate", content)
    if what in ("norms", "pareto"):  # bitmaps in vectors, and lines alone
        assert nsae("--workspace", workspace, *command).code == 0
        assert [path.read_bytes() for path in paths] == first


def test_histograms_of_something_else(workspace: Path) -> None:
    outcome = nsae("--workspace", workspace, "plot", "top-norms", "nope")
    assert outcome.code == 2
    assert f"there are: {_group(workspace)}-L2" in outcome.message


def test_several_figures_as_json(workspace: Path) -> None:
    outcome = nsae("--workspace", workspace, "--json", "plot", "norms", "--name", "mine")
    assert [one["name"] for one in outcome.json["artifact"]] == ["mine.png", "mine-position0.png"]

"""Names, and which artifact a name or the lack of one means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nsae_cli.errors import ArtifactError, UsageError
from nsae_cli.store.workspace import Kind, Workspace, check_name, config_hash


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs")


def put(workspace: Workspace, kind: Kind, name: str, age: int = 0) -> Path:
    folder = workspace.folder(kind, name)
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / kind.mark
    mark.write_text("{}")
    os.utime(mark, (10**9 - age, 10**9 - age))
    return folder


def test_the_newest_completion_mark_wins_not_the_newest_folder(workspace):
    put(workspace, Kind.ACTIVATIONS, "old", age=50)
    put(workspace, Kind.ACTIVATIONS, "new", age=10)
    workspace.folder(Kind.ACTIVATIONS, "unfinished").mkdir()
    assert workspace.newest(Kind.ACTIVATIONS).name == "new"
    assert [path.name for path in workspace.unfinished(Kind.ACTIVATIONS)] == ["unfinished"]


def test_an_empty_workspace_says_what_to_run(workspace):
    with pytest.raises(UsageError, match="nsae train"):
        workspace.newest(Kind.SAE)


def test_a_group_means_all_its_cells_and_a_cell_itself(workspace):
    for cell in ("L0-relu", "L1-relu"):
        put(workspace, Kind.SAE, f"grid/{cell}")
    put(workspace, Kind.SAE, "single")
    assert [a.name for a in workspace.find(Kind.SAE, "grid")] == ["grid/L0-relu", "grid/L1-relu"]
    assert [a.name for a in workspace.find(Kind.SAE, "grid/L1-relu")] == ["grid/L1-relu"]
    assert [a.name for a in workspace.find(Kind.SAE, "single")] == ["single"]


def test_a_path_is_as_good_as_a_name(workspace, tmp_path):
    folder = put(workspace, Kind.SAE, "single")
    assert workspace.find(Kind.SAE, str(folder))[0].name == "single"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "run.json").write_text("{}")
    assert workspace.find(Kind.SAE, str(elsewhere))[0].path == elsewhere


def test_what_is_not_there_and_what_is_not_finished(workspace):
    put(workspace, Kind.SAE, "single")
    with pytest.raises(UsageError, match="there are: single"):
        workspace.find(Kind.SAE, "other")
    workspace.folder(Kind.NORMS, "half").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="not finished"):
        workspace.find(Kind.NORMS, "half")


@pytest.mark.parametrize("name", ["a", "GPT2-L6.v1", "0", "x" * 120])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "-x", "a\n", "é", "a b", "x" * 121, "a\x00"])
def test_bad_names(name):
    with pytest.raises(UsageError, match="--name"):
        check_name(name)


def test_the_option_wins_over_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NSAE_WORKSPACE", str(tmp_path / "env"))
    assert Workspace.at(tmp_path / "option").root == tmp_path / "option"
    assert Workspace.at(None).root == tmp_path / "env"
    monkeypatch.setenv("NSAE_WORKSPACE", "")
    assert Workspace.at(None).root == Path("nsae-runs")


def test_the_hash_depends_on_every_value_and_not_on_the_order():
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1, "b": [2]}) != config_hash({"a": 1, "b": [3]})
    assert len(config_hash({})) == 6

"""`nsae compare` on SAEs that were really trained, from the command line and from a configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command import contents, nsae

GRID = ("train", "--act", "relu", "--l2-norm", "none,sq", "--seed", "0,1", "--d-sae", "32", "--batch-size", "256",
        "--tokens", "10k", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def trained(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The common workspace with four more SAEs, `grid`. Tests only read it."""
    root = tmp_path_factory.mktemp("compare") / "runs"
    shutil.copytree(finished, root)
    assert nsae("--workspace", root, *GRID, "--name", "grid").code == 0
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def test_compares_the_newest_group(runs: Path) -> None:
    outcome = nsae("--workspace", runs, "compare")
    assert outcome.code == 0, outcome.err
    assert "using the newest saes: grid" in outcome.err
    assert f"saved: {runs / 'tables' / 'grid'}" in outcome.err
    for text in (
        "relu p=0",
        "relu p=2",
        "sinks kept",
        "unmatched L0",
        "Conclusion",
        "No SAE was evaluated in its model",
    ):
        assert text in outcome.out, outcome.out
    folder = runs / "tables" / "grid"
    files = contents(folder)
    assert set(files) == {"table.json", "table.md", "fronts.png", "differences.png"}
    document = json.loads(files["table.json"])
    [group] = document["groups"]
    assert [(row["arm"], row["seeds"]) for row in group["rows"]] == [("relu p=0", [0, 1]), ("relu p=2", [0, 1])]
    run = json.loads((runs / "saes" / "grid" / "L2-sq-seed1" / "run.json").read_text())
    assert group["rows"][1]["metrics"]["fvu_p0_ns"]["by_seed"]["1"] == run["metrics"]["ns"]["fvu_p0"]
    assert str(runs) not in files["table.json"].decode()
    page = files["table.md"].decode()
    assert all(f"| P{number} |" in page for number in range(1, 8))
    assert "![differences.png](differences.png)" in page

    again = nsae("--workspace", runs, "compare", "grid")
    assert again.code == 0
    assert "already complete" in again.err
    assert again.out == outcome.out
    assert contents(folder) == files


def test_remade_from_nothing_it_is_the_same(runs: Path) -> None:
    assert nsae("--workspace", runs, "compare", "grid").code == 0
    before = contents(runs / "tables" / "grid")
    shutil.rmtree(runs / "tables")
    assert nsae("--workspace", runs, "compare", "grid").code == 0
    assert contents(runs / "tables" / "grid") == before


def test_json_and_list(runs: Path) -> None:
    outcome = nsae("--workspace", runs, "--json", "-q", "compare", "grid", "--name", "t")
    assert outcome.err == ""
    assert outcome.json["artifact"]["kind"] == "tables"
    assert outcome.json["result"]["name"] == "t"
    listed = nsae("--workspace", runs, "list")
    [line] = [line for line in listed.out.splitlines() if line.startswith("tables")]
    assert "4 SAEs in 2 rows" in line


def test_several_groups(runs: Path) -> None:
    groups = sorted(path.name for path in (runs / "saes").iterdir())
    outcome = nsae(
        "--workspace", runs, "--json", "compare", *groups, "--name", "all", "--baseline", "relu p=2 d_sae=32"
    )
    assert outcome.code == 2
    assert "is not among the arms; there are: " in outcome.message
    outcome = nsae("--workspace", runs, "--json", "compare", *groups, "--name", "all")
    assert outcome.code == 0, outcome.err
    # Width and budget of the common grid's two SAEs are not those of the other four, and the arms say so.
    [group] = outcome.json["result"]["groups"]
    assert sorted(row["arm"] for row in group["rows"]) == [
        "relu p=0", "relu p=0 d_sae=96 tokens=40k", "relu p=2", "tanh-relu p=0 d_sae=96 tokens=40k"
    ]  # fmt: skip
    assert group["usual"] == {"d_sae": "32", "tokens": "10k"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nothing",), 2, "no saes named 'nothing'"),
        (("grid", "--baseline", "relu"), 2, "--baseline 'relu' is not among the arms; there are: relu p=0, relu p=2"),
        (("grid", "--fvu-margin", "two"), 2, "--fvu-margin two: expected a share such as 1% or 0.01"),
        (("grid", "--ce-margin", "-1"), 2, "--ce-margin -1: expected at least 0"),
        (("grid", "--evals", "e"), 2, "--evals e: none of these SAEs has an evaluation of that name"),
        (("grid", "--name", "a/b"), 2, "--name 'a/b' is not a name"),
    ],
)
def test_wrong_options(trained: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    outcome = nsae("--workspace", trained, "compare", *arguments)
    assert outcome.code == code
    assert message in outcome.message
    assert not (trained / "tables").exists()


def test_an_unfinished_table_is_listed(runs: Path) -> None:
    (runs / "tables" / "half").mkdir(parents=True)
    [line] = [line for line in nsae("--workspace", runs, "list").out.splitlines() if line.startswith("tables")]
    assert "run the same nsae compare again" in line


def test_a_damaged_table_is_refused(runs: Path) -> None:
    assert nsae("--workspace", runs, "compare", "grid").code == 0
    (runs / "tables" / "grid" / "table.json").write_text("{")
    outcome = nsae("--workspace", runs, "compare", "grid")
    assert outcome.code == 3
    assert "table.json is not valid JSON" in outcome.message


def test_a_signal_ends_it_before_anything_is_written(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsae_cli import interrupt
    from nsae_cli.analysis import comparison_artifact

    sort = comparison_artifact.compare

    def then_a_signal(*arguments: object) -> object:
        monkeypatch.setattr(interrupt, "_signum", 15)
        return sort(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison_artifact, "compare", then_a_signal)
    outcome = nsae("--workspace", runs, "compare", "grid")
    assert outcome.code == 143
    assert outcome.message == "stopped while comparing; nothing was written, run the same command again"
    assert contents(runs / "tables" / "grid") == {}


def test_as_a_stage(runs: Path, tmp_path: Path, store: str) -> None:
    config = (
        "stages:\n"
        f"  - train: {{activations: {store}, l2_norm: [none, sq], d_sae: 16, batch_size: 128, tokens: 2k, device: cpu, "
        "name: a}\n"
        "  - compare: {saes: [a, grid], baseline: relu p=0 BUDGET, fvu_margin: 5%, name: t}\n"
    )
    (tmp_path / "c.yaml").write_text(config)
    outcome = nsae("--workspace", runs, "run", tmp_path / "c.yaml")
    assert outcome.code == 2
    assert outcome.message.startswith(f"{tmp_path / 'c.yaml'}:3: compare t: --baseline 'relu p=0 BUDGET' is not among")
    (tmp_path / "c.yaml").write_text(config.replace("baseline: relu p=0 BUDGET, ", ""))
    outcome = nsae("--workspace", runs, "run", tmp_path / "c.yaml")
    assert outcome.code == 0, outcome.err
    assert "relu p=2 d_sae=16 tokens=2k batch_size=128" in outcome.out
    assert f"{runs / 'tables' / 't' / 'fronts.png'}" in outcome.out
    again = nsae("--workspace", runs, "run", tmp_path / "c.yaml")
    assert again.err.count("reused") == 2
    (tmp_path / "c.yaml").write_text(config.replace("saes: [a, grid]", "saes: [a, grit], margin: 1"))
    outcome = nsae("--workspace", runs, "run", tmp_path / "c.yaml")
    assert "compare has no option 'margin'" in outcome.err
    assert "did you mean" in outcome.err


def test_with_real_evaluations_and_altered_stores(runs: Path, store: str) -> None:
    assert nsae("--workspace", runs, "compare", "grid", "--name", "before").code == 0
    evaluated = nsae("--workspace", runs, "-q", "eval", "grid", "--device", "cpu")
    assert evaluated.code == 0, evaluated.err
    for change in (("--permute-norms",), ("--stretch-norms", "2")):
        name = change[0].strip("-")
        assert nsae("--workspace", runs, "-q", "alter", store, *change, "--name", name).code == 0
        assert nsae("--workspace", runs, "-q", *GRID[:1], name, *GRID[1:], "--name", f"on-{name}").code == 0
    outcome = nsae(
        "--workspace", runs, "--json", "compare", "grid", "on-permute-norms", "on-stretch-norms", "--name", "t"
    )
    assert outcome.code == 0, outcome.err
    document = outcome.json["result"]
    plain, *altered = document["groups"]
    assert plain["altered"] is None
    assert [group["altered"][0]["change"] for group in altered] == ["permute-norms", "stretch-norms"]
    # The evaluation used the rows that run.json's metrics are of, so nothing is noted, and the sums give its FVU.
    assert not any("Evaluated rows" in note for note in document["notes"])
    metrics = plain["rows"][0]["metrics"]
    for seed in ("0", "1"):
        evaluation = json.loads((runs / "evals" / f"grid-L2-none-seed{seed}" / "eval.json").read_text())
        assert metrics["delta_ce_ns"]["by_seed"][seed] == evaluation["behaviour"]["delta_ce_ns"]["value"]
        fvu = evaluation["metrics"]["ns"]["fvu_p0"]
        assert metrics["fvu_p0_ns"]["by_seed"][seed] == pytest.approx(fvu, rel=1e-5)
    # An evaluation is an input: the table that was made before it is made again.
    again = nsae("--workspace", runs, "compare", "grid", "--name", "before")
    assert "inputs of before have changed: made again" in again.err
    assert "ΔCE" in again.out

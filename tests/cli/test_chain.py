"""The four commands as a newcomer chains them: what is printed where, and what a second run does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from command import TRAIN, Outcome, contents, nsae
from nsae_cli import load_sae
from nsae_cli.store.workspace import Kind

Chain = tuple[Path, dict[str, Outcome]]

ARTIFACT_FILES = {
    Kind.ACTIVATIONS: {"shard-00000.safetensors", "manifest.json"},
    Kind.NORMS: {"norms.json", "norms.safetensors", "norms.png", "norms-position0.png"},
    Kind.SAE: {"cfg.json", "sae_weights.safetensors", "run.json", "metrics.jsonl"},
    Kind.TOP_NORMS: {"top_norms.json", "top_norms.safetensors", "l0.png", "l1.png"},
    Kind.EVAL: {"eval.json", "contexts.safetensors"},
    Kind.AUDIT: {"audit.json"},
}


@pytest.mark.parametrize("kind", list(ARTIFACT_FILES))
def test_artifacts_are_whole(finished: Path, kind: Kind) -> None:
    marks = [*(finished / kind.folder).glob(f"*/{kind.mark}"), *(finished / kind.folder).glob(f"*/*/{kind.mark}")]
    assert len(marks) == (2 if kind in (Kind.SAE, Kind.TOP_NORMS, Kind.EVAL) else 1)
    for mark in marks:
        assert ARTIFACT_FILES[kind] <= {path.name for path in mark.parent.iterdir()}
        json.loads(mark.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert not list(finished.rglob("*.tmp*"))


def test_artifacts_hold_no_time_host_or_absolute_path(finished: Path) -> None:
    for path in finished.rglob("*.json*"):
        if path.name in ("timings.jsonl", "verified.jsonl"):
            continue
        text = path.read_text(encoding="utf-8")
        assert str(finished) not in text
        assert not re.search(r'"(time|date|host|pid|seconds)"', text), path


def test_results_on_stdout_remarks_on_stderr(chain: Chain, store: str) -> None:
    _, outcomes = chain
    assert outcomes["collect"].out.startswith(f"Activations {store}\n")
    assert "mini-sink" in outcomes["collect"].out
    assert "placed" in outcomes["collect"].out, "a placed sink is said to be placed wherever it shows"
    assert "Norms and sinks per layer" in outcomes["norms"].out
    assert "Trained SAEs" in outcomes["train"].out
    assert "High-norm tokens" in outcomes["analyze-top-norms"].out
    for command, outcome in outcomes.items():
        assert "nsae: " not in outcome.err
        assert "warning" not in outcome.out
        if command != "collect":
            assert outcome.err.startswith("using the newest "), "the input that was chosen is said first"
            assert store in outcome.err.splitlines()[0]
    for kind, command in ((kind, kind.command) for kind in ARTIFACT_FILES):
        assert re.search(rf"^saved: .*{kind.folder}", outcomes[command].err, re.MULTILINE), outcomes[command].err
    assert "device cpu" in outcomes["collect"].err
    assert "figure: " in outcomes["norms"].err


def test_analysis_ends_with_the_finding_in_sentences(chain: Chain) -> None:
    last = chain[1]["analyze-top-norms"].out.rstrip().splitlines()[-1]
    assert last.endswith(".")
    assert re.search(r"\d", last)


def test_nothing_printed_ends_in_blanks(chain: Chain) -> None:
    for outcome in chain[1].values():
        assert not [line for line in outcome.out.splitlines() if line != line.rstrip()]


def test_a_second_run_finds_everything_and_writes_nothing(workspace: Path, store: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.name != "verified.jsonl"}
    for command in (
        ("collect", "--model", "mini-sink", "--tokens", "20k", "--device", "cpu"),
        ("norms",),
        (*TRAIN, "--device", "cpu"),
        ("analyze-top-norms", "--top", "2%"),
    ):
        outcome = nsae("--workspace", workspace, *command)
        assert outcome.code == 0
        assert "already complete" in outcome.err
        assert outcome.out, "a finished command still prints its result"
    after = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.name != "verified.jsonl"}
    files = {path for path in before if path.is_file()}
    assert {path: after[path] for path in files} == {path: before[path] for path in files}
    assert set(after) == set(before)


def test_same_command_elsewhere_makes_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    nsae("--workspace", tmp_path, "-q", "collect", "--model", "mini-sink", "--tokens", "20k", "--device", "cpu")
    assert contents(tmp_path / "activations") == contents(finished / "activations")


@pytest.mark.parametrize("command", [("norms",), (*TRAIN,), ("analyze-top-norms", "--top", "2%"), ("list",)])
def test_json_is_one_object_and_quiet_is_silent(finished: Path, command: tuple[str, ...]) -> None:
    outcome = nsae("--workspace", finished, "--json", "-q", *command)
    assert (outcome.code, outcome.err) == (0, "")
    assert set(outcome.json) == {"command", "artifact", "result"}
    assert outcome.json["command"] == command[0]
    assert outcome.out.isascii()
    if command[0] == "list":
        return
    artifacts, results = outcome.json["artifact"], outcome.json["result"]
    if isinstance(artifacts, dict):
        artifacts, results = [artifacts], [results]
    for artifact, result in zip(artifacts, results, strict=True):
        assert set(artifact) == {"kind", "name", "path"}
        [kind] = [kind for kind in Kind if kind.folder == artifact["kind"]]
        assert json.loads((Path(artifact["path"]) / kind.mark).read_text(encoding="utf-8")) == result


def test_json_of_collect_is_the_manifest(finished: Path, store: str) -> None:
    command = ("collect", "--model", "mini-sink", "--tokens", "20k", "--device", "cpu")
    found = nsae("--workspace", finished, "--json", *command).json
    assert found["artifact"]["name"] == store
    assert found["result"] == json.loads((finished / "activations" / store / "manifest.json").read_text())


def test_names_and_paths_and_groups_mean_the_same(finished: Path, workspace: Path, store: str) -> None:
    [group] = (finished / "saes").iterdir()
    by_cell = [nsae("--workspace", workspace, "--json", "analyze-top-norms", "--top", "2%", f"{group.name}/{cell.name}")
               for cell in sorted(group.glob("L*"))]  # fmt: skip
    by_group = nsae("--workspace", workspace, "--json", "analyze-top-norms", "--top", "2%", group.name)
    assert by_group.json["result"] == [outcome.json["result"] for outcome in by_cell]
    by_path = nsae("--workspace", workspace, "--json", "norms", workspace / "activations" / store)
    assert by_path.json["artifact"]["name"] == store


def test_workspace_of_the_environment(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSAE_WORKSPACE", str(finished))
    assert nsae("--json", "list").json["result"]
    monkeypatch.chdir(finished.parent)
    monkeypatch.delenv("NSAE_WORKSPACE")
    assert nsae("--json", "list").json["result"] == []


def test_list_names_the_workspace_and_everything_in_it(workspace: Path, store: str) -> None:
    (workspace / "saes" / "begun").mkdir()
    [norms] = (workspace / "norms").iterdir()
    (norms / "norms.json").write_text("{")
    outcome = nsae("--workspace", workspace, "list")
    assert outcome.err == f"workspace: {workspace}\n"
    rows = {(line.split()[0], line.split()[1]): line for line in outcome.out.splitlines()[2:]}
    assert len(rows) == 10
    assert "unfinished" in rows["saes", "begun"]
    assert "run the same nsae train again" in rows["saes", "begun"]
    assert "damaged" in rows["norms", store]
    assert "complete" in rows["activations", store]
    assert nsae("--workspace", workspace / "none", "list").out == "The workspace is empty.\n"


def test_plots(workspace: Path) -> None:
    [group] = (workspace / "saes").iterdir()
    drawn = nsae("--workspace", workspace, "plot", "activation")
    assert drawn.out == f"{workspace / 'plots' / 'activation.png'}\n"
    named = nsae("--workspace", workspace, "--json", "plot", "training", "--name", "curves")
    assert named.json["artifact"]["path"] == str(workspace / "plots" / "curves.png")
    assert "using the newest saes" in named.err
    default = nsae("--workspace", workspace, "plot", "training", group.name)
    assert default.out == f"{workspace / 'plots' / group.name}.png\n"
    for path in (workspace / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_several_saes_are_drawn_side_by_side(finished: Path) -> None:
    [group] = (finished / "saes").iterdir()
    for quantity in ("l0", "l1"):
        assert (finished / "top-norms" / f"{group.name}-{quantity}.png").is_file()


def test_probe_names_what_carries_the_sink(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsae_cli.analysis.probe.PROBE_CONTEXTS", 16)
    outcome = nsae("--workspace", workspace, "--json", "norms", "--probe")
    verdicts = {hook["layer"]: hook["probe"]["verdict"] for hook in outcome.json["result"]["hooks"]}
    assert verdicts[2] == "position", "mini-sink's sink was placed at position 0, whatever token stands there"
    again = nsae("--workspace", workspace, "norms", "--probe")
    assert "already complete" in again.err
    assert "position" in again.out


def test_saved_saes_open_from_python(finished: Path) -> None:
    for cell in (finished / "saes").glob("*/L*"):
        sae = load_sae(cell)
        assert (sae.d_in, sae.d_sae) == (64, 96)


def test_verbose_says_more(finished: Path) -> None:
    outcome = nsae("--workspace", finished, "-v", "norms")
    assert re.match(r"\[ +\d+\.\d s\] using the newest", outcome.err)
    assert nsae("--workspace", finished, "-q", "norms").err == ""


@pytest.mark.parametrize(
    "command",
    [
        (),
        *((name,) for name in ("collect", "norms", "train", "analyze-top-norms", "eval")),
        *((name,) for name in ("run", "plot", "report", "list")),
    ],
)
def test_help_is_plain_and_whole(command: tuple[str, ...]) -> None:
    outcome = nsae(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: nsae")
    shown = outcome.out.partition("\n")[2] if command else outcome.out.partition("Activations:")[2]
    assert "..." not in shown, "no summary is cut short"
    defaults = {
        "norms": "[default: the newest]",
        "train": "[default: tanh-relu free,",
        "collect": "[default: the middle",
    }
    assert defaults.get(" ".join(command), "Usage") in " ".join(outcome.out.split())


def test_without_a_command_the_help_is_shown() -> None:
    assert nsae().out == nsae("--help").out
    assert nsae("--version").out.startswith("nsae 0.")

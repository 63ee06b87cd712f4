"""Reading a configuration: everything that is wrong with it, at once, with file, line and the nearest word."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import nsae
from nsae_cli.errors import UsageError
from nsae_cli.experiment.config import load_config
from nsae_cli.store.workspace import Workspace

COLLECT = "  - collect: {model: mini, tokens: 4k, name: s}\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs")


def problems(tmp_path: Path, text: str | bytes) -> list[str]:
    """What is wrong with a configuration, each problem without the path of the file."""
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        load_config(path, Workspace(tmp_path / "runs"))
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


MALFORMED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", " the file is empty; write `stages:`"),
    "comment only": ("# nothing\n", " the file is empty; write `stages:`"),
    "list at top": ("- norms: {}\n", "1: expected `stages:` with a list of commands"),
    "text": ("just text\n", "1: expected `stages:`"),
    "no stages": ("stages: []\n", "1: expected `stages:`"),
    "stages null": ("stages:\n", "1: expected `stages:`"),
    "stages a mapping": ("stages: {norms: {}}\n", "1: expected `stages:`"),
    "tabs": ("stages:\n\t- norms: {}\n", "2: not valid YAML (a tab; indent with spaces)"),
    "unclosed": ("stages:\n  - norms: {name: x\n", "3: not valid YAML"),
    "two documents": ("stages: []\n---\nstages: []\n", "2: not valid YAML"),
    "not UTF-8": (b"stages:\n  - norms: {name: \xff}\n", "2: not UTF-8 text"),
    "python object": (
        'stages: !!python/object/apply:os.system ["touch canary"]\n',
        "1: the tag !!python/object/apply:os.system is not allowed",
    ),
    "python name": ("stages:\n  - norms: {name: !!python/name:os.getcwd }\n", "2: the tag !!python"),
    "own tag": ("stages:\n  - norms: !mine {name: x}\n", "2: the tag !mine is not allowed"),
    "alias": (
        "stages:\n" + COLLECT + "  - norms: &n {name: x}\n  - norms: *n\n",
        "3: anchors and aliases (&name, *name) are not supported",
    ),
    "billion laughs": (
        "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nstages: *c\n", "1: anchors and aliases"
    ),
    "deep": ("stages: " + "[" * 5000 + "]" * 5000, " nested too deeply"),
    "many values": ("stages: [" + "x, " * 30_000 + "x]", " more than 20,000 values is no configuration"),
    "key that is a list": ("stages:\n" + COLLECT + "  - norms: {? [a] : 3}\n", "3: a key must be a word"),
}  # fmt: skip


@pytest.mark.parametrize("form", MALFORMED)
def test_files_that_are_no_configuration(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = MALFORMED[form]
    assert any(problem.startswith(expected) for problem in problems(tmp_path, text))
    assert not (tmp_path / "canary").exists()


def test_large_and_missing_files(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "big.yaml").write_text("x" * 2_000_000)
    for path, expected in ((tmp_path / "big.yaml", "2,000,000 bytes"), (tmp_path / "none.yaml", "no such file"),
                           (tmp_path, "is a directory")):  # fmt: skip
        with pytest.raises(UsageError, match=expected):
            load_config(path, workspace)


STAGES: dict[str, tuple[str, list[str]]] = {
    "unknown key at top": ("stagse: 3\n", ["unknown key 'stagse'; did you mean 'stages'?"]),
    "typo in a command": ("  - colect: {model: mini}\n", ["unknown command 'colect'; did you mean 'collect'?"]),
    "unknown command": ("  - bench: {}\n", ["unknown command 'bench'; known are alter, analyze-top-norms, audit"]),
    "typo in an option": ("  - train: {activations: s, learning_rat: 3, l2_nrm: sq}\n", [
        "train has no option 'learning_rat'", "train has no option 'l2_nrm'; did you mean 'l2_norm'?"]),
    "hyphens": ("  - train: {activations: s, l2-norm: sq}\n", ["no option 'l2-norm'; did you mean 'l2_norm'?"]),
    "wrong types": ("  - train: {activations: s, act: 3, lr: fast, deterministic: 5, tokens: 1.5}\n", [
        "act 3: expected relu, tanh-relu, topk, batchtopk or jumprelu", "lr fast: expected a number",
        "deterministic 5: expected true or false", "tokens 1.5: expected a whole number"]),
    "mapping for a value": ("  - train: {activations: s, act: {a: b}}\n", ["act", "expected relu, tanh-relu, topk"]),
    "list where one is wanted": ("  - collect: {model: [mini, gpt2]}\n", ["model mini,gpt2: expected a text"]),
    "no is no number": ("  - train: {activations: s, l2_norm: no}\n", ["no: expected none, norm, sq or cosine"]),
    "duplicate key": ("  - norms: {name: a, name: b}\n", ["key 'name' appears twice (first in line 3)"]),
    "options are a list": ("  - norms: [a]\n", ["the options of norms are not a mapping"]),
    "options are text": ("  - norms: s\n", ["the options of norms are not a mapping"]),
    "two commands in a stage": ("  - norms: {}\n    train: {}\n", ["a stage is one command"]),
    "a stage that is a list": ("  - [norms]\n", ["a stage is one command"]),
    "merge key": ("  - norms: {<<: {name: x}}\n", ["no option '<<'"]),
    "bad name": ("  - norms: {activations: s, name: a/b}\n", ["name 'a/b' is not a name"]),
    "name is a list": ("  - norms: {activations: s, name: [a]}\n", ["name: expected a text"]),
    "unknown input": ("  - norms: {activations: z, name: n}\n", ["nothing in", "is named 'z'; known are s"]),
    "typo in an input": ("  - norms: {activations: ss, name: n}\n", ["did you mean 's'?"]),
    "input of another kind": ("  - analyze-top-norms: {saes: s}\n", ["is named 's'"]),
    "no input before": ("  - analyze-top-norms: {name: a}\n", ["reads saes, but no stage before it makes any"]),
    "input is a mapping": ("  - norms: {activations: {a: s}}\n", ["activations: expected a name or a path"]),
    "no inputs": ("  - analyze-top-norms: {saes: []}\n", ["saes: expected a name or a path"]),
    "two inputs for one": ("  - norms: {activations: [s, s]}\n", ["norms reads one, not 2"]),
    "store is a list": ("  - analyze-top-norms: {saes: s, activations: [s]}\n", ["activations: expected a name"]),
}  # fmt: skip


@pytest.mark.parametrize("wrong", STAGES)
def test_stages_that_are_wrong(wrong: str, tmp_path: Path) -> None:
    text, expected = STAGES[wrong]
    found = problems(tmp_path, "stages:\n" + COLLECT + text)
    for part in expected:
        [problem] = [problem for problem in found if part in problem]
        assert problem.startswith("3: ")


def test_everything_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = (
        "stages:\n"
        "  - colect: {model: mini}\n"
        "  - collect: {modle: mini, tokens: abc, tokens: 5, name: s}\n"
        "  - norms:\n"
        "      activations: s\n"
        "      probe: maybe\n"
        "  - train: {activations: s, act: gelu, name: t/x}\n"
        "stagse: 3\n"
    )
    found = problems(tmp_path, text)
    assert [int(problem.partition(":")[0]) for problem in found] == [2, 3, 3, 3, 6, 7, 7, 8]
    outcome = nsae("--workspace", tmp_path / "runs", "run", tmp_path / "c.yaml")
    assert outcome.code == 2
    assert outcome.message.endswith(
        "c.yaml:2: unknown command 'colect'; did you mean 'collect'? (and 7 more, listed above)"
    )
    assert len(outcome.err.splitlines()) == 9
    assert not (tmp_path / "runs").exists()


def test_how_values_may_be_written(tmp_path: Path, workspace: Workspace) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "\ufeffstages:\r\n"
        "  - collect: {model: mini, tokens: 1e4, bos: on, packing: no, layers: [0, 2-3], name: 7}\r\n"
        "  - norms:\r\n"
        "  - train: {lr: [1e-4, '3e-4'], tokens: 2k, clip: off, seed: [0, 1], l2_norm: none, name: 2024-01-01}\r\n"
        "  - analyze-top-norms: {top: 5%, rows: null}\r\n",
        encoding="utf-8",
    )
    collect, norms, train, analyze = load_config(path, workspace)
    assert (collect.options.tokens, collect.options.bos, collect.options.packing) == (10_000, True, False)
    assert (collect.options.layers, collect.name, collect.options.name) == ("0,2-3", "7", "7")
    assert (norms.reads, norms.name) == (0, None)
    assert (train.options.lr, train.options.tokens, train.options.clip) == ([1e-4, 3e-4], 2000, None)
    assert (train.options.seed, train.options.l2_norm, train.name) == ([0, 1], ["none"], "2024-01-01")
    assert (analyze.options.top, analyze.options.rows, analyze.reads) == (0.05, None, 2)
    assert train.place == f"{path}:4"


def test_inputs_are_earlier_names_the_workspace_or_paths_from_the_file(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    for place in (
        folder / "stores" / "mine",
        workspace.root / "activations" / "old",
        folder / "corpus",
        folder / "mini",
    ):
        place.mkdir(parents=True)
    (folder / "c.yaml").write_text(
        "stages:\n"
        "  - collect: {model: mini, corpus: corpus, name: a}\n"
        "  - collect: {model: ../elsewhere, corpus: builtin, name: b}\n"
        "  - norms: {activations: a, name: a}\n"
        "  - norms: {activations: old, name: old}\n"
        "  - norms: {activations: stores/mine, name: mine}\n"
        "  - train: {name: t}\n"
        "  - analyze-top-norms: {saes: [t/L2-relu, t], activations: stores/mine}\n"
    )
    monkeypatch.chdir(tmp_path)
    stages = load_config(Path("configs/c.yaml"), workspace)
    assert (stages[0].options.model, stages[0].options.corpus) == ("mini", "configs/corpus")
    assert (stages[1].options.model, stages[1].options.corpus) == ("configs/../elsewhere", "builtin")
    assert [stage.reads for stage in stages[2:6]] == [["a"], ["old"], ["configs/stores/mine"], 1]
    assert (stages[6].reads, stages[6].activations) == (["t/L2-relu", "t"], "configs/stores/mine")


def test_defaults_fill_in_what_a_stage_does_not_set(tmp_path: Path, workspace: Workspace) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "defaults:\n"
        "  train: {activations: s, tokens: 2k, act: [relu, tanh-relu]}\n"
        "  norms: {probe: true}\n"
        "stages:\n" + COLLECT + "  - norms\n"
        "  - train: {act: relu, name: a}\n"
        "  - train: {activations: s, tokens: 3k, name: b}\n"
    )
    _, norms, first, second = load_config(path, workspace)
    assert norms.options.probe is True
    assert (first.options.act, first.options.tokens, first.reads) == (["relu"], 2000, ["s"])
    assert (second.options.act, second.options.tokens) == (["relu", "tanh-relu"], 3000)


def test_defaults_that_are_wrong_are_reported_once_and_where_they_stand(tmp_path: Path) -> None:
    text = (
        "defaults:\n"
        "  train: {tokns: 2k, name: t, lr: fast}\n"
        "  trian: {}\n"
        "  norms: 3\n"
        "stages:\n" + COLLECT + "  - train: {activations: s}\n"
        "  - train: {activations: s}\n"
    )
    found = problems(tmp_path, text)
    assert [int(problem.partition(":")[0]) for problem in found] == [2, 2, 2, 3, 4]
    for part in ("no option 'tokns'", "a name belongs to one stage", "lr fast: expected a number",
                 "did you mean 'train'", "the options of norms are not a mapping"):  # fmt: skip
        assert sum(part in problem for problem in found) == 1
    assert "expected commands with options" in problems(tmp_path, "defaults: 3\nstages:\n" + COLLECT)[0]

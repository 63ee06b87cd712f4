"""What a shell is told while a line is typed: asked as bash, zsh and fish ask, of the process that they would start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command import nsae

#: A command named nsae, as an installation puts it on the PATH; says on stderr what it has imported that is heavy.
_NSAE = """#!{python}
import sys
from nsae_cli.cli.app import main
try:
    main()
finally:
    heavy = {{"torch", "transformers", "numpy", "pandas", "datasets", "matplotlib"}} & set(sys.modules)
    print(*sorted(heavy), file=sys.stderr, end="")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "nsae"
    command.write_text(_NSAE.format(python=sys.executable))
    command.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def in_bash(path: str, *lines: str, **environment: str) -> list[list[str]]:
    """What bash offers at the end of each line, through the function that `nsae completion bash` defines."""
    asked = "".join(
        f"line='{line}'; COMP_WORDS=($line); [ \"${{line: -1}}\" = ' ' ] && COMP_WORDS+=('')\n"
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _nsae_completion nsae; echo "${COMPREPLY[@]}"\n'
        for line in lines
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", 'eval "$(nsae completion bash 2>/dev/null)"\n' + asked],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path, **environment}, timeout=120,
    )  # fmt: skip
    assert done.stderr == "", "nothing that computes is imported, and nothing else is said"
    return [line.split() for line in done.stdout.split("\n")[:-1]]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash(path: str, finished: Path, store: str) -> None:
    [group] = (folder.name for folder in (finished / "saes").iterdir())
    cells = {f"{group}/L2-relu", f"{group}/L2-tanh-relu"}
    commands, options, acts, rest, stores, saes, cell, evals, nothing = in_bash(
        path, "nsae a", "nsae train --l1", "nsae train --act ", "nsae train --act relu,t", "nsae norms ",
        "nsae analyze-top-norms ", f"nsae audit {group}/L2-t", "nsae eval --activations ", "nsae collect --name ",
        NSAE_WORKSPACE=str(finished),
    )  # fmt: skip
    assert commands == ["alter", "analyze-top-norms", "audit"]
    assert options == ["--l1-norm"]
    assert acts == ["relu", "tanh-relu", "topk", "batchtopk", "jumprelu"]
    assert rest == ["relu,tanh-relu", "relu,topk"]
    assert stores == evals == [store]
    assert (saes[0], set(saes[1:])) == (group, cells)
    assert cell == [f"{group}/L2-tanh-relu"]
    assert nothing == []  # bash goes on with files


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("COLUMNS", "200")
    return monkeypatch


def test_zsh_and_fish(line: pytest.MonkeyPatch, finished: Path, store: str) -> None:
    line.setenv("_NSAE_COMPLETE", "complete_zsh")
    line.setenv("_TYPER_COMPLETE_ARGS", "nsae collect --layer")
    assert nsae().out == """_arguments '*: :(("--layers":"Layers whose vectors are stored."))'\n"""
    line.setenv("_NSAE_COMPLETE", "complete_fish")
    line.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    line.setenv("_TYPER_COMPLETE_ARGS", f"nsae --workspace {finished} train ")
    assert nsae().out == f"{store}\n"
    line.setenv("_TYPER_COMPLETE_ARGS", "nsae --workspace nowhere train ")
    assert nsae().out == "\n"
    line.setenv("_TYPER_COMPLETE_FISH_ACTION", "is-args")
    assert (nsae().code, nsae().err) == (1, "")  # fish then offers files
    line.setenv("_TYPER_COMPLETE_ARGS", "nsae plot p")
    assert nsae().code == 0


def test_scripts() -> None:
    for shell, start in {
        "bash": "_nsae_completion() {",
        "zsh": "#compdef nsae",
        "fish": "complete --command nsae",
    }.items():
        assert nsae("completion", shell).out.startswith(start)
    outcome = nsae("completion", "tcsh")
    assert (outcome.code, outcome.message) == (2, "SHELL tcsh: expected bash, zsh or fish")

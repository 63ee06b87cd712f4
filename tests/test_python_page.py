"""docs/python.md and the notebook do what they show: their code runs, block after block, in a fresh interpreter."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command import nsae

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "notebooks" / "store-to-features.ipynb"
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter of its own in `folder`, with `nsae` on the PATH and figures drawn into memory."""
    command = folder / "bin" / "nsae"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f"#!{sys.executable}\nfrom nsae_cli.cli.app import main\nmain()\n")
    command.chmod(0o755)
    return subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, check=False, cwd=folder, timeout=300,
        env={**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "MPLBACKEND": "agg"},
    )  # fmt: skip


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _BLOCK.findall((DOCS / "python.md").read_text(encoding="utf-8"))
    assert [kind for kind, _ in blocks] == ["sh", *["python"] * 9]
    for line in blocks[0][1].splitlines():
        outcome = nsae(*line.split()[1:])
        assert outcome.code == 0, outcome.err
    python = [code for _, code in blocks[1:]]
    needed = re.match(r"# needs (\w+): ", python[-1])
    assert needed is not None
    if importlib.util.find_spec(needed[1]) is None:  # a peer's package; tests/interop has more on it
        python.pop()
    done = run_python("\n".join(python), tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"position 0: [4-9]\.\d times the median norm", done.stdout)
    measured, recorded = map(float, re.findall(r"^(0\.\d+) (0\.\d+)$", done.stdout, flags=re.MULTILINE)[0])
    assert measured == pytest.approx(recorded, abs=1e-4)
    assert "\nfeature " in done.stdout
    assert (tmp_path / "nsae-runs/saes/from-python/L2-sq/run.json").is_file()


def test_the_notebook(tmp_path: Path) -> None:
    """Its cells run in order; they print and draw what the committed outputs show, up to the last digits."""
    made = tmp_path / "made.ipynb"
    done = subprocess.run(
        [sys.executable, DOCS / "execute_notebook.py", made], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    committed, ours = (json.loads(path.read_text(encoding="utf-8")) for path in (NOTEBOOK, made))
    cells = [[cell for cell in book["cells"] if cell["cell_type"] == "code"] for book in (committed, ours)]
    assert len(cells[0]) == 10
    for shown, made_now in zip(*cells, strict=True):
        assert "".join(shown["source"]) == "".join(made_now["source"])
        assert _kinds(shown) == _kinds(made_now), "run `make notebook`"
    assert [kind for cell in cells[1] for kind in _kinds(cell)].count("image/png") == 2
    features = "".join(cells[1][8]["outputs"][0]["text"])
    assert len(re.findall(r"^feature \d+: on \d\.\d % of the tokens$", features, flags=re.MULTILINE)) == 5
    assert len(re.findall(r"^  ( \d|\d\d)\.\d\d  .*⟨.+⟩", features, flags=re.MULTILINE)) == 20
    assert "\x1b" not in features


def _kinds(cell: dict[str, Any]) -> list[str]:
    kinds = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        assert not data or base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        kinds.append("image/png" if data else output["name"])
    return kinds

"""Runs the cells of docs/notebooks/store-to-features.ipynb and saves what they print and draw, without Jupyter.

Usage: make notebook, or python docs/execute_notebook.py [OUTPUT.ipynb]; the workspace is made in a temporary folder
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

NOTEBOOK = Path(__file__).with_name("notebooks") / "store-to-features.ipynb"


def execute(notebook: dict[str, Any]) -> None:
    """Runs the code cells in order, with one set of names, and replaces their outputs."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        outputs: list[dict[str, Any]] = []
        printed = io.StringIO()

        def show(outputs: list[dict[str, Any]] = outputs, printed: io.StringIO = printed) -> None:
            _take(printed, outputs)
            image = io.BytesIO()
            plt.gcf().savefig(image, format="png", dpi=80, metadata={"Software": None})
            plt.close("all")
            data = {"image/png": base64.b64encode(image.getvalue()).decode(), "text/plain": ["<Figure>"]}
            outputs.append({"output_type": "display_data", "metadata": {}, "data": data})

        plt.show = show
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number + 1}", "exec"), names)
        _take(printed, outputs)
        cell["outputs"], cell["execution_count"] = outputs, number + 1


def _take(printed: io.StringIO, outputs: list[dict[str, Any]]) -> None:
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
        printed.seek(0)
        printed.truncate()


def main() -> None:
    """Reads, runs and writes."""
    target = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else NOTEBOOK
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        execute(notebook)
        os.chdir(target.parent)
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

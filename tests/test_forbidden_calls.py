"""No line of the package can run code that a file brings: no pickle, no eval, no memory map, no remote code.

ruff has rules for some of these (S301, S302, S307, S506); this looks at all of them, through every alias of a name.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nsae_cli

PACKAGE = Path(nsae_cli.__file__).parent
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "pickletools", "code", "runpy"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.unsafe_load",
}
#: What opens files with a memory map unless it is told not to.
PREAD = {"safetensors.safe_open", "safetensors.torch.load_file", "safetensors.numpy.load_file"}


def problems(source: str) -> list[str]:
    """What is forbidden in a module, with its line."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                if alias.name.partition(".")[0] in FORBIDDEN_MODULES:
                    found.append(f"{node.lineno}: import {alias.name}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            if node.module.partition(".")[0] in FORBIDDEN_MODULES:
                found.append(f"{node.lineno}: from {node.module}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = _name(node.func, names), {word.arg: word.value for word in node.keywords}
        if name in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {name}")
        if name in PREAD and not _is(keywords.get("backend"), "pread"):
            found.append(f"{node.lineno}: {name} without backend='pread'")
        if name == "numpy.load" and not _is(keywords.get("allow_pickle"), False):
            found.append(f"{node.lineno}: {name} without allow_pickle=False")
        if "trust_remote_code" in keywords and not _is(keywords["trust_remote_code"], False):
            found.append(f"{node.lineno}: trust_remote_code")
        if name.endswith(".from_pretrained") and not _is(keywords.get("trust_remote_code"), False):
            found.append(f"{node.lineno}: {name} without trust_remote_code=False")
        if name.endswith(("Model.from_pretrained", "ForCausalLM.from_pretrained")) and not _is(
            keywords.get("use_safetensors"), True
        ):
            found.append(f"{node.lineno}: {name} without use_safetensors=True")
    return found


def _name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, names)}.{node.attr}"
    return ""


def _is(node: ast.expr | None, value: object) -> bool:
    return (isinstance(node, ast.Constant) and node.value is value) or (
        isinstance(node, ast.Constant) and node.value == value
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_call_runs_what_a_file_brings(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import torch as t\nt.load('x')",
        "from torch import load as read\nread('x')",
        "eval('1')",
        "import yaml\nyaml.load('x', Loader=L)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from safetensors import safe_open\nsafe_open('x', framework='pt')",
        "from safetensors.torch import load_file\nload_file('x', backend='mmap')",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=True)",
        "AutoConfig.from_pretrained('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=False)",
    ],
)
def test_what_is_forbidden_is_seen(source: str) -> None:
    assert problems(source) != []

"""Runs a chain of commands under an audit hook and prints which events came from nsae's own code, as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import nsae_cli

OWN = str(Path(nsae_cli.__file__).parent)
#: Who may unpickle: libraries that read files of their own, none of them an artifact, a corpus or a model.
ALLOWED: tuple[str, ...] = ()
WATCHED = ("pickle.find_class", "marshal.load", "marshal.loads", "exec", "compile", "code.__new__", "os.system")

by_nsae: list[str] = []
unpickled: list[str] = []


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in WATCHED:
        return
    frame = sys._getframe(1)
    if frame.f_code.co_filename.startswith(OWN):
        by_nsae.append(f"{event} in {frame.f_code.co_filename}:{frame.f_lineno}")
    if event == "pickle.find_class":
        where = frame.f_code.co_filename
        if not any(allowed in where for allowed in ALLOWED):
            unpickled.append(f"{arguments} in {where}")


def main() -> None:
    sys.addaudithook(hook)
    from nsae_cli.cli import app

    small = ("--device", "cpu")
    codes = []
    for command in (
        ("collect", "--model", "mini-sink", "--tokens", "4k", *small),
        ("norms",),
        ("train", "--d-sae", "64", "--batch-size", "256", "--tokens", "5k", *small),
        ("analyze-top-norms", "--top", "5%"),
        ("verify",),
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            codes.append(app.invoke(["--workspace", sys.argv[1], "-q", *command]))
    print(json.dumps({"codes": codes, "by_nsae": by_nsae, "unpickled": unpickled}))


if __name__ == "__main__":
    main()

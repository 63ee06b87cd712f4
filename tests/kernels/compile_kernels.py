"""Compiles the launches on stdin (JSON) for compute capability 9.0, in a process without Triton's interpreter.

Prints a list of [kernel, whether its code has instructions of the tensor cores].
"""

from __future__ import annotations

import importlib
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def main() -> None:
    compiled = []
    for launch in json.load(sys.stdin):
        kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
        signature, constants = {}, {}
        for position, (name, (kind, value)) in enumerate(launch["arguments"].items()):
            if kind == "constant":
                signature[name] = "constexpr"
                constants[(position,)] = value
            else:
                signature[name] = value
        # As a launch with torch's tensors: they begin at multiples of 16 bytes.
        aligned = {
            (position,): [["tt.divisibility", 16]]
            for position, kind in enumerate(signature.values())
            if kind.startswith("*")
        }
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch["options"])
        assert binary.asm["cubin"]
        compiled.append([launch["kernel"], "wgmma" in binary.asm["ptx"]])
    json.dump(compiled, sys.stdout)


if __name__ == "__main__":
    main()

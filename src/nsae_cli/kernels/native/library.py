"""Finds and opens the compiled loops (`sparse_step.c`, `loops.h`), for the best instruction set of this processor.

`pip install` compiles them where a C compiler is found, and ready-made wheels bring them along. Where neither is so,
`load()` is None and the sparse step runs on torch's own sparse products.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

#: Of sparse_step.c: a library left over from another version of nsae is not used.
_ABI = 1
_ISAS = ("base", "avx2", "avx512")

_I64, _I32, _F32, _POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
#: Argument types by function, in the order of loops.h: l int64, i int32, f float, p pointer.
_SIGNATURES = {
    "collect": "pilllppplppppppppflppp" + "ppp",
    "decode": "lllpppppp" + "ppp",
    "pack": "lllllpp",
    "gradients": "lllllppppppp" + "ppp",
    "update": "lllll" + "ppppppp" + "i" + "pppppp" + "ffffff" + "ppp",
    "shadow": "lllpppp",
    "by_feature": "llppppp" + "pppppp",
    "row_sums": "lppp",
}
_TYPES = {"l": _I64, "i": _I32, "f": _F32, "p": _POINTER}


class NativeLibrary:
    """The loops of one instruction set; every call releases Python's lock while it runs.

    Calls take torch tensors (contiguous, on the CPU) or None for pointers; `call` checks neither shape nor dtype.

    Attributes:
        isa: ``base``, ``avx2`` or ``avx512``.
    """

    def __init__(self, library: ctypes.CDLL, isa: str) -> None:
        self.isa = isa
        self._functions: dict[str, Any] = {}
        for name, letters in _SIGNATURES.items():
            function = getattr(library, f"nsae_{name}_{isa}")
            function.argtypes = [_TYPES[letter] for letter in letters]
            function.restype = _I64 if name == "collect" else None
            self._functions[name] = function

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of loops.h by its name without ``nsae_`` and the instruction set."""
        return self._functions[name](*map(_pointer, arguments))


def _pointer(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


@functools.cache
def load(isa: str | None = None) -> NativeLibrary | None:
    """The compiled loops, or None where they are not there.

    Args:
        isa: one of ``base``, ``avx2``, ``avx512``; None takes the best that this processor has.
    """
    for path in library_files():
        try:
            library, best = open_library(path)
        except OSError:
            continue  # of another platform or version, or no library of ours
        if isa is None or _ISAS.index(isa) <= _ISAS.index(best):
            return NativeLibrary(library, isa or best)
    return None


def library_files() -> list[Path]:
    """Files that may hold the compiled loops."""
    found = sorted(Path(__file__).parent.glob("_sparse_step*"))
    return [path for path in found if path.suffix in (".so", ".pyd", ".dylib")]


def open_library(path: Path) -> tuple[ctypes.CDLL, str]:
    """A library of `library_files` and the best instruction set that it has for this processor.

    Raises:
        OSError: of another platform or version, damaged, or no library of nsae's.
    """
    try:
        library = ctypes.CDLL(str(path))
        abi = int(library.nsae_abi())
        if abi != _ABI:
            raise OSError(f"its interface is {abi}, this nsae needs {_ABI}")
        return library, _ISAS[library.nsae_best_isa()]
    except AttributeError as error:
        raise OSError("it is no library of nsae's") from error

"""Shared by all tests; also puts this folder on the import path, for helpers such as `hand_store`.

One thread: the products of the tests are small, and waiting at their barriers would take longer than computing them.
Set in the environment before torch is imported, so that commands started as processes have it too.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
# The Triton kernels of the sparse step run in Triton's interpreter, on the CPU. Read when triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

"""What all tests of the command line share; the finished workspace is in the folder above."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nsae_cli import interrupt


@pytest.fixture(autouse=True)
def no_signal() -> Iterator[None]:
    interrupt.clear()
    yield
    interrupt.clear()

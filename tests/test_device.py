"""How many threads a piece of work gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nsae_cli.device import SMALL_PRODUCT, one_thread_if_small

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_work_takes_one_thread_and_gives_the_others_back():
    with one_thread_if_small(SMALL_PRODUCT, CPU) as side_by_side:
        assert (torch.get_num_threads(), side_by_side) == (1, 3)
    assert torch.get_num_threads() == 3


def test_large_work_keeps_all_threads():
    for product, device in ((SMALL_PRODUCT + 1, CPU), (1, torch.device("cuda"))):
        with one_thread_if_small(product, device) as side_by_side:
            assert (torch.get_num_threads(), side_by_side) == (3, 1)


def test_large_work_inside_small_work_gets_all_threads():
    with one_thread_if_small(1, CPU):
        with one_thread_if_small(2 * SMALL_PRODUCT, CPU) as side_by_side:
            assert (torch.get_num_threads(), side_by_side) == (3, 1)
            with one_thread_if_small(1, CPU):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
        with one_thread_if_small(5, CPU) as side_by_side:
            assert (torch.get_num_threads(), side_by_side) == (1, 1)
    assert torch.get_num_threads() == 3


def test_an_error_gives_the_threads_back():
    with pytest.raises(KeyError), one_thread_if_small(1, CPU):
        raise KeyError
    assert torch.get_num_threads() == 3
    with one_thread_if_small(2 * SMALL_PRODUCT, CPU):
        assert torch.get_num_threads() == 3

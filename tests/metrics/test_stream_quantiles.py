from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsae_cli.errors import NumericalError
from nsae_cli.metrics.quantiles import stream_quantiles

LEVELS = [0.0, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.77, 0.99, 1.0]


def stream(*chunks: list[float]) -> Callable[[], list[Tensor]]:
    return lambda: [torch.tensor(chunk, dtype=torch.float32) for chunk in chunks]


def test_a_worked_example() -> None:
    # Sorted 1, 2, 4, 8: level .5 lies at 1.5, half way from 2 to 4; level .9 at 2.7: 4 + .7·4.
    count, quantiles = stream_quantiles(stream([8.0, 1.0], [], [4.0, 2.0]), [0.5, 0.9])
    assert count == 4
    assert quantiles == pytest.approx([3.0, 6.8], abs=1e-12)


norms = st.one_of(
    st.floats(min_value=0, width=32, allow_infinity=False, allow_nan=False),  # denormals included
    st.sampled_from([0.0, 1e-45, 1.0, 1.0000001, 57.25, 3000.0]),  # so that duplicates occur
)


@settings(max_examples=150, deadline=None)
@given(values=st.lists(norms, min_size=1, max_size=40), cut=st.integers(0, 40))
def test_equal_to_numpy(values: list[float], cut: int) -> None:
    count, quantiles = stream_quantiles(stream(values[:cut], values[cut:]), LEVELS)
    assert count == len(values)
    expected = np.quantile(np.array(values, dtype=np.float32).astype(np.float64), LEVELS)
    assert quantiles == expected.tolist()


def test_equal_to_numpy_on_many_norms_in_unequal_chunks() -> None:
    norm = torch.randn(50_001, generator=torch.Generator().manual_seed(1)).abs() * 60
    count, quantiles = stream_quantiles(lambda: norm.split([7, 40_000, 9_994]), LEVELS)
    assert count == 50_001
    assert quantiles == np.quantile(norm.double().numpy(), LEVELS).tolist()


def test_half_precision_is_read_exactly() -> None:
    norm = torch.tensor([3.0, 5.5, 3072.0], dtype=torch.float16)
    assert stream_quantiles(lambda: [norm], [0.5, 0.75]) == (3, [5.5, 1538.75])


def test_negative_zero_is_zero() -> None:
    assert stream_quantiles(stream([-0.0, 2.0]), [0.0, 0.5]) == (2, [0.0, 1.0])


def test_an_empty_stream_has_no_quantiles() -> None:
    assert stream_quantiles(stream(), [0.5]) == (0, None)
    assert stream_quantiles(stream([], []), [0.5]) == (0, None)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_what_is_no_norm_is_refused(bad: float) -> None:
    with pytest.raises(NumericalError):
        stream_quantiles(stream([1.0, bad]), [0.5])


def test_a_stream_that_changes_is_noticed() -> None:
    passes = iter([[torch.ones(3)], [torch.ones(2)]])
    with pytest.raises(RuntimeError, match="second time"):
        stream_quantiles(lambda: next(passes), [0.5])


def test_levels_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(ValueError, match="levels"):
        stream_quantiles(stream([1.0]), [1.5])

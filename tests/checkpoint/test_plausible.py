"""Shapes that a tensor can have: those that PyTorch and NumPy can count in 63 bits."""

import numpy as np
import pytest

from cogtools.checkpoint.limits import MAX_DIMENSIONS
from cogtools.checkpoint.plausible import can_be_shape, can_be_steps


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2**60 - 1, 8), (0, 2**60 - 1, 8), (1,) * MAX_DIMENSIONS])
def test_a_shape_that_numpy_can_have_too_can_be(shape: tuple[int, ...]) -> None:
    assert can_be_shape(shape)
    assert np.lib.stride_tricks.as_strided(np.zeros(1, "u1"), shape, (0,) * len(shape)).shape == shape


@pytest.mark.parametrize("shape", [(2**63,), (2**60, 8), (0, 2**60, 8), (2**62,) * 32, (0, *(2**62,) * 31)])
def test_a_shape_whose_product_overflows_cannot_be_be_it_empty_or_not(shape: tuple[int, ...]) -> None:
    assert not can_be_shape(shape)
    with pytest.raises((ValueError, OverflowError)):
        np.lib.stride_tricks.as_strided(np.zeros(1, "u1"), shape, (0,) * len(shape))


def test_bytes_count_as_elements_do() -> None:
    assert (can_be_shape((2**60,), 4), can_be_shape((2**61,), 4)) == (True, False)
    assert (can_be_steps((2**60, 0), 4), can_be_steps((2**61, 0), 4)) == (True, False)


@pytest.mark.parametrize("value", [[2], 2, None, "2", (2.0,), (True,), ("2",), (-1,), ((2,),), (1,) * 33])
def test_what_is_no_tuple_of_few_whole_numbers_from_0_on_cannot_be(value: object) -> None:
    assert (can_be_shape(value), can_be_steps(value)) == (False, False)

"""What a value from a file can be: the shape of a tensor, its strides, a number.

Every format is held to it, so that nobody behind the readers has to think of it.

PyTorch counts elements and bytes in signed 64-bit integers. So does NumPy, which leaves the dimensions of size 0 out
of the product: an empty tensor is held to the same.
"""

from __future__ import annotations

from typing import TypeGuard

from cogtools.checkpoint.limits import MAX_DIMENSIONS, MAX_TENSOR_BYTES


def can_be_shape(value: object, itemsize: int = 1) -> TypeGuard[tuple[int, ...]]:
    """Whether this, from a file, can be the shape of a tensor whose elements have `itemsize` bytes."""
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS:
        return False
    size_bytes = itemsize
    for size in value:
        if type(size) is not int or size < 0:
            return False
        size_bytes *= size or 1
        if size_bytes >= MAX_TENSOR_BYTES:
            return False
    return True


def can_be_steps(value: object, itemsize: int = 1) -> TypeGuard[tuple[int, ...]]:
    """Whether these can be the strides of such a tensor, or its offset: in bytes, each fits into 63 bits."""
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS:
        return False
    limit = MAX_TENSOR_BYTES // itemsize
    for step in value:  # noqa: SIM110 - all() takes three times as long, and this runs for every tensor
        if type(step) is not int or not 0 <= step < limit:
            return False
    return True


MAX_NUMBER = 2**63
"""A larger number was never meant, and may be too long to be printed or too large for a float."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, not too large to be one that is meant; NaN is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def is_positive(value: object) -> TypeGuard[float]:
    """Whether a value is a number above 0, neither so large nor so small that dividing by it could overflow."""
    return is_number(value) and value > 1 / MAX_NUMBER

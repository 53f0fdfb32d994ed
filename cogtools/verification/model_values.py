"""The values of a model's tensors: whether all are finite, and whether they are those of a plan, byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cogtools.checkpoint.decoding import doubles
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.errors import Problem
from cogtools.verification.values import FLOAT_FORMATS, SCAN_BYTES, Float, place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.plan import Planned


def not_finite(key: str, entry: TensorEntry, advance: Callable[[int], None]) -> Problem | None:
    """The first NaN or infinity of a tensor, and how many there are; None if there is none.

    Args:
        key: its key, for the problem.
        entry: the tensor. One that is not of a float's dtype has none.
        advance: called with the bytes that were read, as they are.
    """
    form = FLOAT_FORMATS.get(entry.dtype.name)
    if form is None:
        return None
    first, count, position = "", 0, 0
    for chunk in tensor_chunks(entry, SCAN_BYTES):
        exponents = np.frombuffer(chunk, form.bits) & form.exponent
        if len(exponents) and exponents.max() == form.exponent:
            wrong = np.flatnonzero(exponents == form.exponent)
            first = first or _shown(chunk, int(wrong[0]), entry.dtype, position, entry.shape)
            count += len(wrong)
        position += len(exponents)
        advance(len(chunk))
    return Problem("not_finite", key, f"{first} ({count:,} of {entry.numel:,} values)") if count else None


def difference(
    key: str,
    entry: TensorEntry,
    planned: Planned,
    advance: Callable[[int], None],
    computed: Callable[[Planned], Iterator[bytes | memoryview]] | None = None,
) -> Problem | None:
    """How a tensor differs from what it should be; None if it does not.

    Args:
        key: its key, for the problem.
        entry: the tensor.
        planned: what it should be.
        advance: called with the bytes that were compared, as they are.
        computed: computes what is not copied: then a value may be one unit in the last place away, as another machine
            may add up in another order.
    """
    if (entry.dtype, entry.shape) != (planned.dtype, planned.shape):
        both = (entry.dtype, entry.shape), (planned.dtype, planned.shape)
        found, expected = (f"{dtype} {shape}" for dtype, shape in both)
        return Problem("value", key, found, f"{expected}, as the checkpoint has it")
    form = None if planned.compute is None else FLOAT_FORMATS.get(entry.dtype.name)
    made = _copied(planned) if planned.compute is None or computed is None else map(bytes, computed(planned))
    itemsize, position = entry.dtype.itemsize, 0
    for held, right in zip(_even(tensor_chunks(entry, SCAN_BYTES)), _even(made), strict=True):
        at = None if held == right else _first_apart(held, right, itemsize, form)
        if at is not None:
            found = _shown(held, at, entry.dtype, position, entry.shape)
            return Problem("value", key, found, f"{_value(right, at, entry.dtype)}, as the checkpoint has it")
        position += len(held) // itemsize
        advance(len(held))
    return None


def _first_apart(held: bytes, right: bytes, itemsize: int, form: Float | None) -> int | None:
    """The first element that is not the same, or with a format more than one unit in the last place away."""
    if form is None:
        unequal = np.frombuffer(held, np.uint8) != np.frombuffer(right, np.uint8)
        return int(np.flatnonzero(unequal)[0]) // itemsize
    apart = np.flatnonzero(np.abs(_in_order(held, form, itemsize) - _in_order(right, form, itemsize)) > 1)
    return int(apart[0]) if len(apart) else None


def _in_order(data: bytes, form: Float, itemsize: int) -> NDArray[np.int64]:
    """Floating-point numbers as integers that are in the same order: neighbours are one apart."""
    bits = np.frombuffer(data, form.bits).astype(np.int64)
    sign = 1 << (8 * itemsize - 1)
    magnitude = bits & (sign - 1)
    return np.where(bits == magnitude, magnitude, -magnitude)


def _copied(planned: Planned) -> Iterator[bytes]:
    for piece in planned.pieces:
        if isinstance(piece, bytes):
            yield piece
        else:
            yield from tensor_chunks(piece, SCAN_BYTES)


def _even(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of one size, but for the last: two sides that are divided otherwise can be compared."""
    held = b""
    for chunk in chunks:
        held = held + chunk if held else chunk
        start = 0
        while len(held) - start >= SCAN_BYTES:
            yield held[start : start + SCAN_BYTES]
            start += SCAN_BYTES
        held = held[start:]
    if held:
        yield held


def _shown(chunk: bytes, at: int, dtype: DType, before: int, shape: tuple[int, ...]) -> str:
    return f"{_value(chunk, at, dtype)} at {place(before + at, shape)}"


def _value(chunk: bytes, at: int, dtype: DType) -> str:
    return f"{doubles(chunk[at * dtype.itemsize : (at + 1) * dtype.itemsize], dtype)[0]:.6g}"

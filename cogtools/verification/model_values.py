"""The values of a model's tensors: whether all are finite, and whether they are those of a plan, byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cogtools.checkpoint.decoding import doubles
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.errors import Problem
from cogtools.verification.values import SCAN_BYTES, bits_of, place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    bits = bits_of(entry.dtype) if "float" in entry.dtype.name else None
    if bits is None:
        return None
    first, count, position = "", 0, 0
    for chunk in tensor_chunks(entry, SCAN_BYTES):
        values = np.frombuffer(chunk, bits.code)
        wrong = np.flatnonzero(bits.not_finite(values))
        if len(wrong):
            first = first or _shown(chunk, int(wrong[0]), entry.dtype, position, entry.shape)
            count += len(wrong)
        position += len(values)
        advance(len(chunk))
    return Problem("not_finite", key, f"{first} ({count:,} of {entry.numel:,} values)") if count else None


def difference(key: str, entry: TensorEntry, planned: Planned, advance: Callable[[int], None]) -> Problem | None:
    """How a tensor differs from what it should be; None if it does not.

    Args:
        key: its key, for the problem.
        entry: the tensor.
        planned: what it should be: rows of a checkpoint, which are copied.
        advance: called with the bytes that were compared, as they are.
    """
    if (entry.dtype, entry.shape) != (planned.dtype, planned.shape):
        found, expected = (
            f"{dtype} {shape}" for dtype, shape in ((entry.dtype, entry.shape), (planned.dtype, planned.shape))
        )
        return Problem("value", key, found, f"{expected}, as the checkpoint has it")
    position = 0
    for found_bytes, expected_bytes in zip(
        _even(tensor_chunks(entry, SCAN_BYTES)), _even(_planned_chunks(planned)), strict=True
    ):
        if found_bytes != expected_bytes:
            itemsize = entry.dtype.itemsize
            unequal = np.frombuffer(found_bytes, np.uint8) != np.frombuffer(expected_bytes, np.uint8)
            at = int(np.flatnonzero(unequal)[0]) // itemsize
            return Problem(
                "value",
                key,
                _shown(found_bytes, at, entry.dtype, position, entry.shape),
                f"{_value(expected_bytes, at, entry.dtype)}, as the checkpoint has it",
            )
        position += len(found_bytes) // entry.dtype.itemsize
        advance(len(found_bytes))
    return None


def _planned_chunks(planned: Planned) -> Iterator[bytes]:
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

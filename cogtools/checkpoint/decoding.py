"""The elements of tensors as NumPy numbers, also of the dtypes that NumPy does not have.

Sources: the OCP 8-bit floating point specification and the definitions in PyTorch (c10/util/Float8_*.h).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogtools.checkpoint.gather import tensor_chunks

if TYPE_CHECKING:
    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.tensors import TensorEntry

Array = NDArray[Any]

_NUMPY = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint64": "u8",
    "uint32": "u4",
    "uint16": "u2",
    "uint8": "u1",
    "bool": "u1",
}
"""The dtypes that NumPy has, by its codes."""


class _Float8(NamedTuple):
    """An 8-bit floating point format: bits of its mantissa, bias of its exponent, codes of its NaNs and infinities."""

    mantissa_bits: int
    bias: int
    nans: tuple[int, ...]
    infs: tuple[int, ...] = ()


_FLOAT8 = {
    "float8_e4m3fn": _Float8(3, 7, (0x7F, 0xFF)),
    "float8_e4m3fnuz": _Float8(3, 8, (0x80,)),
    "float8_e5m2": _Float8(2, 15, (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF), (0x7C, 0xFC)),
    "float8_e5m2fnuz": _Float8(2, 16, (0x80,)),
}


def can_decode(dtype: DType) -> bool:
    """Whether there is a single number for each element: there is none for a complex one."""
    return dtype.name in _NUMPY or dtype.name in _FLOAT8 or dtype.name in ("bfloat16", "float8_e8m0fnu")


def raw_code(dtype: DType, *, big_endian: bool) -> str:
    """NumPy's code for the elements as they lie in a file: as numbers where it has the dtype, else as bit patterns."""
    return (">" if big_endian else "<") + _NUMPY.get(dtype.name, f"u{dtype.itemsize}")


def decode(raw: Array, dtype: DType) -> Array:
    """The numbers that these elements, read with `raw_code`, stand for. Exact: no dtype here is rounded."""
    if dtype.name == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)  # a bfloat16 is the upper half of a float32
    if dtype.name == "float8_e8m0fnu":
        numbers: Array = np.ldexp(1.0, raw.astype(np.int32) - 127)
        numbers[raw == 0xFF] = np.nan
        return numbers
    if dtype.name in _FLOAT8:
        return _float8_numbers(dtype.name)[raw]
    return raw


def doubles(data: bytes, dtype: DType) -> NDArray[np.float64]:
    """The numbers of little-endian bytes, in double precision, which holds all floats here exactly."""
    return decode(np.frombuffer(data, raw_code(dtype, big_endian=False)), dtype).astype(np.float64)


def tensor_doubles(entry: TensorEntry) -> NDArray[np.float64]:
    """The whole tensor in double precision, in its shape.

    Raises:
        CheckpointError: if the file ends before the tensor does, or cannot be read.
    """
    return doubles(b"".join(tensor_chunks(entry)), entry.dtype).reshape(entry.shape)


@cache
def _float8_numbers(name: str) -> Array:
    """What each of the 256 bit patterns of an 8-bit float stands for."""
    mantissa_bits, bias, nans, infs = _FLOAT8[name]
    codes = np.arange(256)
    exponent = (codes & 0x7F) >> mantissa_bits
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = exponent > 0
    numbers: Array = np.ldexp(fraction + normal, np.where(normal, exponent, 1) - bias)
    numbers[list(infs)] = np.inf
    numbers = np.where(codes & 0x80, -numbers, numbers)
    numbers[list(nans)] = np.nan
    return numbers

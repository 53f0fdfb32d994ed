"""The dtypes of tensors: their names in PyTorch, their sizes, their codes in safetensors and in `torch.save` files.

Sources: torch/storage.py (`_dtype_to_storage_type_map`) for the storage classes; the safetensors format
description, its Rust reader (tensor.rs, `Dtype`) and safetensors/torch.py (`_TYPES`) for the codes. PyTorch has no
dtypes for F4, F6_E2M3 and F6_E3M2 as safetensors counts them: their names here are those of the OCP specification.
"""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One dtype.

    Attributes:
        name: PyTorch's name without "torch.", such as "bfloat16".
        itemsize: bytes of one element; 1 for those of less than a byte, which lie packed.
        safetensors: its code in a safetensors header; None where that format has none.
        storage_class: the typed storage that a `torch.save` file names; None where only untyped storages exist.
        swap_bytes: the unit that a change of byte order reverses: half an element for complex numbers.
        bits: bits of one element.
    """

    name: str
    itemsize: int
    safetensors: str | None
    storage_class: str | None
    swap_bytes: int
    bits: int

    def __str__(self) -> str:
        return self.name

    def size_bytes(self, elements: int) -> int:
        """How many bytes so many elements take when they lie one after the other."""
        return (elements * self.bits + 7) // 8


def _dtype(
    name: str,
    itemsize: int,
    safetensors: str | None,
    storage_class: str | None,
    swap_bytes: int | None = None,
    bits: int | None = None,
) -> DType:
    return DType(name, itemsize, safetensors, storage_class, swap_bytes or itemsize, bits or 8 * itemsize)


# fmt: off
DTYPES = {
    dtype.name: dtype
    for dtype in (
        _dtype("float64", 8, "F64", "DoubleStorage"),
        _dtype("float32", 4, "F32", "FloatStorage"),
        _dtype("float16", 2, "F16", "HalfStorage"),
        _dtype("bfloat16", 2, "BF16", "BFloat16Storage"),
        _dtype("int64", 8, "I64", "LongStorage"),
        _dtype("int32", 4, "I32", "IntStorage"),
        _dtype("int16", 2, "I16", "ShortStorage"),
        _dtype("int8", 1, "I8", "CharStorage"),
        _dtype("uint8", 1, "U8", "ByteStorage"),
        _dtype("bool", 1, "BOOL", "BoolStorage"),
        _dtype("uint64", 8, "U64", None),
        _dtype("uint32", 4, "U32", None),
        _dtype("uint16", 2, "U16", None),
        _dtype("float8_e4m3fn", 1, "F8_E4M3", None),
        _dtype("float8_e4m3fnuz", 1, "F8_E4M3FNUZ", None),
        _dtype("float8_e5m2", 1, "F8_E5M2", None),
        _dtype("float8_e5m2fnuz", 1, "F8_E5M2FNUZ", None),
        _dtype("float8_e8m0fnu", 1, "F8_E8M0", None),
        _dtype("complex32", 4, None, None, 2),
        _dtype("complex64", 8, "C64", "ComplexFloatStorage", 4),
        _dtype("complex128", 16, None, "ComplexDoubleStorage", 8),
        # Two elements to a byte, or four to three bytes
        _dtype("float4_e2m1", 1, "F4", None, bits=4),
        _dtype("float6_e2m3", 1, "F6_E2M3", None, bits=6),
        _dtype("float6_e3m2", 1, "F6_E3M2", None, bits=6),
        # What PyTorch packs into bytes, or leaves without a meaning, counted as it counts them
        _dtype("float4_e2m1fn_x2", 1, None, None),
        _dtype("qint8", 1, None, "QInt8Storage"),
        _dtype("quint8", 1, None, "QUInt8Storage"),
        _dtype("qint32", 4, None, "QInt32Storage"),
        _dtype("quint4x2", 1, None, "QUInt4x2Storage"),
        _dtype("quint2x4", 1, None, "QUInt2x4Storage"),
        _dtype("bits8", 1, None, None),
        _dtype("bits16", 2, None, None),
        _dtype("bits1x8", 1, None, None),
        _dtype("bits2x4", 1, None, None),
        _dtype("bits4x2", 1, None, None),
    )
}
# fmt: on

BY_TORCH_NAME = {name: dtype for name, dtype in DTYPES.items() if dtype.bits >= 8}
BY_SAFETENSORS_CODE = {dtype.safetensors: dtype for dtype in DTYPES.values() if dtype.safetensors}
BY_STORAGE_CLASS = {dtype.storage_class: dtype for dtype in DTYPES.values() if dtype.storage_class}
UNTYPED_STORAGE_CLASS = "UntypedStorage"


class FloatFormat(NamedTuple):
    """How the bits of a floating-point number are divided. Infinities and NaNs have an exponent of ones.

    Attributes:
        exponent: the bits of its exponent.
        precision: the bits of its fraction.
        least: the exponent of its smallest normal number.
    """

    exponent: int
    precision: int
    least: int


FLOAT_FORMATS = {
    "float16": FloatFormat(0x7C00, 10, -14),
    "bfloat16": FloatFormat(0x7F80, 7, -126),
    "float32": FloatFormat(0x7F80_0000, 23, -126),
    "float64": FloatFormat(0x7FF0_0000_0000_0000, 52, -1022),
}

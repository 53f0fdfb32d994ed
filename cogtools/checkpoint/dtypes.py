"""The dtypes of tensors: their names in PyTorch, their sizes, their codes in safetensors and in `torch.save` files.

Sources: torch/storage.py (`_dtype_to_storage_type_map`) for the storage classes; the safetensors format
description and safetensors/torch.py (`_TYPES`) for the codes.
"""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One dtype.

    Attributes:
        name: PyTorch's name without "torch.", such as "bfloat16".
        itemsize: bytes of one element.
        safetensors: its code in a safetensors header; None where that format has none.
        storage_class: the typed storage that a `torch.save` file names; None where only untyped storages exist.
        swap_bytes: the unit that a change of byte order reverses: half an element for complex numbers.
    """

    name: str
    itemsize: int
    safetensors: str | None
    storage_class: str | None
    swap_bytes: int

    def __str__(self) -> str:
        return self.name


def _dtype(
    name: str,
    itemsize: int,
    safetensors: str | None,
    storage_class: str | None,
    swap_bytes: int | None = None,
) -> DType:
    return DType(name, itemsize, safetensors, storage_class, swap_bytes or itemsize)


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
    )
}
# fmt: on

BY_SAFETENSORS_CODE = {dtype.safetensors: dtype for dtype in DTYPES.values() if dtype.safetensors}
BY_STORAGE_CLASS = {dtype.storage_class: dtype for dtype in DTYPES.values() if dtype.storage_class}
UNTYPED_STORAGE_CLASS = "UntypedStorage"

"""A storage, and a tensor's view of it: where bytes lie and what they are. Nothing is loaded.

Tensors of DeepSpeed's ZeRO-3 are flat, their true shape beside them in an attribute `ds_shape`. With one data-parallel
rank a tensor is whole; with several, each rank's file has a part of it only (DeepSpeed,
runtime/zero/partition_parameters.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Self

from cogtools.checkpoint.files import FileRange
from cogtools.checkpoint.plausible import can_be_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cogtools.checkpoint.dtypes import DType


@dataclass(slots=True, eq=False)
class Storage:
    """The raw bytes that one or more tensors view.

    Attributes:
        key: its name in the file.
        size_bytes: how many bytes it has, once unpacked.
        crc32: the CRC-32 that the file records for them; None where it records none.
        locate: finds the bytes. Called once, when they are first needed: for a zip archive that takes a read.
        big_endian: whether its numbers have their highest byte first.
        span: a range of the file that has it, packed or not, and all that is read to find it. None if `locate` has to
            be asked.
    """

    key: str
    size_bytes: int
    crc32: int | None
    locate: Callable[[], FileRange]
    big_endian: bool = False
    span: FileRange | None = None
    _range: FileRange | None = field(default=None, init=False)

    @classmethod
    def at(cls, key: str, place: FileRange) -> Self:
        """A storage whose place is known, without a CRC-32."""
        return cls(key, place.size_bytes, None, lambda: place, span=place)

    def range(self) -> FileRange:
        """Where the unpacked bytes are."""
        if self._range is None:
            self._range = self.locate()
        return self._range

    @property
    def is_located(self) -> bool:
        """Whether `range` tells it without fetching anything."""
        return self._range is not None or self.around().file.fd >= 0

    def around(self) -> FileRange:
        """A range of the file that has all of it; found without a read where that is possible."""
        return self.span or self.range()


@dataclass(slots=True, eq=False)
class TensorEntry:
    """A tensor as its checkpoint describes it. Nothing of it is loaded.

    Attributes:
        dtype: what its elements are.
        shape: as PyTorch, () for a single number.
        stride: elements from one index to the next, per dimension.
        storage: the bytes it views.
        storage_offset: elements from the start of the storage to the first one of the tensor.
        attributes: Python attributes saved with it, such as DeepSpeed's `ds_shape`.
    """

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: Storage
    storage_offset: int = 0
    attributes: Mapping[str, object] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """How many elements the tensor has."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """How many bytes its elements take when they lie one after the other."""
        return self.dtype.size_bytes(self.numel)

    @property
    def offset_bytes(self) -> int:
        """Bytes from the start of the storage to the first element."""
        return self.storage_offset * self.dtype.itemsize

    @property
    def span_bytes(self) -> int:
        """Bytes of the storage from the first element to the end of the last one."""
        if 0 in self.shape:
            return 0
        elements = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            elements += (size - 1) * stride
        return self.dtype.size_bytes(elements)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    def rows(self, first: int, last: int) -> TensorEntry:
        """A view of the rows from `first` up to `last`, which is not one of them. No bytes are read.

        Raises:
            ValueError: if it does not have these rows.
        """
        if not self.shape or not 0 <= first <= last <= self.shape[0]:
            raise ValueError(f"no rows {first} to {last} in a tensor of shape {self.shape}")
        shape = (last - first, *self.shape[1:])
        offset = self.storage_offset + first * self.stride[0] if last > first else self.storage_offset
        return TensorEntry(self.dtype, shape, self.stride, self.storage, offset)

    def range(self) -> FileRange | None:
        """Where its bytes lie in a file as safetensors wants them; None if they have to be rearranged."""
        swapped = self.storage.big_endian and self.dtype.swap_bytes > 1
        if swapped or not self.is_contiguous:
            return None
        file, start, _ = self.storage.range()
        return FileRange(file, start + self.offset_bytes, self.size_bytes)


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor that is not a view of one storage, so that only its kind is told.

    Attributes:
        kind: what it is, such as "a sparse tensor".
        advice: how to save it with its values, where they are not in the file, or not all of them; else None.
    """

    kind: str
    advice: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}, which is not described further"


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a row-major tensor of this shape, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def true_shape(entry: TensorEntry) -> tuple[int, ...] | None:
    """The shape that ZeRO-3 states for a tensor; None if it states none that a tensor can have."""
    shape = entry.attributes.get("ds_shape")
    return shape if can_be_shape(shape, entry.dtype.itemsize) else None


def whole_tensor(entry: TensorEntry) -> TensorEntry:
    """The tensor in its true shape, if all of it is there; else as it is."""
    shape = true_shape(entry)
    if shape is None or len(entry.shape) != 1 or entry.numel != prod(shape) or not entry.is_contiguous:
        return entry
    return TensorEntry(entry.dtype, shape, contiguous_strides(shape), entry.storage, entry.storage_offset)

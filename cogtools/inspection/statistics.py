"""What the elements of a tensor are like, computed while they are read, in memory that does not grow with it.

No statistic depends on the order of the elements. So a transposed tensor is read from front to back like any other,
and of a sliced one the storage is read in pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogtools.checkpoint.decoding import Array, can_decode, decode, raw_code
from cogtools.checkpoint.files import FileRange
from cogtools.inspection.report import Statistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.checkpoint.tensors import TensorEntry

PIECE_ELEMENTS = 1 << 17
"""How many elements are looked at at a time: in double precision they take 1 MB, and stay in the processor's cache."""


def tensor_statistics(entry: TensorEntry) -> Statistics:
    """What the elements of a tensor are like.

    Raises:
        CheckpointError: if the file ends before the tensor does, or cannot be read.
    """
    if not can_decode(entry.dtype):
        return Statistics(not_computed=f"{entry.dtype.name} has no order and no sign")
    view, repeats = _without_repeats(entry)
    if view.elements * entry.dtype.itemsize > entry.storage.size_bytes:
        return Statistics(not_computed="its elements overlap in the storage")
    sums = _Sums()
    for piece in _pieces(entry, view):
        sums.add(decode(piece, entry.dtype))
    return sums.statistics(repeats)


class _View(NamedTuple):
    """Part of a tensor: its shape and strides, and its first element in the storage, all in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_dense(self) -> bool:
        """Whether its elements, in some order, are all of the storage's between the first and the last."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if step != expected:
                return False
            expected *= size
        return True

    def halves(self) -> tuple[_View, _View]:
        """Its two halves along the longest stride, which is the first."""
        half = self.shape[0] // 2
        return self._part(half, self.shape[0] - half), self._part(0, half)

    def _part(self, first: int, size: int) -> _View:
        keep = 1 if size == 1 else 0
        return _View((size, *self.shape[1:])[keep:], self.stride[keep:], self.offset + first * self.stride[0])


def _without_repeats(entry: TensorEntry) -> tuple[_View, int]:
    """A tensor without the dimensions along which it repeats itself (stride 0), and how often it does."""
    axes = [(size, step) for size, step in zip(entry.shape, entry.stride, strict=True) if size != 1]
    repeats = math.prod(size for size, step in axes if step == 0)
    axes = sorted((axis for axis in axes if axis[1] != 0), key=lambda axis: -axis[1])
    return _View(tuple(size for size, _ in axes), tuple(step for _, step in axes), entry.storage_offset), repeats


def _pieces(entry: TensorEntry, whole: _View) -> Iterator[Array]:
    """The elements, in any order, in pieces that take little memory each."""
    if not entry.numel:
        return
    waiting = [whole]
    while waiting:
        view = waiting.pop()
        if view.is_dense:
            for start in range(0, view.elements, PIECE_ELEMENTS):
                yield _read(entry, view.offset + start, min(PIECE_ELEMENTS, view.elements - start))
        elif max(view.span, view.elements) <= PIECE_ELEMENTS:
            span = _read(entry, view.offset, view.span)
            strides = [step * entry.dtype.itemsize for step in view.stride]
            yield np.lib.stride_tricks.as_strided(span, view.shape, strides, writeable=False).ravel()
        else:
            waiting += view.halves()


def _read(entry: TensorEntry, offset: int, elements: int) -> Array:
    file, start, _ = entry.storage.range()
    itemsize = entry.dtype.itemsize
    data = FileRange(file, start + offset * itemsize, elements * itemsize).read()
    return np.frombuffer(data, raw_code(entry.dtype, big_endian=entry.storage.big_endian))


@dataclass(slots=True)
class _Sums:
    """What is known of the elements seen so far; mean and squares are of the finite ones."""

    count: int = 0
    min: float = math.inf
    max: float = -math.inf
    mean: float = 0.0
    squared_deviations: float = 0.0
    squares: float = 0.0
    seen: int = 0
    zeros: int = 0
    nans: int = 0
    infs: int = 0

    def add(self, numbers: Array) -> None:
        """Take in more elements: means and deviations of both parts are merged as Chan, Golub and LeVeque do."""
        self.seen += numbers.size
        # Not said aloud: NaNs in a cast, and squares beyond float64, which are told as None.
        with np.errstate(over="ignore", invalid="ignore"):
            doubles = numbers.astype(np.float64)
            self.zeros += doubles.size - int(np.count_nonzero(doubles))
            if not math.isfinite(doubles.sum()):
                numbers = doubles = self._finite(doubles)
            if not doubles.size:
                return
            smallest_and_largest = numbers if numbers.dtype.kind in "iu" else doubles  # large integers stay exact
            self.min = min(self.min, smallest_and_largest.min().item())
            self.max = max(self.max, smallest_and_largest.max().item())
            mean = float(doubles.mean())
            self.squares += float(doubles @ doubles)
            doubles = doubles - mean
            deviations = float(doubles @ doubles)
        self._merge(doubles.size, mean, deviations)

    def _finite(self, doubles: Array) -> Array:
        """The finite elements; the others are counted."""
        nans = int(np.count_nonzero(np.isnan(doubles)))
        finite: Array = doubles[np.isfinite(doubles)]
        self.nans += nans
        self.infs += doubles.size - finite.size - nans
        return finite

    def _merge(self, size: int, mean: float, deviations: float) -> None:
        difference, count = mean - self.mean, self.count + size
        self.squared_deviations += deviations + difference * difference * self.count * size / count
        self.mean += difference * size / count
        self.count = count

    def statistics(self, repeats: int) -> Statistics:
        """The statistics of all elements, each of which occurs so many times."""
        count = self.count * repeats
        return Statistics(
            min=_number(self.min) if count else None,
            max=_number(self.max) if count else None,
            mean=_number(self.mean) if count else None,
            std=_number(math.sqrt(self.squared_deviations * repeats / (count - 1))) if count > 1 else None,
            norm=_number(math.sqrt(self.squares * repeats)) if count else None,
            zeros=self.zeros / self.seen if self.seen else None,
            nans=self.nans * repeats,
            infs=self.infs * repeats,
        )


def _number(value: float) -> float | None:
    """None for what JSON has no number for: a sum of squares beyond float64."""
    return value if math.isfinite(value) else None

"""The bytes of a tensor in the order in which safetensors wants them: row-major, little-endian.

Most tensors lie so already, and are read or copied as they are (`TensorEntry.range`). The others, transposed or
sliced or from a big-endian machine, are rearranged here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cogtools.checkpoint.files import FileRange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from cogtools.checkpoint.tensors import TensorEntry

CHUNK_BYTES = 8 << 20


def tensor_chunks(entry: TensorEntry, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of a tensor, in pieces of whole elements.

    Takes the memory of a piece, and for a tensor that has to be rearranged that of the part of the storage it views.

    Raises:
        CheckpointError: if the file ends before the tensor does, or cannot be read.
    """
    source = entry.range()
    if source is None:
        yield from _rearranged(entry, chunk_bytes)
        return
    step = max(chunk_bytes // entry.dtype.itemsize, 1) * entry.dtype.itemsize
    for position in range(0, source.size_bytes, step):
        yield source.file.read(source.offset_bytes + position, min(step, source.size_bytes - position))


def _rearranged(entry: TensorEntry, chunk_bytes: int) -> Iterator[bytes]:
    import numpy as np

    if not entry.numel:
        return
    file, start, _ = entry.storage.range()
    span = FileRange(file, start + entry.offset_bytes, entry.span_bytes).read()
    if entry.storage.big_endian:
        unit = entry.dtype.swap_bytes
        span = np.frombuffer(span, dtype=f">u{unit}").astype(f"<u{unit}").tobytes()
    itemsize = entry.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        np.frombuffer(span, dtype=f"V{itemsize}"),
        shape=entry.shape or (1,),
        strides=[step * itemsize for step in entry.stride] or (itemsize,),
        writeable=False,
    )
    yield from _pieces(view, chunk_bytes)


def _pieces(view: NDArray[Any], piece_bytes: int) -> Iterator[bytes]:
    """The bytes of a view in row-major order: as many rows at a time as fit, or parts of a row that is larger."""
    row_bytes = view[0].nbytes
    if row_bytes > piece_bytes and view.ndim > 1:
        for row in view:
            yield from _pieces(row, piece_bytes)
        return
    rows = max(piece_bytes // row_bytes, 1)
    for first in range(0, view.shape[0], rows):
        yield view[first : first + rows].tobytes()


_STRUCT_CODES = {
    "float64": "d",
    "float32": "f",
    "float16": "e",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint8": "B",
}


def scalar(entry: TensorEntry) -> float | None:
    """The number that a tensor of one element holds; None if it has more, or is of a dtype without such a number.

    Raises:
        CheckpointError: if the file ends before the tensor does, or cannot be read.
    """
    import struct

    if entry.numel != 1:
        return None
    data = b"".join(tensor_chunks(entry))
    if entry.dtype.name == "bfloat16":
        data, code = b"\0\0" + data, "f"  # a bfloat16 is the upper half of a float32
    elif entry.dtype.name in _STRUCT_CODES:
        code = _STRUCT_CODES[entry.dtype.name]
    else:
        return None
    number: float = struct.unpack(f"<{code}", data)[0]
    return number

"""Safetensors files: a header that names every tensor, then the tensors' bytes.

    8 bytes       the length of the header, little-endian
    the header    JSON: {key: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}
    the rest      the tensors, little-endian and row-major, one after the other without holes

Format: the safetensors README; the limits are those of its Rust reader (safetensors/src/tensor.rs).
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, NoReturn, Protocol

from cogtools.checkpoint.dtypes import BY_SAFETENSORS_CODE
from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.index import Checkpoint
from cogtools.checkpoint.limits import MAX_HEADER_BYTES, MAX_TENSORS
from cogtools.checkpoint.plausible import can_be_shape, can_be_steps
from cogtools.checkpoint.tensors import Storage, TensorEntry, contiguous_strides
from cogtools.errors import CheckpointError
from cogtools.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cogtools.checkpoint.dtypes import DType

FORMAT = "safetensors"
METADATA_KEY = "__metadata__"


def open_safetensors(file: SourceFile) -> Checkpoint:
    """Index a safetensors file.

    Raises:
        CheckpointError: if it is damaged.
    """
    header, data_offset = read_header(file)
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(file, found=f"{METADATA_KEY} with values that are not text")
    if len(header) > MAX_TENSORS:
        raise _too_large(file, f"{len(header):,} tensors", MAX_TENSORS)
    tensors: dict[str, TensorEntry] = {}
    ranges: list[tuple[int, int, str]] = []
    for key, description in header.items():
        tensors[key], begin, end = _tensor(file, data_offset, key, description)
        ranges.append((begin, end, key))
    _refuse_holes(file, sorted(ranges), file.size_bytes - data_offset)
    return Checkpoint(path=file.path, format=FORMAT, files=[file], tensors=tensors, metadata=metadata)


def read_header(file: SourceFile) -> tuple[dict[str, object], int]:
    """The header's entries, and the offset in bytes at which the tensors begin.

    Raises:
        CheckpointError: if the header is not complete, no JSON, or names a key twice.
    """
    header_bytes = int.from_bytes(file.read(0, 8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise _too_large(file, f"a header of {header_bytes:,} bytes", MAX_HEADER_BYTES)
    try:
        text = file.read(8, header_bytes).decode()
        header = json.loads(text, object_pairs_hook=_unique_keys)
        if "\\u" in text:  # refuse half a surrogate pair, as the safetensors library does
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a huge number, a key twice
        _damaged(file, found=f"a header that cannot be read: {error}", cause=error)
    if not isinstance(header, dict):
        _damaged(file, found="a header that is no JSON object")
    return header, 8 + header_bytes


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shown(key)} stands in it twice")
        result[key] = value
    return result


def _tensor(file: SourceFile, data_offset: int, key: str, description: object) -> tuple[TensorEntry, int, int]:
    match description:
        case {"dtype": str(code), "shape": list(sizes), "data_offsets": [begin, end]} if can_be_steps((begin, end)):
            shape = tuple(sizes)
        case _:
            _damaged(file, found=f"tensor {shown(key)} is described as {shown(description)}")
    dtype = BY_SAFETENSORS_CODE.get(code)
    if dtype is None:
        _damaged(file, found=f"tensor {shown(key)} of dtype {shown(code)}", expected=_listed(BY_SAFETENSORS_CODE))
    if not can_be_shape(shape, dtype.itemsize):
        _damaged(file, found=f"tensor {shown(key)} of shape {shown(sizes)}, which no tensor of {code} can have")
    size_bytes = prod(shape) * dtype.itemsize
    if end - begin != size_bytes:
        _damaged(
            file,
            found=f"tensor {shown(key)} of shape {shown(sizes)} at {[begin, end]}",
            expected=f"{size_bytes:,} bytes for that shape and {code}",
        )
    if data_offset + end > file.size_bytes:
        raise file.cut_short(data_offset + begin, size_bytes)
    storage = Storage.at(key, FileRange(file, data_offset + begin, size_bytes))
    return TensorEntry(dtype, shape, contiguous_strides(shape), storage), begin, end


def _refuse_holes(file: SourceFile, ranges: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Refuse tensors that share bytes, and bytes that no tensor has, as the safetensors library does."""
    position = 0
    for begin, end, key in ranges:
        if begin != position:
            _damaged(file, found=f"tensor {shown(key)} at {begin:,}", expected=f"it to begin at {position:,}")
        position = end
    if position != data_bytes:
        _damaged(file, found=f"{data_bytes:,} bytes of tensors", expected=f"{position:,}, as the header says")


def _too_large(file: SourceFile, found: str, limit: int) -> CheckpointError:
    return CheckpointError(
        "this safetensors file says more of itself than any checkpoint does",
        file=file.path,
        found=found,
        expected=f"at most {limit:,}",
    )


def _listed(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


def _damaged(
    file: SourceFile, *, found: str, expected: str | None = None, cause: BaseException | None = None
) -> NoReturn:
    raise CheckpointError(
        "this safetensors file is damaged",
        file=file.path,
        found=found,
        expected=expected,
        hint="copy, download or export it again",
    ) from cause


_ALIGNMENT = 8
"""The safetensors library pads the header to a multiple of this, so that the tensors are aligned."""


class TensorSpec(Protocol):
    """A tensor of a file to be written: what its header says."""

    @property
    def key(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size_bytes(self) -> int: ...


def safetensors_header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file, up to where its tensors begin, in the order given.

    The same tensors and metadata give the same bytes.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for tensor in tensors:
        header[tensor.key] = {
            "dtype": tensor.dtype.safetensors,
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.size_bytes),
        }
        offset += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text

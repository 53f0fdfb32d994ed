"""Safetensors files: a header that names every tensor, then the tensors' bytes.

    8 bytes       the length of the header, little-endian
    the header    JSON: {key: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text} or null}
    the rest      the tensors, little-endian and row-major, one after the other without holes

Format: the safetensors README; the limits are those of its Rust reader (safetensors/src/tensor.rs).
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from cogtools.checkpoint.dtypes import BY_SAFETENSORS_CODE
from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.formats.long_header import METADATA_KEY, CutHeader, cut_metadata
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


def open_safetensors(file: SourceFile) -> Checkpoint:
    """Index a safetensors file.

    Raises:
        CheckpointError: if it is damaged.
    """
    header = read_header(file)
    if len(header.tensors) > MAX_TENSORS:
        raise CheckpointError(
            "this safetensors file has more tensors than are read",
            file=file.path,
            found=f"{len(header.tensors):,} tensors",
            expected=f"at most {MAX_TENSORS:,}: the largest real ones have 3,000",
        )
    tensors: dict[str, TensorEntry] = {}
    ranges: list[tuple[int, int, str]] = []
    for key, description in header.tensors.items():
        tensors[key], begin, end = _tensor(file, header.data_offset, key, description)
        ranges.append((begin, end, key))
    _refuse_holes(file, sorted(ranges), file.size_bytes - header.data_offset)
    return Checkpoint(
        path=file.path,
        format=_format(header),
        files=[file],
        tensors=tensors,
        metadata=header.metadata,
        left_out=header.left_out,
    )


def _format(header: Header) -> str:
    if not header.left_out:
        return FORMAT
    return f"{FORMAT}, without its metadata {shown(next(iter(header.left_out)))}{' …' * (len(header.left_out) > 1)}"


class Header(NamedTuple):
    """What a header says.

    Attributes:
        tensors: the description of each tensor, not yet looked at.
        metadata: the text entries under `__metadata__`.
        left_out: those of them that are too long to be kept, and how many characters they have.
        data_offset: the offset in bytes at which the tensors begin.
    """

    tensors: dict[str, object]
    metadata: dict[str, str]
    left_out: dict[str, int]
    data_offset: int


def read_header(file: SourceFile) -> Header:
    """Read the header of a safetensors file. Of a long one, metadata that is too long is left out.

    Raises:
        CheckpointError: if the header is not complete, not JSON, or names a key twice.
    """
    header_bytes = int.from_bytes(file.read(0, 8), "little")
    try:
        cut = CutHeader(file.read(8, header_bytes), {}, {})
        if header_bytes > MAX_HEADER_BYTES:
            cut = cut_metadata(cut.text)
        if len(cut.text) > MAX_HEADER_BYTES:
            raise _too_long(file, len(cut.text))
        header = _json(cut.text.decode())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, a huge number, a key twice
        _damaged(file, found=f"a header that cannot be read: {error}", cause=error)
    if not isinstance(header, dict):
        _damaged(file, found="a header that is not a JSON object")
    metadata = header.pop(METADATA_KEY, None)
    if metadata is None:  # also where null stands there: the library reads that
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            "the metadata of this safetensors file has values that are not text, which the format does not allow",
            file=file.path,
            hint="save it again with every value of the metadata as text, such as the JSON of it",
        )
    return Header(header, metadata | cut.metadata, cut.left_out, 8 + header_bytes)


def _json(text: str) -> object:
    value = json.loads(text, object_pairs_hook=_unique_keys)
    if "\\u" in text:  # refuse half a surrogate pair, as the safetensors library does
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shown(key)} stands in it twice")
        result[key] = value
    return result


def _too_long(file: SourceFile, size_bytes: int) -> CheckpointError:
    return CheckpointError(
        "the header of this safetensors file is longer than is read",
        file=file.path,
        found=f"{size_bytes:,} bytes beside its {METADATA_KEY}",
        expected=f"at most {MAX_HEADER_BYTES:,}: the largest real ones have 0.2 MB",
        hint="load it with the safetensors library, and save it again",
    )


def _tensor(file: SourceFile, data_offset: int, key: str, description: object) -> tuple[TensorEntry, int, int]:
    match description:
        case {"dtype": str(code), "shape": list(sizes), "data_offsets": [begin, end]} if can_be_steps((begin, end)):
            shape = tuple(sizes)
        case _:
            _damaged(file, found=f"tensor {shown(key)} is described as {shown(description)}")
    dtype = BY_SAFETENSORS_CODE.get(code)
    if dtype is None:
        raise CheckpointError(
            "this safetensors file has a dtype that this version of cogtools does not know",
            file=file.path,
            found=f"tensor {shown(key)} of dtype {shown(code)}",
            expected=_listed(BY_SAFETENSORS_CODE),
            hint="a newer version may know it: pip install --upgrade cogtools",
        )
    if not can_be_shape(shape, dtype.itemsize):
        _damaged(file, found=f"tensor {shown(key)} of shape {shown(sizes)}, which no tensor of {code} can have")
    size_bytes = dtype.size_bytes(prod(shape))
    if end - begin != size_bytes or prod(shape) * dtype.bits % 8:
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

"""Writing a file of `torch.save` with nothing but a state dict of plain tensors, piece by piece and without torch.

    archive/data.pkl        {wrapper: {key: tensor}}, pickle protocol 2
    archive/byteorder       "little"
    archive/data/<number>   the bytes of a tensor, from a multiple of 64 on, so that torch.load can map them
    archive/version         "3"

Everything but the CRC-32s is known from keys, dtypes and shapes. Those stand behind the bytes of a tensor, in a data
descriptor as PyTorch's own writer has them, and in the directory at the end.

`torch.load(weights_only=True)` reads the result: the pickle names `collections.OrderedDict`, torch's storage classes
and `torch._utils._rebuild_tensor_v2`, nothing else.

Not supported: dtypes without a storage class, such as float8.

Format: PyTorch's writer, caffe2/serialize/inline_container.cc; torch/serialization.py (`_save`).
"""

from __future__ import annotations

import pickle
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.formats.signatures import ZIP_MAGIC
from cogtools.checkpoint.formats.zip_archive import (
    DIRECTORY_HEADER,
    DIRECTORY_MAGIC,
    END,
    END64,
    END64_LOCATOR,
    END64_LOCATOR_MAGIC,
    END64_MAGIC,
    END_MAGIC,
    EXTRA_ZIP64,
    IN_EXTRA_ZIP64,
    LOCAL_HEADER,
)
from cogtools.checkpoint.tensors import contiguous_strides

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.formats.safetensors import TensorSpec

ROOT = "archive"
ALIGNMENT_BYTES = 64
VERSION = b"3\n"

_DATA_DESCRIPTOR = 1 << 3  # bit 3 of an entry's flags: its CRC-32 stands behind its bytes
_ZIP_VERSION, _ZIP64_VERSION = 20, 45
_DATE = 1 << 5 | 1  # 1980-01-01: the same content gives the same bytes
_PADDING = 0x4246  # the extra field by which PyTorch's writer moves bytes to where it wants them
_EXTRA_HEADER = struct.Struct("<HH")
_SIZES64 = struct.Struct("<HHQQ")
_DESCRIPTOR_MAGIC = b"PK\x07\x08"


MAX_COUNT = 0xFFFF
"""How many entries 16 bits can count."""


def is_wide(number: int) -> bool:
    """Whether a size or an offset needs 64 bits."""
    return number >= IN_EXTRA_ZIP64


class _Entry(NamedTuple):
    """An entry of the archive.

    Attributes:
        name: its name.
        size_bytes: of its content.
        offset_bytes: where its header begins.
        header: the header, up to where the content begins.
    """

    name: bytes
    size_bytes: int
    offset_bytes: int
    header: bytes

    @property
    def is_large(self) -> bool:
        return is_wide(self.size_bytes)

    @property
    def end(self) -> int:
        """Where the next entry begins: after its content and its data descriptor."""
        return self.offset_bytes + len(self.header) + self.size_bytes + (24 if self.is_large else 16)


class TorchArchive:
    """The bytes of a file of `torch.save`, but for the content of its tensors.

    The file is `start`; then, for each tensor in order, `before` it, its content, what comes `after` it; then `end`.

    Attributes:
        size_bytes: the size of the file.
    """

    def __init__(self, tensors: Sequence[TensorSpec], wrapper: str) -> None:
        """Lay out a file.

        Args:
            tensors: the state dict. Each gets a storage of its own.
            wrapper: the key under which it lies.
        """
        self._entries: list[_Entry] = []
        self._crc32s: list[int] = []
        small = {"data.pkl": _state_dict(tensors, wrapper), "byteorder": b"little", "version": VERSION}
        self.start = b"".join(self._small(name, content) for name, content in small.items())
        self._first = len(self._entries)
        for number, tensor in enumerate(tensors):
            self._add(f"data/{number}", tensor.size_bytes)
        self._directory_offset = self._entries[-1].end
        self.size_bytes = self._directory_offset + len(self._directory([0] * len(self._entries)))

    def _add(self, name: str, size_bytes: int) -> _Entry:
        offset = self._entries[-1].end if self._entries else 0
        encoded = f"{ROOT}/{name}".encode()
        is_large = is_wide(size_bytes)
        shown_size = IN_EXTRA_ZIP64 if is_large else size_bytes
        extra = _SIZES64.pack(EXTRA_ZIP64, 16, size_bytes, size_bytes) if is_large else b""
        unpadded = offset + LOCAL_HEADER.size + len(encoded) + len(extra) + _EXTRA_HEADER.size
        padding = -unpadded % ALIGNMENT_BYTES
        extra += _EXTRA_HEADER.pack(_PADDING, padding) + b"Z" * padding
        version = _ZIP64_VERSION if is_large else _ZIP_VERSION
        sizes = (0, shown_size, shown_size, len(encoded), len(extra))
        header = LOCAL_HEADER.pack(ZIP_MAGIC, version, _DATA_DESCRIPTOR, 0, 0, _DATE, *sizes)
        entry = _Entry(encoded, size_bytes, offset, header + encoded + extra)
        self._entries.append(entry)
        return entry

    def _small(self, name: str, content: bytes) -> bytes:
        entry = self._add(name, len(content))
        return entry.header + content + self._ended(entry, zlib.crc32(content))

    def before(self, number: int) -> bytes:
        """What stands before the content of a tensor."""
        return self._entries[self._first + number].header

    def after(self, number: int, crc32: int) -> bytes:
        """What stands behind the content of a tensor, which has this CRC-32. Tensors end in their order."""
        return self._ended(self._entries[self._first + number], crc32)

    def _ended(self, entry: _Entry, crc32: int) -> bytes:
        self._crc32s.append(crc32)
        sizes = struct.Struct("<QQ" if entry.is_large else "<LL").pack(entry.size_bytes, entry.size_bytes)
        return _DESCRIPTOR_MAGIC + struct.pack("<L", crc32) + sizes

    def end(self) -> bytes:
        """The directory, when all tensors have ended."""
        return self._directory(self._crc32s)

    def _directory(self, crc32s: Sequence[int]) -> bytes:
        listed = b"".join(_listed(entry, crc32) for entry, crc32 in zip(self._entries, crc32s, strict=True))
        count, size, offset = len(self._entries), len(listed), self._directory_offset
        if count <= MAX_COUNT and not is_wide(offset):
            return listed + END.pack(END_MAGIC, 0, 0, count, count, size, offset, 0)
        # The size in this record is of what follows its first two fields.
        body = (END64.size - 12, _ZIP64_VERSION, _ZIP64_VERSION, 0, 0, count, count, size, offset)
        locator = END64_LOCATOR.pack(END64_LOCATOR_MAGIC, 0, offset + size, 1)
        last = END.pack(END_MAGIC, 0, 0, MAX_COUNT, MAX_COUNT, IN_EXTRA_ZIP64, IN_EXTRA_ZIP64, 0)
        return listed + END64.pack(END64_MAGIC, *body) + locator + last


def _listed(entry: _Entry, crc32: int) -> bytes:
    """An entry in the directory: what does not fit into 32 bits stands in an extra field."""
    numbers = (entry.size_bytes, entry.size_bytes, entry.offset_bytes)
    wide = [number for number in numbers if is_wide(number)]
    narrow = [IN_EXTRA_ZIP64 if is_wide(number) else number for number in numbers]
    extra = struct.pack(f"<HH{len(wide)}Q", EXTRA_ZIP64, 8 * len(wide), *wide) if wide else b""
    version = _ZIP64_VERSION if wide else _ZIP_VERSION
    lengths = (len(entry.name), len(extra), 0, 0, 0)
    fields = (version, version, _DATA_DESCRIPTOR, 0, 0, _DATE, crc32, narrow[0], narrow[1], *lengths, 0, narrow[2])
    return DIRECTORY_HEADER.pack(DIRECTORY_MAGIC, *fields) + entry.name + extra


# The pickle


def _state_dict(tensors: Sequence[TensorSpec], wrapper: str) -> bytes:
    """{wrapper: {key: tensor}} as `torch.save` pickles it; the number of a tensor is the name of its storage."""
    return b"".join(
        [
            pickle.PROTO + b"\x02",
            pickle.EMPTY_DICT + pickle.MARK + _text(wrapper) + pickle.EMPTY_DICT + pickle.MARK,
            *(_text(tensor.key) + b"".join(_tensor(number, tensor)) for number, tensor in enumerate(tensors)),
            pickle.SETITEMS + pickle.SETITEMS + pickle.STOP,
        ]
    )


def _tensor(number: int, tensor: TensorSpec) -> Iterator[bytes]:
    """`_rebuild_tensor_v2(storage, 0, shape, strides, requires_grad=False, hooks=OrderedDict())`."""
    yield _name("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
    yield pickle.MARK + _text("storage") + _name("torch", _storage_class(tensor.dtype)) + _text(str(number))
    numel = tensor.size_bytes // tensor.dtype.itemsize
    yield _text("cpu") + _integer(numel) + pickle.TUPLE + pickle.BINPERSID
    yield _integer(0) + _integers(tensor.shape) + _integers(contiguous_strides(tensor.shape)) + pickle.NEWFALSE
    yield _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    yield pickle.TUPLE + pickle.REDUCE


def _storage_class(dtype: DType) -> str:
    if dtype.storage_class is None:
        raise ValueError(f"torch.save has no storage class for {dtype.name}")
    return dtype.storage_class


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<L", len(encoded)) + encoded


def _integer(number: int) -> bytes:
    if number < 1 << 31:
        return pickle.BININT + struct.pack("<l", number)
    length = number.bit_length() // 8 + 1
    return pickle.LONG1 + bytes([length]) + number.to_bytes(length, "little")


def _integers(numbers: Sequence[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, numbers)) + pickle.TUPLE

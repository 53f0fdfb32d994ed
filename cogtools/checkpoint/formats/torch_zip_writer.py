"""Writing a file of `torch.save`: a zip archive of plain tensors, streamed, without torch.

    <root>/data.pkl                  {wrapper: OrderedDict of the tensors}, pickle protocol 2
    <root>/.format_version           1
    <root>/.storage_alignment        64: every entry's bytes begin at a multiple of it
    <root>/byteorder                 little
    <root>/data/0, 1 …               the bytes of each tensor, which has a storage of its own
    <root>/version                   3
    <root>/.data/serialization_id    40 digits

Everything has its place before the first byte is written. The CRC-32s are computed by a thread beside the copying and
are filled in last: entries have them behind their bytes, in a data descriptor, as PyTorch's writer has it.

The same tensors give the same bytes. Such a file loads with `torch.load(weights_only=True)`, mapped or not.

Format: PyTorch's writer, caffe2/serialize/inline_container.cc; PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import hashlib
import pickle
import queue
import struct
import threading
import zlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cogtools.checkpoint.files import FileRange
from cogtools.checkpoint.tensors import contiguous_strides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cogtools.checkpoint.formats.safetensors import TensorSpec

_ROOT = "archive"
_ALIGNMENT = 64
_FLAGS = 0x0808  # a data descriptor follows the bytes; names are UTF-8

_IN_ZIP64 = 0xFFFFFFFF
"""Sizes and offsets from here on stand in fields of zip64."""

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DIRECTORY_HEADER = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CRC32_OFFSET = 4
"""Where in a data descriptor the CRC-32 stands."""

_CHUNK_BYTES = 1 << 20
_WAITING = 8
"""How many parts may wait for their CRC-32: what was computed is held in memory till then."""


class Output(Protocol):
    """What an archive is written to."""

    def write(self, data: bytes) -> None:
        """Append bytes."""

    def copy(self, source: FileRange) -> None:
        """Append a range of another file."""

    def write_at(self, offset_bytes: int, data: bytes) -> None:
        """Write over what was appended."""


class _Entry(NamedTuple):
    """An entry and its place.

    Attributes:
        name: its name.
        offset: where its header begins.
        header: that, and the padding up to its bytes.
        content: its bytes; None if they are a tensor's.
        size_bytes: how many they are.
    """

    name: bytes
    offset: int
    header: bytes
    content: bytes | None
    size_bytes: int

    @property
    def is_large(self) -> bool:
        """Whether its size stands in fields of zip64."""
        return self.size_bytes >= _IN_ZIP64

    @property
    def descriptor_offset(self) -> int:
        """Where its data descriptor begins."""
        return self.offset + len(self.header) + self.size_bytes

    @property
    def end(self) -> int:
        """Where the next entry begins."""
        return self.descriptor_offset + len(self.descriptor(0))

    def descriptor(self, crc32: int) -> bytes:
        """What follows its bytes."""
        sizes = "2Q" if self.is_large else "2L"
        return struct.pack(f"<4sL{sizes}", b"PK\x07\x08", crc32, self.size_bytes, self.size_bytes)

    def directory_header(self, crc32: int) -> bytes:
        """What the directory says of it."""
        fields = [self.size_bytes] * 2 * self.is_large + [self.offset] * (self.offset >= _IN_ZIP64)
        extra = struct.pack(f"<2H{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
        size, offset = min(self.size_bytes, _IN_ZIP64), min(self.offset, _IN_ZIP64)
        numbers = (0, 0, _FLAGS, 0, 0, 0, crc32, size, size, len(self.name), len(extra), 0, 0, 0, 0, offset)
        return _DIRECTORY_HEADER.pack(b"PK\x01\x02", *numbers) + self.name + extra


class TorchZip:
    """A file of `torch.save` that is laid out and not yet written.

        archive = TorchZip(tensors, wrapper="module")
        output.reserve(archive.size_bytes)
        archive.write(output, contents)

    Args:
        tensors: what it holds, in this order. Their dtypes must be those that have a typed storage.
        wrapper: the key under which the tensors lie; None: they are all that the pickle holds.

    Attributes:
        size_bytes: of the whole file.
    """

    def __init__(self, tensors: Sequence[TensorSpec], *, wrapper: str | None = "module") -> None:
        content = _pickled(tensors, wrapper)
        identity = int.from_bytes(hashlib.sha256(content).digest(), "big") % 10**40
        small = [("data.pkl", content), (".format_version", b"1"), (".storage_alignment", b"%d" % _ALIGNMENT)]
        last = [("version", b"3\n"), (".data/serialization_id", b"%040d" % identity)]
        self._entries: list[_Entry] = []
        for name, data in [*small, ("byteorder", b"little")]:
            self._add(name, data, len(data))
        for number, tensor in enumerate(tensors):
            self._add(f"data/{number}", None, tensor.size_bytes)
        for name, data in last:
            self._add(name, data, len(data))
        self.size_bytes = self._entries[-1].end + len(self._directory([0] * len(self._entries)))

    def _add(self, name: str, content: bytes | None, size_bytes: int) -> None:
        offset = self._entries[-1].end if self._entries else 0
        encoded = f"{_ROOT}/{name}".encode()
        self._entries.append(_Entry(encoded, offset, _local_header(encoded, offset, size_bytes), content, size_bytes))

    def write(
        self,
        output: Output,
        contents: Iterable[Iterable[FileRange | bytes]],
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Write all of it.

        Args:
            output: where to, from its beginning.
            contents: the bytes of each tensor, in the order in which they were given, in parts.
            advance: called with the bytes of tensors that were written, as they are.

        Raises:
            CogtoolsError: if it cannot be read or written.
        """
        following = iter(contents)
        with _Crc32s(len(self._entries)) as crc32s:
            for number, entry in enumerate(self._entries):
                output.write(entry.header)
                for part in next(following) if entry.content is None else (entry.content,):
                    if isinstance(part, FileRange):
                        output.copy(part)
                    else:
                        output.write(part)
                    crc32s.add(number, part)
                    if entry.content is None:
                        advance(part.size_bytes if isinstance(part, FileRange) else len(part))
                output.write(entry.descriptor(0))
            found = crc32s.finish()
        for entry, crc32 in zip(self._entries, found, strict=True):
            output.write_at(entry.descriptor_offset + _CRC32_OFFSET, struct.pack("<L", crc32))
        output.write(self._directory(found))

    def _directory(self, crc32s: Sequence[int]) -> bytes:
        """The directory, and the ends after it."""
        headers = [entry.directory_header(crc32) for entry, crc32 in zip(self._entries, crc32s, strict=True)]
        start, size, count = self._entries[-1].end, sum(map(len, headers)), len(headers)
        end64 = _END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, size, start)
        locator = _END64_LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
        shown = min(count, 0xFFFF)
        end = _END.pack(b"PK\x05\x06", 0, 0, shown, shown, size, min(start, _IN_ZIP64), 0)
        return b"".join([*headers, end64, locator, end])


def _local_header(name: bytes, offset: int, size_bytes: int) -> bytes:
    """An entry's own header, padded so that its bytes are aligned."""
    zip64 = struct.pack("<2H2Q", 1, 16, 0, 0) if size_bytes >= _IN_ZIP64 else b""
    size = _IN_ZIP64 if zip64 else 0
    before = offset + _LOCAL_HEADER.size + len(name) + len(zip64) + 4
    padding = struct.pack("<2sH", b"FB", -before % _ALIGNMENT) + b"Z" * (-before % _ALIGNMENT)
    fixed = _LOCAL_HEADER.pack(b"PK\x03\x04", 0, _FLAGS, 0, 0, 0, 0, size, size, len(name), len(zip64) + len(padding))
    return fixed + name + zip64 + padding


class _Crc32s:
    """Computes the CRC-32s of entries in a thread, from what is added part by part.

    Ranges of files are read a second time, which is faster than copying through this process.
    """

    def __init__(self, count: int) -> None:
        self._values = [0] * count
        self._parts: queue.Queue[tuple[int, FileRange | bytes] | None] = queue.Queue(_WAITING)
        self._error: Exception | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="crc32")

    def __enter__(self) -> _Crc32s:
        try:
            if self._thread is not None:
                self._thread.start()
        except RuntimeError:  # no more threads: `add` does it
            self._thread = None
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def add(self, number: int, part: FileRange | bytes) -> None:
        """Go on with the CRC-32 of an entry."""
        if self._thread is None:
            self._update(number, part)
        else:
            self._parts.put((number, part))

    def finish(self) -> list[int]:
        """Wait for all of them.

        Raises:
            CheckpointError: if a range cannot be read.
        """
        self._end()
        if self._error is not None:
            raise self._error
        return self._values

    def _end(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._parts.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._parts.get()) is not None:
            if self._error is None:
                try:
                    self._update(*item)
                except Exception as error:  # noqa: BLE001 - raised again by `finish`, in the thread that waits
                    self._error = error

    def _update(self, number: int, part: FileRange | bytes) -> None:
        if not isinstance(part, FileRange):
            self._values[number] = zlib.crc32(part, self._values[number])
            return
        file, start, size_bytes = part
        for position in range(0, size_bytes, _CHUNK_BYTES):
            data = file.read(start + position, min(_CHUNK_BYTES, size_bytes - position))
            self._values[number] = zlib.crc32(data, self._values[number])


def _pickled(tensors: Sequence[TensorSpec], wrapper: str | None) -> bytes:
    """The pickle, as `torch.save` writes one of protocol 2."""
    writer = _PickleWriter()
    writer.put(pickle.PROTO, b"\x02")
    if wrapper is not None:
        writer.put(pickle.EMPTY_DICT)
        writer.text(wrapper)
    writer.empty_ordered_dict()
    if tensors:
        writer.put(pickle.MARK)
        for number, tensor in enumerate(tensors):
            writer.text(tensor.key)
            writer.tensor(tensor, str(number))
        writer.put(pickle.SETITEMS)
    if wrapper is not None:
        writer.put(pickle.SETITEM)
    writer.put(pickle.STOP)
    return bytes(writer.content)


class _PickleWriter:
    """Writes the instructions of a pickle."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._globals: dict[str, int] = {}

    def put(self, instruction: bytes, argument: bytes = b"") -> None:
        self.content += instruction + argument

    def text(self, value: str) -> None:
        encoded = value.encode()
        self.put(pickle.BINUNICODE, struct.pack("<L", len(encoded)) + encoded)

    def number(self, value: int) -> None:
        if value < 2**31:
            self.put(pickle.BININT, struct.pack("<l", value))
        else:
            encoded = pickle.encode_long(value)
            self.put(pickle.LONG1, bytes([len(encoded)]) + encoded)

    def numbers(self, values: Iterable[int]) -> None:
        self.put(pickle.MARK)
        for value in values:
            self.number(value)
        self.put(pickle.TUPLE)

    def name(self, module: str, name: str) -> None:
        """A global: written out once, then taken from the memo."""
        known = self._globals.get(name)
        if known is None:
            self._globals[name] = len(self._globals)
            self.put(pickle.GLOBAL, f"{module}\n{name}\n".encode())
            self.put(pickle.BINPUT, bytes([self._globals[name]]))
        else:
            self.put(pickle.BINGET, bytes([known]))

    def empty_ordered_dict(self) -> None:
        self.name("collections", "OrderedDict")
        self.put(pickle.EMPTY_TUPLE)
        self.put(pickle.REDUCE)

    def tensor(self, tensor: TensorSpec, storage: str) -> None:
        """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)`."""
        if tensor.dtype.storage_class is None:
            raise ValueError(f"a dtype without a typed storage: {tensor.dtype}")
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.put(pickle.MARK)
        self.put(pickle.MARK)
        self.text("storage")
        self.name("torch", tensor.dtype.storage_class)
        self.text(storage)
        self.text("cpu")
        self.number(tensor.size_bytes // tensor.dtype.itemsize)
        self.put(pickle.TUPLE)
        self.put(pickle.BINPERSID)
        self.number(0)
        self.numbers(tensor.shape)
        self.numbers(contiguous_strides(tensor.shape))
        self.put(pickle.NEWFALSE)
        self.empty_ordered_dict()
        self.put(pickle.TUPLE)
        self.put(pickle.REDUCE)

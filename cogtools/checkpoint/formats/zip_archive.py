"""Zip archives: their directory, and where the bytes of an entry lie, unpacked.

The directory at the end of the file tells each entry's place, size and CRC-32. Where its bytes begin is told by its own
header only, which may be padded further than the directory says; that header is read when the bytes are needed.
Checkpoints pass 4 GiB, so zip64 is ordinary.

Not supported: encryption, archives in several parts, compression other than deflate.

Format: PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.formats.signatures import ZIP_MAGIC
from cogtools.checkpoint.limits import MAX_DIRECTORY_BYTES
from cogtools.errors import CheckpointError
from cogtools.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_CHUNK_BYTES = 1 << 20

_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 1  # bit 0 of an entry's flags

DIRECTORY_MAGIC, END_MAGIC = b"PK\x01\x02", b"PK\x05\x06"
END64_MAGIC, END64_LOCATOR_MAGIC = b"PK\x06\x06", b"PK\x06\x07"
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
DIRECTORY_HEADER = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
_END64_HEAD_BYTES = 12  # its magic and its size, which is that of what follows
_MAX_COMMENT_BYTES = 0xFFFF
_MOST_PADDING_BYTES = 256
"""What PyTorch puts into an entry's own header at most, to align what follows: 64 bytes, and the sizes of zip64."""
EXTRA_ZIP64 = 1
IN_EXTRA_ZIP64 = 0xFFFFFFFF


class ZipEntry(NamedTuple):
    """One entry, as the directory at the end of the archive describes it."""

    name: str
    flags: int
    method: int
    crc32: int
    packed_bytes: int
    size_bytes: int
    header_offset: int


class ZipArchive(NamedTuple):
    """A zip archive's entries, by name. `has_crc32` is false if its writer left every CRC-32 at zero."""

    file: SourceFile
    entries: dict[str, ZipEntry]
    has_crc32: bool

    def span(self, entry: ZipEntry) -> FileRange:
        """A range that has an entry with its own header, unless that is longer than any that is known.

        No header is read for that: where an entry's bytes begin is not known before.
        """
        start = entry.header_offset
        most = LOCAL_HEADER.size + len(entry.name.encode()) + _MOST_PADDING_BYTES + entry.packed_bytes
        return FileRange(self.file, start, min(most, self.file.size_bytes - start))


# Bytes of entries


def packed_range(archive: ZipArchive, entry: ZipEntry) -> FileRange:
    """Where the bytes of an entry lie, packed as they are.

    Raises:
        CheckpointError: if the entry's own header does not agree with the directory, or it is encrypted.
    """
    if entry.flags & _ENCRYPTED or entry.method not in (_STORED, _DEFLATED):
        raise CheckpointError(
            f"entry {shown(entry.name)} is packed in a way that is not supported",
            file=archive.file.path,
            found="encryption" if entry.flags & _ENCRYPTED else f"zip method {entry.method}",
            expected="stored or deflated entries",
            hint="unpack the archive and pack it again without compression (zip -0)",
        )
    header = archive.file.read(entry.header_offset, LOCAL_HEADER.size)
    magic, *_, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    name_offset = entry.header_offset + LOCAL_HEADER.size
    if magic != ZIP_MAGIC or _decoded(archive.file.read(name_offset, name_bytes)) != entry.name:
        raise damaged(
            archive.file, found=f"no entry {shown(entry.name)} at {entry.header_offset:,}, where the directory has it"
        )
    return FileRange(archive.file, name_offset + name_bytes + extra_bytes, entry.packed_bytes)


def unpacked_range(archive: ZipArchive, entry: ZipEntry) -> FileRange:
    """Where the bytes of an entry lie unpacked: in the archive or, if it is deflated, in a temporary file.

    Raises:
        CheckpointError: if it cannot be unpacked.
    """
    packed = packed_range(archive, entry)
    if entry.method == _STORED:
        return packed
    try:
        return archive.file.unpacked(_inflated(archive, entry))
    except OSError as error:
        raise CheckpointError(
            f"entry {shown(entry.name)} cannot be unpacked into a temporary file: {error.strerror or error}",
            file=archive.file.path,
            expected=f"room for {entry.size_bytes:,} bytes in the folder for temporary files",
            hint="free some space, or set TMPDIR to a folder that has it",
        ) from error


def _inflated(archive: ZipArchive, entry: ZipEntry) -> Iterator[bytes]:
    """The bytes of a deflated entry; never more than the directory says there are."""
    packed = packed_range(archive, entry)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    offset, end = packed.offset_bytes, packed.offset_bytes + packed.size_bytes
    produced = 0
    try:
        while not inflater.eof and produced <= entry.size_bytes:
            data = inflater.unconsumed_tail
            if not data and offset < end:
                data = archive.file.read(offset, min(_CHUNK_BYTES, end - offset))
                offset += len(data)
            # Without further input there may be output still: what did not fit into the last chunk.
            chunk = inflater.decompress(data, _CHUNK_BYTES)
            if not data and not chunk:
                break
            produced += len(chunk)
            yield chunk
    except zlib.error as error:
        raise damaged(archive.file, found=f"entry {shown(entry.name)} cannot be unpacked: {error}") from error
    if not inflater.eof or produced != entry.size_bytes:
        other = "more" if produced > entry.size_bytes else "other"
        raise damaged(
            archive.file,
            found=f"entry {shown(entry.name)} unpacks to {other} than it says",
            expected=f"{entry.size_bytes:,} bytes",
        )


def read_small(archive: ZipArchive, name: str, limit_bytes: int) -> bytes:
    """All bytes of an entry, checked against its CRC-32 where there is one."""
    entry = archive.entries[name]
    if entry.size_bytes > limit_bytes:
        raise CheckpointError(
            f"entry {shown(name)} is too long to be what its name says",
            file=archive.file.path,
            found=f"{entry.size_bytes:,} bytes",
            expected=f"at most {limit_bytes:,}",
        )
    deflated = entry.method == _DEFLATED
    data = b"".join(_inflated(archive, entry)) if deflated else packed_range(archive, entry).read()
    if archive.has_crc32 and zlib.crc32(data) != entry.crc32:
        raise damaged(
            archive.file,
            found=f"entry {shown(name)} with CRC-32 {zlib.crc32(data):08x}",
            expected=f"CRC-32 {entry.crc32:08x}, as the archive records it",
        )
    return data


# The directory


def read_directory(file: SourceFile) -> ZipArchive:
    """Read the directory at the end of a zip archive.

    Raises:
        CheckpointError: if there is none, or it contradicts itself.
    """
    count, size_bytes, offset_bytes, end = _find_directory(file)
    if offset_bytes + size_bytes > file.size_bytes:
        raise file.cut_short(offset_bytes, size_bytes)
    if offset_bytes + size_bytes != end:
        raise _bytes_between(file, end - size_bytes - offset_bytes)
    if size_bytes > MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            "this zip archive has more entries than any checkpoint",
            file=file.path,
            found=f"a directory of {size_bytes:,} bytes",
            expected=f"at most {MAX_DIRECTORY_BYTES:,}",
        )
    entries: dict[str, ZipEntry] = {}
    for entry in _directory_entries(file, file.read(offset_bytes, size_bytes), count):
        if entry.name in entries:
            raise damaged(file, found=f"two entries {shown(entry.name)}: readers disagree on which one counts")
        entries[entry.name] = entry
    _refuse_overlaps(file, entries.values(), offset_bytes)
    first = min((entry.header_offset for entry in entries.values()), default=0)
    if first:
        raise _bytes_between(file, first)
    return ZipArchive(file, entries, has_crc32=any(entry.crc32 for entry in entries.values()))


def _bytes_between(file: SourceFile, count: int) -> CheckpointError:
    """The error for an archive that is not all of its file: readers disagree on what such a file holds."""
    if count < 0:
        return damaged(file, found="a directory that is not where the archive says it is")
    return CheckpointError(
        "this file is more than one zip archive",
        file=file.path,
        found=f"{count:,} bytes that its last archive does not count, such as other archives before it",
        expected="the file of one torch.save",
        hint="a part of a distributed checkpoint looks like this: convert the whole of that with "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch; any other file: copy or download it again",
    )


def _find_directory(file: SourceFile) -> tuple[int, int, int, int]:
    """How many entries the directory has, its size and its offset in bytes, and the offset at which it has to end."""
    tail_bytes = min(file.size_bytes, END.size + _MAX_COMMENT_BYTES)
    tail = file.read(file.size_bytes - tail_bytes, tail_bytes)
    at = tail.rfind(END_MAGIC)
    if at < 0 or at + END.size > len(tail):
        raise CheckpointError(
            "the file is cut short: this zip archive has no directory at its end",
            file=file.path,
            found=f"{file.size_bytes:,} bytes",
            hint="copy or download it again; a checkpoint that is still being written looks like this too",
        )
    _, _, _, _, count, size_bytes, offset_bytes, comment_bytes = END.unpack_from(tail, at)
    end_offset = file.size_bytes - tail_bytes + at
    if end_offset + END.size + comment_bytes != file.size_bytes:
        raise damaged(file, found="bytes after the end of the zip archive")
    directory_end = end_offset
    if at >= END64_LOCATOR.size:
        magic, _, end64_offset, _ = END64_LOCATOR.unpack_from(tail, at - END64_LOCATOR.size)
        if magic == b"PK\x06\x07":
            record = END64.unpack(file.read(end64_offset, END64.size))
            if record[0] != b"PK\x06\x06":
                raise damaged(file, found="no zip64 record where the archive says it is")
            locator_offset, record_end = end_offset - END64_LOCATOR.size, end64_offset + _END64_HEAD_BYTES + record[1]
            if record_end != locator_offset:
                raise _bytes_between(file, locator_offset - record_end)
            count, size_bytes, offset_bytes = record[7:]
            directory_end = end64_offset
    return count, size_bytes, offset_bytes, directory_end


def _directory_entries(file: SourceFile, directory: bytes, count: int) -> Iterator[ZipEntry]:
    position = 0
    for _ in range(count):
        if position + DIRECTORY_HEADER.size > len(directory):
            raise damaged(file, found=f"a directory that ends before its {count:,} entries do")
        fields = DIRECTORY_HEADER.unpack_from(directory, position)
        magic, _, _, flags, method, _, _, crc32, packed, size, name_bytes, extra_bytes, comment_bytes = fields[:13]
        header_offset = fields[-1]
        name_at = position + DIRECTORY_HEADER.size
        extra_at = name_at + name_bytes
        position = extra_at + extra_bytes + comment_bytes
        if magic != DIRECTORY_MAGIC or position > len(directory):
            raise damaged(file, found="a broken entry in the zip directory")
        if IN_EXTRA_ZIP64 in (packed, size, header_offset):
            extra = directory[extra_at : extra_at + extra_bytes]
            size, packed, header_offset = _zip64_fields(file, extra, (size, packed, header_offset))
        if method == _STORED and packed != size:
            raise damaged(file, found=f"a stored entry of {size:,} bytes that takes {packed:,}")
        name = _decoded(directory[name_at:extra_at])
        yield ZipEntry(name, flags, method, crc32, packed, size, header_offset)
    if position != len(directory):
        raise damaged(file, found=f"a directory with more than its {count:,} entries")


def _zip64_fields(file: SourceFile, extra: bytes, fields: tuple[int, int, int]) -> tuple[int, int, int]:
    """The size, packed size and offset: those that do not fit into 32 bits stand in the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == EXTRA_ZIP64:
            missing = sum(value == IN_EXTRA_ZIP64 for value in fields)
            if length < 8 * missing or position + 4 + length > len(extra):
                break
            wide = iter(struct.unpack_from(f"<{missing}Q", extra, position + 4))
            size, packed, offset = (next(wide) if value == IN_EXTRA_ZIP64 else value for value in fields)
            return size, packed, offset
        position += 4 + length
    raise damaged(file, found="an entry whose 64-bit size or offset is missing")


def _refuse_overlaps(file: SourceFile, entries: Iterable[ZipEntry], directory_offset: int) -> None:
    """Refuse entries that share bytes, or reach out of the archive: that is how zip bombs are made."""
    spans = sorted(
        (entry.header_offset, entry.header_offset + LOCAL_HEADER.size + entry.packed_bytes) for entry in entries
    )
    spans.append((directory_offset, directory_offset))
    for (_, end), (next_start, _) in pairwise(spans):
        if end > next_start:
            raise damaged(file, found=f"an entry that ends at {end:,}, where another starts at {next_start:,}")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def damaged(file: SourceFile, *, found: str, expected: str | None = None) -> CheckpointError:
    """The error for an archive that contradicts itself or its format."""
    return CheckpointError(
        "this zip archive is damaged",
        file=file.path,
        found=found,
        expected=expected,
        hint="copy or download it again",
    )

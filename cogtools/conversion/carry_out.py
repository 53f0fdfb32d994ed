"""Carrying out a plan: byte ranges of the checkpoint go into files, and what is computed comes between.

The CRC-32s that the checkpoint records are computed beside the copying: of a file of this machine from what is read a
second time, so that it must not have changed in between; of others from what is fetched.
"""

from __future__ import annotations

import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.files import FileRange
from cogtools.checkpoint.gather import CHUNK_BYTES, tensor_chunks
from cogtools.conversion.crc32 import Crc32Check
from cogtools.conversion.fetching import Fetching
from cogtools.conversion.output import AtomicFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.formats.torch_zip_writer import TorchArchive
    from cogtools.checkpoint.tensors import Storage
    from cogtools.conversion.arithmetic import Computed
    from cogtools.conversion.output import AtomicFolder, GrowingFile
    from cogtools.conversion.plan import Planned
    from cogtools.conversion.upload import Upload


class Written(NamedTuple):
    """What is known of an output only when it is written.

    Attributes:
        largest_relative_error: of any tensor, where arithmetic changed values; None where nothing was computed.
        sha256: of the file, if asked for.
        unchecked: how many storages have a CRC-32 that could not be compared, as parts of them only were needed.
    """

    largest_relative_error: float | None = None
    sha256: str | None = None
    unchecked: int = 0


class PlannedFile(NamedTuple):
    """A file of an output.

    Attributes:
        path: its name; in an output that is a folder, with the folders before it that it lies in.
        head: what comes before the tensors; all of it, where there are none.
        tensors: its tensors, in order.
        archive: what stands around the tensors of a file of `torch.save`, instead of the head.
    """

    path: str
    head: bytes = b""
    tensors: tuple[Planned, ...] = ()
    archive: TorchArchive | None = None

    @property
    def size_bytes(self) -> int:
        """Its size."""
        if self.archive is not None:
            return self.archive.size_bytes
        return len(self.head) + sum(tensor.size_bytes for tensor in self.tensors)


def write(
    output: AtomicFile | AtomicFolder | Upload,
    files: Sequence[PlannedFile],
    sources: Iterable[SourceFile],
    progress: Callable[[int, int], None] | None,
    *,
    sha256: bool,
) -> Written:
    """Write an output, and publish it only when the checkpoint's CRC-32s are known to be right.

    Args:
        output: a file, or the folder of several; on this machine or in a store.
        files: the file, or what is in the folder.
        sources: the files that are read: none may have changed meanwhile.
        progress: called with the bytes written so far and the bytes in all.
        sha256: compute the SHA-256 of the file of tensors.

    Raises:
        CogtoolsError: if it cannot be done. The target is then as it was before.
    """
    size_bytes = sum(file.size_bytes for file in files)
    tensors = [tensor for file in files for tensor in file.tensors]
    computed = _computed(tensors)
    done, digest = 0, None
    with output, Crc32Check(storages_of(tensors)) as check, Fetching(tensors, check) as fetching:
        for file in files:
            with _begun(output, file) as growing:
                growing.reserve(file.size_bytes)
                for part in _parts(file, computed, fetching):
                    if isinstance(part, FileRange):
                        growing.copy(part)
                        done += part.size_bytes
                    else:
                        growing.write(part)
                        done += len(part)
                    if progress is not None:
                        progress(done, size_bytes)
                growing.sync()
                if sha256 and file.tensors:
                    digest = growing.sha256()
        check.finish()
        for source in sources:
            source.refuse_changed()
        output.publish()
    return Written(max(computed.errors, default=None) if computed is not None else None, digest, len(check.unchecked))


@contextmanager
def _begun(output: AtomicFile | AtomicFolder | Upload, file: PlannedFile) -> Iterator[GrowingFile]:
    """The file to write to: the output itself, or one in its folder, which is closed at the end."""
    if isinstance(output, AtomicFile):
        yield output
        return
    with output.create(file.path) as growing:
        yield growing


def _parts(file: PlannedFile, computed: Computed | None, fetching: Fetching) -> Iterator[FileRange | bytes]:
    """The bytes of a file, in order."""
    archive = file.archive
    yield file.head if archive is None else archive.start
    for number, tensor in enumerate(file.tensors):
        if archive is None:
            yield from _content(tensor, computed, fetching)
            continue
        yield archive.before(number)
        crc32 = 0
        for part in _content(tensor, computed, fetching):
            for chunk in _chunks(part):
                crc32 = zlib.crc32(chunk, crc32)
                yield chunk
        yield archive.after(number, crc32)
    if archive is not None:
        yield archive.end()


def _chunks(part: FileRange | bytes) -> Iterator[bytes]:
    """The bytes of a part of a tensor, as they are needed to compute with."""
    if not isinstance(part, FileRange):
        yield part
        return
    for position in range(0, part.size_bytes, CHUNK_BYTES):
        yield part.file.read(part.offset_bytes + position, min(CHUNK_BYTES, part.size_bytes - position))


def storages_of(tensors: Iterable[Planned]) -> list[Storage]:
    """The storages that planned tensors view, each once."""
    return list({id(storage): storage for tensor in tensors for storage in tensor.storages}.values())


def _computed(tensors: Iterable[Planned]) -> Computed | None:
    """What computes the tensors that ask for it; None, and nothing imported, if none does."""
    if all(tensor.compute is None for tensor in tensors):
        return None
    from cogtools.conversion.arithmetic import Computed

    return Computed()


def _content(tensor: Planned, computed: Computed | None, fetching: Fetching) -> Iterator[FileRange | bytes]:
    """The bytes of a tensor: ranges of the checkpoint where they can be copied as they are."""
    with fetching.at_hand(tensor):
        yield from _content_at_hand(tensor, computed)


def _content_at_hand(tensor: Planned, computed: Computed | None) -> Iterator[FileRange | bytes]:
    if tensor.compute is not None and computed is not None:
        yield computed.content(tensor)
        return
    for piece in tensor.pieces:
        if isinstance(piece, bytes):
            yield piece
            continue
        source = piece.range()
        if source is None:
            yield from tensor_chunks(piece)
        else:
            yield source

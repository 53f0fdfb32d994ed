"""Carrying out a plan: byte ranges of the checkpoint go into files, and what is computed comes between.

The CRC-32s that the checkpoint records are computed beside the copying: of a file of this machine from what is read a
second time, so that it must not have changed in between; of others from what is fetched.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

from cogtools.checkpoint.files import FileRange
from cogtools.checkpoint.gather import CHUNK_BYTES, tensor_chunks
from cogtools.conversion.crc32 import Crc32Check
from cogtools.conversion.fetching import Fetching
from cogtools.conversion.loss import loss_report
from cogtools.conversion.output import AtomicFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.formats.torch_zip_writer import TorchArchive
    from cogtools.checkpoint.tensors import Storage
    from cogtools.conversion.arithmetic import Computed
    from cogtools.conversion.loss import LossReport
    from cogtools.conversion.output import AtomicFolder, GrowingFile
    from cogtools.conversion.plan import Planned
    from cogtools.conversion.upload import Upload

    Output = AtomicFile | AtomicFolder | Upload
    """What takes its place when it is complete, on this machine or in a store."""

    Bytes = bytes | memoryview
    """What is computed is used before more of it is, and need not be copied before."""


Crc32Status = Literal["checked", "not checked", "not recorded"]
"""Whether what was copied was held against recorded CRC-32s. It was not in a dry run, nor where only parts of storages
were fetched."""


class Written(NamedTuple):
    """What is known of an output only when it is written.

    Attributes:
        largest_relative_error: of any tensor, where arithmetic changed values; None where nothing was computed.
        sha256: of the file, if asked for.
        lost: how much of the LoRA was lost where it was cut to a lower rank or merged; None where it was not.
        unchecked: how many storages have a CRC-32 that could not be compared, as parts of them only were needed.
    """

    largest_relative_error: float | None = None
    sha256: str | None = None
    lost: LossReport | None = None
    unchecked: int = 0


def crc32_status(storages: Iterable[Storage], written: Written, *, dry_run: bool) -> Crc32Status:
    """Whether storages were held against the CRC-32s that their files record.

    Args:
        storages: what the output is made of.
        written: what is known of the output.
        dry_run: nothing was read.
    """
    if all(storage.crc32 is None for storage in storages):
        return "not recorded"
    return "not checked" if dry_run or written.unchecked else "checked"


class PlannedFile(NamedTuple):
    """A file of an output.

    Attributes:
        path: its name; in an output that is a folder, with the folders before it that it lies in.
        head: what comes before the tensors; all of it, where there are none.
        tensors: its tensors, in order.
        archive: what stands around the tensors of a file of `torch.save`, instead of the head.
        copied: what follows the head where the file is a copy of another one.
    """

    path: str
    head: bytes = b""
    tensors: tuple[Planned, ...] = ()
    archive: TorchArchive | None = None
    copied: FileRange | None = None

    @property
    def size_bytes(self) -> int:
        """Its size."""
        if self.archive is not None:
            return self.archive.size_bytes
        copied = 0 if self.copied is None else self.copied.size_bytes
        return len(self.head) + copied + sum(tensor.size_bytes for tensor in self.tensors)


def write(
    output: Output,
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
    return write_outputs([(output, files)], sources, progress, sha256=sha256)


def write_outputs(
    outputs: Sequence[tuple[Output, Sequence[PlannedFile]]],
    sources: Iterable[SourceFile],
    progress: Callable[[int, int], None] | None,
    *,
    sha256: bool = False,
) -> Written:
    """Write several outputs, and publish them one after the other when all are complete; the rest is as for `write`."""
    size_bytes = sum(file.size_bytes for _, files in outputs for file in files)
    tensors = [tensor for _, files in outputs for file in files for tensor in file.tensors]
    arithmetic = _Arithmetic(tensors)
    done, digest = 0, None
    with ExitStack() as opened:
        for output, _ in outputs:
            opened.enter_context(output)
        check = opened.enter_context(Crc32Check(storages_of(tensors)))
        fetching = opened.enter_context(Fetching(tensors, check))
        for output, files in outputs:
            for file in files:
                with _begun(output, file) as growing:
                    growing.reserve(file.size_bytes)
                    for part in _parts(file, arithmetic, fetching):
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
        for output, _ in outputs:
            output.publish()
    return Written(arithmetic.largest_relative_error, digest, arithmetic.lost, len(check.unchecked))


@contextmanager
def _begun(output: Output, file: PlannedFile) -> Iterator[GrowingFile]:
    """The file to write to: the output itself, or one in its folder, which is closed at the end."""
    if isinstance(output, AtomicFile):
        yield output
        return
    with output.create(file.path) as growing:
        yield growing


def _parts(file: PlannedFile, arithmetic: _Arithmetic, fetching: Fetching) -> Iterator[FileRange | Bytes]:
    """The bytes of a file, in order."""
    archive = file.archive
    yield file.head if archive is None else archive.start
    for number, tensor in enumerate(file.tensors):
        if archive is None:
            yield from _content(tensor, arithmetic, fetching)
            continue
        yield archive.before(number)
        crc32 = 0
        for part in _content(tensor, arithmetic, fetching):
            for chunk in _chunks(part):
                crc32 = zlib.crc32(chunk, crc32)
                yield chunk
        yield archive.after(number, crc32)
    if file.copied is not None:
        yield file.copied
    if archive is not None:
        yield archive.end()


def _chunks(part: FileRange | Bytes) -> Iterator[Bytes]:
    """The bytes of a part of a tensor, as they are needed to compute with."""
    if not isinstance(part, FileRange):
        yield part
        return
    for position in range(0, part.size_bytes, CHUNK_BYTES):
        yield part.file.read(part.offset_bytes + position, min(CHUNK_BYTES, part.size_bytes - position))


def storages_of(tensors: Iterable[Planned]) -> list[Storage]:
    """The storages that planned tensors view, each once."""
    return list({id(storage): storage for tensor in tensors for storage in tensor.storages}.values())


class _Arithmetic:
    """Computes planned tensors. What that takes is imported beside the copying, and only if a tensor asks for it."""

    def __init__(self, tensors: Iterable[Planned]) -> None:
        self._computed: Computed | None = None
        self._thread = threading.Thread(target=self._import, name="import")
        if any(tensor.compute is not None for tensor in tensors):
            self._thread.start()

    @staticmethod
    def _import() -> None:
        with contextlib.suppress(Exception):  # raised again where it is needed
            import cogtools.conversion.arithmetic  # noqa: F401

    def content(self, tensor: Planned) -> Iterator[Bytes]:
        """The bytes of a tensor; errors as of `Computed.content`."""
        if self._computed is None:
            self._thread.join()
            from cogtools.conversion.arithmetic import Computed

            self._computed = Computed()
        return self._computed.content(tensor)

    @property
    def largest_relative_error(self) -> float | None:
        """Of any tensor that was cast or folded; None if none was."""
        return None if self._computed is None else max(self._computed.errors, default=None)

    @property
    def lost(self) -> LossReport | None:
        """How much of a LoRA was lost; None if none was cut or merged."""
        return None if self._computed is None else loss_report(self._computed.losses)


def _content(tensor: Planned, arithmetic: _Arithmetic, fetching: Fetching) -> Iterator[FileRange | Bytes]:
    """The bytes of a tensor: ranges of the checkpoint where they can be copied as they are."""
    with fetching.at_hand(tensor):
        yield from _content_at_hand(tensor, arithmetic)


def _content_at_hand(tensor: Planned, arithmetic: _Arithmetic) -> Iterator[FileRange | Bytes]:
    if tensor.compute is not None:
        yield from arithmetic.content(tensor)
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

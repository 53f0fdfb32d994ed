"""Carrying out a plan: byte ranges of the checkpoint go into a safetensors file, and what is computed comes between.

The CRC-32s that the checkpoint records are computed beside the copying: of a file of this machine from what is read a
second time, so that it must not have changed in between; of others from what is fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.files import FileRange
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.conversion.crc32 import Crc32Check
from cogtools.conversion.fetching import Fetching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.tensors import Storage
    from cogtools.conversion.arithmetic import Computed
    from cogtools.conversion.output import AtomicFile
    from cogtools.conversion.plan import Planned

Progress = "Callable[[int, int], None]"


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


def write(
    output: AtomicFile,
    header: bytes,
    tensors: Sequence[Planned],
    sources: Iterable[SourceFile],
    progress: Callable[[int, int], None] | None,
    *,
    sha256: bool,
) -> Written:
    """Write a safetensors file, and publish it only when the checkpoint's CRC-32s are known to be right.

    Args:
        output: the file.
        header: its content up to where the tensors begin.
        tensors: what follows, in this order.
        sources: the files that are read: none may have changed meanwhile.
        progress: called with the bytes written so far and the bytes in all.
        sha256: compute the SHA-256 of the file.

    Raises:
        CogtoolsError: if it cannot be done. The target is then as it was before.
    """
    size_bytes = len(header) + sum(tensor.size_bytes for tensor in tensors)
    computed = _computed(tensors)
    with output, Crc32Check(storages_of(tensors)) as check, Fetching(tensors, check) as fetching:
        output.reserve(size_bytes)
        output.write(header)
        done = len(header)
        for tensor in tensors:
            for part in _content(tensor, computed, fetching):
                if isinstance(part, FileRange):
                    output.copy(part)
                    done += part.size_bytes
                else:
                    output.write(part)
                    done += len(part)
                if progress is not None:
                    progress(done, size_bytes)
        output.sync()
        check.finish()
        for source in sources:
            source.refuse_changed()
        digest = output.sha256() if sha256 else None
        output.publish()
    return Written(max(computed.errors, default=None) if computed is not None else None, digest, len(check.unchecked))


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

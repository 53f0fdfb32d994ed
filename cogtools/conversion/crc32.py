"""Checking the bytes of a checkpoint against the CRC-32s that it records, while they are copied."""

from __future__ import annotations

import threading
import zlib
from typing import TYPE_CHECKING, NamedTuple, Self

from cogtools.errors import CheckpointError
from cogtools.interruption import signals_held_back

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.tensors import Storage

_CHUNK_BYTES = 1 << 20


class Crc32Check:
    """Computes the CRC-32s of storages and compares them with those recorded.

    Storages of files on this machine are read a second time, by a thread beside the kernel's copy: that is the faster
    way. Those of other files, which have no file descriptor, must not be read twice: their bytes are handed in with
    `update`, as they come, by any thread.

    Use it in a `with` statement; `finish` waits for the result. A block that ends early ends the thread too.

    Args:
        storages: what is copied; those without a recorded CRC-32 are left out.
    """

    def __init__(self, storages: Iterable[Storage]) -> None:
        recorded = [storage for storage in storages if storage.crc32 is not None]
        self._local = [storage for storage in recorded if _is_local(storage)]
        self._parts: dict[Storage, list[_Part]] = {storage: [] for storage in recorded if not _is_local(storage)}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        if self._local:
            thread = threading.Thread(target=self._run, name="crc32")
            try:
                with signals_held_back():  # the thread does not hear signals: they have to wake the main thread
                    thread.start()
            except RuntimeError:  # no more threads: `finish` does it
                return self
            self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def update(self, storage: Storage, offset_bytes: int, data: bytes) -> None:
        """Hand in bytes of a storage, in any order, but none twice.

        Args:
            storage: any; one that is read by the thread, or has no recorded CRC-32, is ignored.
            offset_bytes: where in the storage the bytes begin.
            data: the bytes.
        """
        parts = self._parts.get(storage)
        if parts is not None:
            parts.append(_Part(offset_bytes, len(data), zlib.crc32(data)))

    @property
    def unchecked(self) -> tuple[Storage, ...]:
        """The storages whose CRC-32 cannot be compared, since not all of their bytes were handed in."""
        return tuple(storage for storage, parts in self._parts.items() if _joined(storage, parts) is None)

    def finish(self) -> None:
        """Wait until all is checked but for `unchecked`.

        Raises:
            CheckpointError: if a storage is damaged, or cannot be read.
        """
        if self._thread is not None:
            self._thread.join()
        else:
            self._run()
        if self._error is not None:
            raise self._error
        for storage, parts in self._parts.items():
            crc32 = _joined(storage, parts)
            if crc32 is not None:
                _compare(storage, crc32)

    def _run(self) -> None:
        try:
            for storage in self._local:
                self._check(storage)
        except Exception as error:  # noqa: BLE001 - raised again by `finish`, in the thread that waits
            self._error = error

    def _check(self, storage: Storage) -> None:
        source = storage.range()
        crc32 = 0
        for position in range(0, source.size_bytes, _CHUNK_BYTES):
            if self._stop.is_set():
                return
            size = min(_CHUNK_BYTES, source.size_bytes - position)
            crc32 = zlib.crc32(source.file.read(source.offset_bytes + position, size), crc32)
        _compare(storage, crc32)


class _Part(NamedTuple):
    """A part of a storage, and its CRC-32."""

    offset_bytes: int
    size_bytes: int
    crc32: int


def _joined(storage: Storage, parts: Iterable[_Part]) -> int | None:
    """The CRC-32 of a storage from those of its parts; None if they are not all of it."""
    position, crc32 = 0, 0
    for part in sorted(parts):
        if part.offset_bytes != position:
            return None
        crc32 = joined_crc32(crc32, part.crc32, part.size_bytes)
        position += part.size_bytes
    return crc32 if position == storage.size_bytes else None


_POLYNOMIAL = 0xEDB88320


def joined_crc32(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two runs of bytes laid end to end.

    Args:
        first: the CRC-32 of the first run.
        second: that of the second.
        second_bytes: how long the second is.

    Source: zlib, crc32.c, `crc32_combine_`: a zero bit after the first run is a product with a matrix over GF(2), and
    so are 2, 4, 8 … of them, with its square, the square of that, and so on.
    """
    one_bit = [_POLYNOMIAL, *(1 << place for place in range(31))]
    matrix = _squared(_squared(_squared(one_bit)))  # a zero byte
    while second_bytes:
        if second_bytes & 1:
            first = _product(matrix, first)
        matrix = _squared(matrix)
        second_bytes >>= 1
    return first ^ second


def _product(matrix: list[int], vector: int) -> int:
    result = 0
    for row in matrix:
        if not vector:
            break
        if vector & 1:
            result ^= row
        vector >>= 1
    return result


def _squared(matrix: list[int]) -> list[int]:
    return [_product(matrix, row) for row in matrix]


def _is_local(storage: Storage) -> bool:
    return storage.around().file.fd >= 0


def _compare(storage: Storage, crc32: int) -> None:
    if crc32 != storage.crc32:
        raise CheckpointError(
            "the checkpoint is damaged: weights have changed since they were saved",
            file=storage.range().file.path,
            found=f"storage {storage.key!r} with CRC-32 {crc32:08x}",
            expected=f"CRC-32 {storage.crc32:08x}, as the file records it",
            hint="copy or download the checkpoint again",
        )

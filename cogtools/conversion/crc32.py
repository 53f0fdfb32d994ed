"""Checking the bytes of a checkpoint against the CRC-32s that it records, while they are copied."""

from __future__ import annotations

import threading
import zlib
from typing import TYPE_CHECKING, Self

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
    `update`, as they come.

    Use it in a `with` statement; `finish` waits for the result. A block that ends early ends the thread too.

    Args:
        storages: what is copied; those without a recorded CRC-32 are left out.
    """

    def __init__(self, storages: Iterable[Storage]) -> None:
        recorded = [storage for storage in storages if storage.crc32 is not None]
        self._local = [storage for storage in recorded if _is_local(storage)]
        self._running = {storage: _Crc32() for storage in recorded if not _is_local(storage)}
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
        """Hand in bytes of a storage, front to back; what was handed in before is not counted twice.

        Args:
            storage: any; one that is read by the thread, or has no recorded CRC-32, is ignored.
            offset_bytes: where in the storage the bytes begin.
            data: the bytes.
        """
        running = self._running.get(storage)
        if running is not None:
            running.update(offset_bytes, data)

    @property
    def unchecked(self) -> tuple[Storage, ...]:
        """The storages whose CRC-32 cannot be compared, since not all of their bytes were handed in front to back."""
        return tuple(storage for storage, running in self._running.items() if running.size_bytes != storage.size_bytes)

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
        for storage, running in self._running.items():
            if running.size_bytes == storage.size_bytes:
                _compare(storage, running.value)

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


class _Crc32:
    """The CRC-32 of the first `size_bytes` bytes of a storage."""

    def __init__(self) -> None:
        self.value = 0
        self.size_bytes = 0

    def update(self, offset_bytes: int, data: bytes) -> None:
        """Go on with bytes that follow, or overlap; beyond a gap nothing counts."""
        if offset_bytes <= self.size_bytes < offset_bytes + len(data):
            new = memoryview(data)[self.size_bytes - offset_bytes :]
            self.value = zlib.crc32(new, self.value)
            self.size_bytes += len(new)


def _is_local(storage: Storage) -> bool:
    return getattr(storage.range().file, "fd", -1) >= 0


def _compare(storage: Storage, crc32: int) -> None:
    if crc32 != storage.crc32:
        raise CheckpointError(
            "the checkpoint is damaged: weights of the LoRA have changed since they were saved",
            file=storage.range().file.path,
            found=f"storage {storage.key!r} with CRC-32 {crc32:08x}",
            expected=f"CRC-32 {storage.crc32:08x}, as the file records it",
            hint="copy or download the checkpoint again",
        )

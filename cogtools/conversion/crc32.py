"""Checking the bytes of a checkpoint against the CRC-32s that it records, while they are copied."""

from __future__ import annotations

import threading
import zlib
from typing import TYPE_CHECKING, Self

from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.files import FileRange
    from cogtools.checkpoint.tensors import Storage

_CHUNK_BYTES = 1 << 20


class Crc32Check:
    """Computes the CRC-32s of storages in a thread beside the copying, and compares them with those recorded.

    Use it in a `with` statement; `finish` waits for the result. A block that ends early ends the thread too.
    """

    def __init__(self, storages: Iterable[Storage]) -> None:
        self._ranges = [(storage, storage.range()) for storage in storages if storage.crc32 is not None]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="crc32")
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def finish(self) -> None:
        """Wait until all is checked.

        Raises:
            CheckpointError: if a storage is damaged, or cannot be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for storage, source in self._ranges:
                self._check(storage, source)
        except Exception as error:  # noqa: BLE001 - raised again by `finish`, in the thread that waits
            self._error = error

    def _check(self, storage: Storage, source: FileRange) -> None:
        crc32 = 0
        for position in range(0, source.size_bytes, _CHUNK_BYTES):
            if self._stop.is_set():
                return
            size = min(_CHUNK_BYTES, source.size_bytes - position)
            crc32 = zlib.crc32(source.file.read(source.offset_bytes + position, size), crc32)
        if crc32 != storage.crc32:
            raise CheckpointError(
                "the checkpoint is damaged: weights of the LoRA have changed since they were saved",
                file=source.file.path,
                found=f"storage {storage.key!r} with CRC-32 {crc32:08x}",
                expected=f"CRC-32 {storage.crc32:08x}, as the file records it",
                hint="copy or download the checkpoint again",
            )

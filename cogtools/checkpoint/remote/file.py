"""A file that a URL names: its bytes come in ranges, and what is read in small parts is kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.files import SourceFile
from cogtools.checkpoint.remote.store import BLOCK_BYTES, RANGE_BYTES
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.paths import RemotePath
    from cogtools.checkpoint.remote.store import Store

_MAX_BLOCKS = 128
"""How many blocks of a file are kept: 16 MB."""

_SMALL_BYTES = 4 << 20
"""What is longer is fetched as it is, and not kept."""


class _Window(NamedTuple):
    """A range that is kept until it is not needed any more."""

    start: int
    content: bytes


class RemoteFile(SourceFile):
    """A file that a URL names.

    Args:
        path: its path.
        store: what answers for it.

    Raises:
        CheckpointError: if it is not there.
    """

    def __init__(self, path: RemotePath, store: Store) -> None:
        found = store.look(path)
        if found is None or not found.is_file:
            what = "this is a folder" if found is not None else "there is no such file"
            raise CheckpointError(what, file=path, found=store.why_not(path) if found is None else None)
        super().__init__(path, found.size_bytes)
        self._remote = path
        self._store = store
        self._found = found
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._windows: list[_Window] = []
        self._remembered: dict[int, bytes] = {}
        self._cache_lock = threading.Lock()
        for number in range((len(found.start) + BLOCK_BYTES - 1) // BLOCK_BYTES):
            self._blocks[number] = found.start[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]

    @property
    def parallel(self) -> int:
        return self._store.parallel

    def beside(self, name: str, *, above: bool = False) -> SourceFile | None:
        folders = [self._remote.parent]
        if above:
            folders.append(self._remote.parent.parent)
        for path in (folder / name for folder in folders):
            if self._store.is_file(path):
                return RemoteFile(path, self._store)
        return None

    def _read_some(self, offset_bytes: int, size_bytes: int) -> bytes:
        with self._cache_lock:
            for window in self._windows:
                start = offset_bytes - window.start
                if 0 <= start < len(window.content):
                    return window.content[start : start + size_bytes]
        if size_bytes > _SMALL_BYTES:
            return self._fetch(offset_bytes, min(size_bytes, RANGE_BYTES))
        return self._from_blocks(offset_bytes, size_bytes)

    def _from_blocks(self, offset_bytes: int, size_bytes: int) -> bytes:
        first, last = offset_bytes // BLOCK_BYTES, (offset_bytes + size_bytes - 1) // BLOCK_BYTES
        with self._cache_lock:
            kept = {number: self._blocks[number] for number in range(first, last + 1) if number in self._blocks}
        missing = [number for number in range(first, last + 1) if number not in kept]
        if missing:
            start, end = missing[0] * BLOCK_BYTES, min((missing[-1] + 1) * BLOCK_BYTES, self.size_bytes)
            content = self._fetch(start, end - start)
            for number in range(missing[0], missing[-1] + 1):
                kept[number] = content[number * BLOCK_BYTES - start : (number + 1) * BLOCK_BYTES - start]
        with self._cache_lock:
            for number, block in kept.items():
                self._blocks[number] = block
                self._blocks.move_to_end(number)
            while len(self._blocks) > _MAX_BLOCKS:
                self._blocks.popitem(last=False)
        joined = b"".join(kept[number] for number in range(first, last + 1))
        start = offset_bytes - first * BLOCK_BYTES
        return joined[start : start + size_bytes]

    def _fetch(self, offset_bytes: int, size_bytes: int) -> bytes:
        return self._store.fetch(self._remote, offset_bytes, size_bytes, self._found)

    def keep(self, offset_bytes: int, size_bytes: int) -> Callable[[], None]:
        window = _Window(offset_bytes, self._fetch(offset_bytes, size_bytes))
        with self._cache_lock:
            self._windows.append(window)

        def release() -> None:
            with self._cache_lock:
                self._windows = [other for other in self._windows if other is not window]

        return release

    def remember(self, offset_bytes: int, size_bytes: int) -> None:
        self._remembered[offset_bytes] = self.read(offset_bytes, size_bytes)

    def peek(self, offset_bytes: int, size_bytes: int) -> bytes | None:
        content = self._remembered.get(offset_bytes, b"")
        return content[:size_bytes] if len(content) >= size_bytes else None

    def _now_bytes(self) -> int:
        return self.size_bytes

    def refuse_changed(self) -> None:
        self._store.refuse_changed(self._remote, self._found)

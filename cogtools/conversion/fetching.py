"""Fetching what an output is made of, where that does not lie on this machine.

Threads fetch ranges ahead of who writes, in the order in which they are needed: small storages that lie next to each
other in one request, large ones in several at once. Each byte travels once: what is fetched is at hand until the last
tensor that needs it is written, and its CRC-32 is computed when it arrives.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from cogtools.conversion.first_values import FIRST_BYTES
from cogtools.interruption import signals_held_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Self

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.tensors import Storage
    from cogtools.conversion.crc32 import Crc32Check
    from cogtools.conversion.plan import Planned

WINDOW_BYTES = 8 << 20
"""How much is fetched in one request."""

GAP_BYTES = 64 << 10
"""What may lie between two storages that are fetched together: to fetch it too takes less time than to ask twice."""

AHEAD_BYTES = 64 << 20
"""How much may be at hand before it is needed."""


@dataclass(eq=False)
class _Window:
    """A range to be fetched in one request.

    Attributes:
        file: the file.
        start: where in it the range begins.
        size_bytes: its length.
        storages: those of which bytes lie in it.
        first: the number of the first tensor that needs it.
        last: the number of the last one.
        release: lets go of the bytes; None before they are there.
        error: why they could not be fetched.
    """

    file: SourceFile
    start: int
    size_bytes: int
    storages: list[Storage]
    first: int = 1 << 62
    last: int = -1
    release: Callable[[], None] | None = None
    error: Exception | None = None

    @property
    def end(self) -> int:
        return self.start + self.size_bytes


class _Need(NamedTuple):
    """A part of a storage that a tensor needs, as a range of the file."""

    number: int
    file: SourceFile
    start: int
    end: int


class Fetching:
    """Has at hand what tensors need, one after the other. For files of this machine it does nothing.

    Use it in a `with` statement.

    Args:
        tensors: what is written, in order.
        check: takes the CRC-32s of what was fetched.
    """

    def __init__(self, tensors: Sequence[Planned], check: Crc32Check) -> None:
        self._check = check
        self._numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        self._of_tensor: dict[int, list[_Window]] = {}
        windows = _windows(tensors)
        for need in _needs(tensors):
            found = _overlapping(windows[id(need.file)], need)
            self._of_tensor.setdefault(need.number, []).extend(found)
            for window in found:
                window.first, window.last = min(window.first, need.number), max(window.last, need.number)
        every = [window for of_file in windows.values() for window in of_file if window.last >= 0]
        self._windows = sorted(every, key=lambda window: (window.first, window.start))
        self._waiting = iter(self._windows)
        self._next = next(self._waiting, None)
        self._changed = threading.Condition()
        self._current = 0
        self._ahead_bytes = 0
        self._is_over = False

    def __enter__(self) -> Self:
        threads = min(len(self._windows), max((window.file.parallel for window in self._windows), default=0))
        with signals_held_back():  # they have to wake the main thread
            for _ in range(threads):
                # A daemon: what is just asked of a server that is silent must not hold up the end of the program.
                threading.Thread(target=self._work, name="cogtools-fetch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    @contextmanager
    def at_hand(self, tensor: Planned) -> Iterator[None]:
        """Have what a tensor needs at hand while the block runs. Tensors are asked for in their order.

        Raises:
            CheckpointError: if it cannot be fetched.
        """
        number = self._numbers[id(tensor)]
        windows = self._of_tensor.get(number)
        if windows is None:
            yield
            return
        with self._changed:
            self._current = number
            self._changed.notify_all()
            while not all(window.release or window.error for window in windows):
                self._changed.wait(1.0)  # a signal that arrives just before this is heard after it
        for window in windows:
            if window.error is not None:
                raise window.error
        for piece in tensor.pieces:
            if not isinstance(piece, bytes):
                place = piece.storage.range()
                place.file.remember(place.offset_bytes + piece.offset_bytes, min(FIRST_BYTES, piece.span_bytes))
        yield
        with self._changed:
            for window in windows:
                if window.last <= number and window.release is not None:
                    window.release()
                    self._ahead_bytes -= window.size_bytes
            self._changed.notify_all()

    def _work(self) -> None:
        while (window := self._take()) is not None:
            try:
                release = window.file.keep(window.start, window.size_bytes)
                for storage in window.storages:
                    self._hand_in(storage, window)
            except Exception as error:  # noqa: BLE001 - raised again by `at_hand`, in the thread that waits
                window.error = error
            else:
                window.release = release
            with self._changed:
                self._changed.notify_all()

    def _take(self) -> _Window | None:
        """The next window, when it may be fetched; None if none is left."""
        with self._changed:
            while not self._is_over:
                window = self._next
                if window is None:
                    return None
                if window.first <= self._current or self._ahead_bytes < AHEAD_BYTES:
                    self._next = next(self._waiting, None)
                    self._ahead_bytes += window.size_bytes
                    return window
                self._changed.wait()
            return None

    def _hand_in(self, storage: Storage, window: _Window) -> None:
        """Have the CRC-32 of a storage's bytes in a window computed, unless it is packed."""
        place = storage.range()
        if storage.crc32 is None or place.file is not window.file:
            return
        start = max(place.offset_bytes, window.start)
        end = min(place.offset_bytes + place.size_bytes, window.end)
        if start < end:
            self._check.update(storage, start - place.offset_bytes, window.file.read(start, end - start))


def _needs(tensors: Iterable[Planned]) -> Iterator[_Need]:
    """What tensors need of files that are not on this machine."""
    for number, tensor in enumerate(tensors):
        for piece in tensor.pieces:
            if not isinstance(piece, bytes):
                file, start, size_bytes = piece.storage.around()
                before = size_bytes - piece.storage.size_bytes  # at most so much lies before the storage's own bytes
                if before >= 0 and file.fd < 0:
                    start, size_bytes = start + piece.offset_bytes, before + piece.span_bytes
                if file.fd < 0:
                    yield _Need(number, file, start, start + size_bytes)


def _windows(tensors: Iterable[Planned]) -> dict[int, list[_Window]]:
    """Ranges that have all storages of each such file: several small ones in one, large ones in parts."""
    storages = {id(storage): storage for tensor in tensors for storage in tensor.storages}
    afar = [storage for storage in storages.values() if storage.around().file.fd < 0]
    windows: dict[int, list[_Window]] = {}
    for storage in sorted(afar, key=lambda storage: storage.around().offset_bytes):
        file, start, size_bytes = storage.around()
        of_file = windows.setdefault(id(file), [])
        if of_file and _fits(of_file[-1], start, start + size_bytes):
            of_file[-1].size_bytes = max(of_file[-1].end, start + size_bytes) - of_file[-1].start
            of_file[-1].storages.append(storage)
            continue
        # The header of the next storage may lie in the range of this one: that is fetched twice, and is short.
        for part in range(start, start + size_bytes, WINDOW_BYTES):
            of_file.append(_Window(file, part, min(WINDOW_BYTES, start + size_bytes - part), [storage]))
    return windows


def _overlapping(windows: list[_Window], need: _Need) -> list[_Window]:
    """The windows of a file, in its order, that have a part of what is needed."""
    first = bisect_right(windows, need.start, key=lambda window: window.start) - 1
    found = takewhile(lambda window: window.start < need.end, windows[max(first, 0) :])
    return [window for window in found if window.end > need.start]


def _fits(window: _Window, start: int, end: int) -> bool:
    """Whether a storage is fetched with those that lie before it."""
    return start - window.end <= GAP_BYTES and end - window.start <= WINDOW_BYTES

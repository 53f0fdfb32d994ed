"""How far a verification has come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Meter:
    """Adds up what was looked at, and tells it."""

    def __init__(self, progress: Callable[[int, int], None] | None, all_bytes: int) -> None:
        self._progress = progress
        self._all_bytes = all_bytes
        self._done = 0

    def advance(self, size_bytes: int) -> None:
        """Tell that so many bytes more were looked at."""
        self._done += size_bytes
        if self._progress is not None:
            self._progress(self._done, self._all_bytes)

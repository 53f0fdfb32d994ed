"""A progress bar, on a terminal only, and only for jobs that take a while."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from cogtools.interruption import signals_held_back
from cogtools.render.text import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.status import Status

PATIENCE_SECONDS = 0.5
"""How long a job may take before a bar appears."""


class Progress:
    """Shows how many bytes of a job are done.

    Args:
        verb: what is going on, such as "writing".
        hidden: show nothing, whatever happens.
    """

    def __init__(self, verb: str, *, hidden: bool = False) -> None:
        self._verb = verb
        self._hidden = hidden or not is_terminal(sys.stderr)
        self._start = time.monotonic()
        self._bar: RichProgress | None = None
        self._line: Status | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Show what is going on where that cannot be counted, until the next bytes are done."""
        if self._hidden:
            return
        from cogtools.render.screen import Screen

        self._end_line()
        self._line = Screen(sys.stderr).console.status(text)
        with signals_held_back():  # the thread that draws does not hear signals: they have to wake the main thread
            self._line.start()

    def _end_line(self) -> None:
        if self._line is not None:
            self._line.stop()
            self._line = None

    def update(self, done_bytes: int, all_bytes: int) -> None:
        """Show how far the job is."""
        self._end_line()
        if self._hidden or time.monotonic() - self._start < PATIENCE_SECONDS:
            return
        if self._bar is None:
            self._bar = self._make_bar()
            self._bar.add_task(self._verb, total=all_bytes)
            with signals_held_back():
                self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done_bytes, total=all_bytes)

    @staticmethod
    def _make_bar() -> RichProgress:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        from cogtools.render.screen import Screen

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        return RichProgress(*columns, console=Screen(sys.stderr).console, transient=True)

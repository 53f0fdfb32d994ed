"""Ctrl-C and SIGTERM: the first one raises KeyboardInterrupt, and those that follow do not disturb the cleanup.

The handler of Python itself raises for each signal, so that a second one strikes inside the cleanup that the first one
began. A KeyboardInterrupt that is raised where Python cannot pass it on (in a destructor, in a callback of a weak
reference) is lost with the message "Exception ignored in …": it is raised again a moment later.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

CLEANUP_SECONDS = 10.0
"""How long signals are not heard after the first one. A cleanup that takes longer hangs, and can be ended."""

_AGAIN_SECONDS = 0.01

_raised_at = float("-inf")


def raise_on_signals() -> None:
    """Raise KeyboardInterrupt in the main thread on the first SIGINT or SIGTERM.

    A signal that is ignored, as a shell and nohup have it for jobs in the background, stays ignored.
    """
    global _raised_at
    _raised_at = float("-inf")
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _interrupt)
    sys.unraisablehook = _raise_again


def is_interrupted() -> bool:
    """Whether a signal was heard. Libraries and Python itself may turn its KeyboardInterrupt into another error."""
    return _raised_at > float("-inf")


def ignore_signals() -> None:
    """Ignore both from now on, up to the end of the process: there is nothing left that could be interrupted."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    if hasattr(signal, "pthread_sigmask"):  # one that arrives before its handler is changed would be reported as lost
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Let signals wait while the block runs. Threads and processes that it starts do not hear them at all.

    A thread that was there before hears them, and Python then calls their handlers in the main thread, whatever that
    has blocked: so handlers stand in that put it off.
    """
    with _handlers_that_wait(), _blocked_signals():
        yield


@contextlib.contextmanager
def _handlers_that_wait() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no handler is called here
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard: list[int] = []
    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, lambda number, _frame: heard.append(number))
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if heard:
            signal.raise_signal(heard[0])


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # asked apart: the next line may raise what was waiting
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_signals_in() -> None:
    """Undo in a new process what `signals_held_back` did while it was started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    global _raised_at
    now = time.monotonic()
    if now - _raised_at > CLEANUP_SECONDS:
        _raised_at = now
        raise KeyboardInterrupt


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    global _raised_at
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
    elif hasattr(signal, "setitimer"):
        _raised_at = float("-inf")
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

"""What all commands share: numbers with units, text that is safe to print, and where it is printed."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING, TextIO

from cogtools.errors import InterruptedByUserError, PrintError

if TYPE_CHECKING:
    from cogtools.errors import CogtoolsError

MAX_ERROR_CHARS = 1000
"""The longest text that an error shows of a file."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_BOLD_RED, _BOLD, _YELLOW, _RESET = "\x1b[1;31m", "\x1b[1m", "\x1b[33m", "\x1b[0m"


def size(size_bytes: int) -> str:
    """A number of bytes as people read it: "118.0 MB", in powers of 1000 as disks and `ls -h --si` count."""
    value, unit = float(size_bytes), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{size_bytes} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def printable(text: str) -> str:
    """Text from a file or a file name, in which nothing acts on the terminal.

    Control characters, escapes, bidirectional overrides and bytes that are no text are shown as their codes.
    """
    return text if text.isprintable() else text.translate(_ESCAPES)


class _Escapes(dict[int, str]):
    """What is shown for a character, by its code: itself if it can be printed, else an escape of Python's."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = shown = char if char.isprintable() else char.encode("unicode_escape").decode()
        return shown


_ESCAPES = _Escapes()


def emit(text: str) -> None:
    """Print a result. A reader that has seen enough and closed the pipe is no error.

    Raises:
        PrintError: if it cannot be printed.
    """
    try:
        _print(text, sys.stdout)
    except BrokenPipeError:
        return
    except OSError as error:
        raise PrintError(error) from error


def talk(text: str) -> None:
    """Print what is not the result: notices, errors. If nobody can hear it, nothing is said."""
    with contextlib.suppress(OSError):
        _print(text, sys.stderr)


def _print(text: str, stream: TextIO | None) -> None:
    if stream is None:  # closed before the program started
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        stream.write(text + "\n")
        stream.flush()
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        _print(text.encode(encoding, "backslashreplace").decode(encoding), stream)
    except OSError:
        # What is still buffered would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person may be looking at it."""
    return stream is not None and stream.isatty()


def has_colour(stream: TextIO | None) -> bool:
    """Whether to colour: a terminal that can, and no NO_COLOR (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def notice(text: str) -> None:
    """Say something that the user should know."""
    label = f"{_YELLOW}note:{_RESET}" if has_colour(sys.stderr) else "note:"
    talk(f"{label} {printable(text)}")


def shortened(text: str) -> str:
    """At most `MAX_ERROR_CHARS` of a text; a hostile file has keys of a million. `--json` has all of it."""
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]} … ({len(text):,} characters)"


def error(problem: CogtoolsError) -> None:
    """Say what failed, in fields."""
    if isinstance(problem, InterruptedByUserError):
        talk(problem.what)
        return
    colour = has_colour(sys.stderr)
    label, bold, reset = (f"{_BOLD_RED}error:{_RESET}", _BOLD, _RESET) if colour else ("error:", "", "")
    lines = [f"{label} {bold}{printable(problem.what)}{reset}"]
    lines += [f"  {name + ':':<10} {shortened(printable(value))}" for name, value in problem.fields()]
    talk("\n".join(lines))

"""Where text is printed: on a terminal, drawn by rich, or plain into a pipe or a file."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING, TextIO, TypeGuard

from cogtools.errors import InterruptedByUserError, PrintError
from cogtools.formatting import truncate
from cogtools.render.lines import Line, Output, printable

if TYPE_CHECKING:
    from cogtools.errors import CogtoolsError

MAX_ERROR_CHARS = 1000
"""The longest text from a file that an error shows."""


def is_terminal(stream: TextIO | None) -> TypeGuard[TextIO]:
    """Whether a person may be looking at it."""
    return stream is not None and stream.isatty()


def output_of(stream: TextIO | None) -> Output:
    """What a stream leads to: a `Screen` where that is a terminal; only then is rich imported."""
    if is_terminal(stream):
        with contextlib.suppress(ImportError, MemoryError):  # an error that says so must still be printed
            from cogtools.render.screen import Screen

            return Screen(stream)
    return Output()


def show(*lines: str | Line) -> None:
    """Print a result, with styles on a terminal.

    Raises:
        PrintError: if it cannot be printed.
    """
    emit(_drawn_on(sys.stdout, lines))


def emit(text: str) -> None:
    """Print a result as it is. A reader that has closed the pipe has seen enough, and is not an error.

    Raises:
        PrintError: if it cannot be printed.
    """
    try:
        _print(text, sys.stdout)
    except BrokenPipeError:
        return
    except OSError as error:
        raise PrintError(error) from error


def talk(*lines: str | Line) -> None:
    """Print what is not the result: notices and errors. Where that fails, nobody is listening."""
    with contextlib.suppress(OSError):
        _print(_drawn_on(sys.stderr, lines), sys.stderr)


def _drawn_on(stream: TextIO | None, lines: tuple[str | Line, ...]) -> str:
    """Lines drawn for a stream; without styles in them, a terminal does not need rich either."""
    has_styles = any(isinstance(line, Line) for line in lines)
    return (output_of(stream) if has_styles else Output()).draw(lines)


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


def notice(text: str) -> None:
    """Print something that the user should know."""
    talk(Line(("note:", "yellow"), f" {text}"))


def error(problem: CogtoolsError) -> None:
    """Print what failed, field by field."""
    if isinstance(problem, InterruptedByUserError):
        talk(problem.what)
        return
    fields = (f"  {name + ':':<10} {shortened(value)}" for name, value in problem.fields())
    talk(Line(("error:", "bold red"), " ", (problem.what, "bold")), *fields)


def shortened(text: str) -> str:
    """The beginning of a text, with its length; a hostile file has keys of a million characters."""
    text = printable(text)
    mark = f" … ({len(text):,} characters)"
    return truncate(text, MAX_ERROR_CHARS + len(mark), mark=mark)

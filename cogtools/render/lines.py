"""Lines of text for people, and how they are drawn plain; `screen` draws them on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_PADDING = 120
"""Into a pipe, keys and what else is as long stand in a column up to this width."""

MIN_KEY_WIDTH = 20
"""Keys get so many columns, however narrow the terminal is."""


class Line:
    """A line with styles, or one to be wrapped; every other line is a `str`.

    Attributes:
        parts: its texts, each with a style of rich such as "bold red"; "" for none.
        wrap: whether a terminal shows the last part in as many lines as it needs, under each other. Other lines are
            never broken, so that commands and paths can be copied.
    """

    __slots__ = ("parts", "wrap")

    def __init__(self, *parts: str | tuple[str, str], wrap: bool = False) -> None:
        self.parts = [(part, "") if isinstance(part, str) else part for part in parts]
        self.wrap = wrap

    def __str__(self) -> str:
        return "".join(text for text, _ in self.parts)


def printable(text: str) -> str:
    """Text from a file or a file name, with nothing in it that acts on the terminal.

    Control characters, escapes, bidirectional overrides and bytes that are not text are shown as their codes.
    """
    return text if text.isprintable() else text.translate(_ESCAPES)


class _Escapes(dict[int, str]):
    """What is shown for a character, by its code: itself if it can be printed, else an escape of Python's."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = escaped = char if char.isprintable() else char.encode("unicode_escape").decode()
        return escaped


_ESCAPES = _Escapes()


class Output:
    """Where text is printed: a pipe or a file, which gets lines of any length without styles.

    Attributes:
        width: columns of a terminal; None here.
        height: its rows; None here.
    """

    width: int | None = None
    height: int | None = None

    def draw(self, lines: Iterable[str | Line]) -> str:
        """Lines as they are printed. Whatever is in them, only their styles act on a terminal."""
        return "\n".join(printable(str(line)) for line in lines)

    def columns(self, text: str) -> int:
        """How many columns a text takes."""
        return len(text)

    def pad(self, text: str, width: int) -> str:
        """A text with spaces up to this width."""
        return text + " " * (width - self.columns(text))

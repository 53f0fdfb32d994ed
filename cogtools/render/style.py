"""How `inspect` lays text out: to the size of a terminal, with colours if it has them, or plainly into a pipe."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from typing import NamedTuple, Self

from cogtools.render.text import has_colour, is_terminal

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "1;31", "32", "33", "36"

MIN_KEY_WIDTH = 20
"""Keys get so many columns, however narrow the terminal is."""

_NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=(?:bytes|[kMGT]B)\b)")
_NO_BREAK = "\N{NO-BREAK SPACE}"


class Style(NamedTuple):
    """How to lay out.

    Attributes:
        width: columns of the terminal; None if there is none.
        height: its rows; None if there is none.
        colour: whether to colour.
    """

    width: int | None = None
    height: int | None = None
    colour: bool = False

    @classmethod
    def of_stdout(cls) -> Self:
        """The style that suits what the result is printed to."""
        if not is_terminal(sys.stdout):
            return cls()
        columns, rows = shutil.get_terminal_size()
        return cls(columns, rows, has_colour(sys.stdout))

    def wrapped(self, text: str, *, indent: int = 0) -> list[str]:
        """A text in lines that fit the terminal, after an indentation; a number and its unit stay together."""
        if self.width is None:
            return [text]
        joined = _NUMBER_AND_UNIT.sub(_NO_BREAK, text)
        lines = textwrap.wrap(joined, max(self.width - indent, MIN_KEY_WIDTH), break_on_hyphens=False)
        return [line.replace(_NO_BREAK, " ") for line in lines] or [""]

    def paint(self, text: str, code: str) -> str:
        """The text in a colour, by its number in ECMA-48's SGR."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text


def without_beginning(text: str, width: int) -> str:
    """A key or a label of which at most so many columns are shown: the end, from the start of a segment on."""
    if len(text) <= width:
        return text
    start = len(text) - width + 1
    dot = text.find(".", start - 1)
    return f"…{text[start if dot < 0 else dot + 1 :]}"

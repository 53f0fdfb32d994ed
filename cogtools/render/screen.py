"""A terminal, drawn on by rich: it decides about colours, and measures what is wrapped. Importing it takes 20 ms."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from cogtools.render.lines import Line, Output, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import ConsoleOptions

MIN_WIDTH = 40
"""Lines get so many columns, however narrow the terminal is: rich would lose text, and print nothing in no columns."""

DEFAULT_WIDTH = 80
"""The same where the environment has COLUMNS=0, as some editors set it."""

_NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=(?:bytes|[kMGT]B)\b)")
_GLUE = "\u0378"
"""Keeps a number and its unit in one line. It is not assigned, so no printable text has it; rich takes it as narrow."""


class Screen(Output):
    """A terminal.

    Attributes:
        console: rich's.
        width: its columns.
        height: its rows.
    """

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False)
        if self.console.width < MIN_WIDTH:
            self.console.width = MIN_WIDTH if self.console.width else DEFAULT_WIDTH
        self.width, self.height = self.console.size

    def draw(self, lines: Iterable[str | Line]) -> str:
        """Lines with the codes of their styles, as far as the terminal has them."""
        with self.console.capture() as capture:
            self.console.print(_Drawing(lines), crop=False, end="")
        return capture.get().removesuffix("\n")

    def columns(self, text: str) -> int:
        """How many columns a text takes: some characters take two, some none."""
        # rich's table of such characters takes 20 ms to import; all but "…" is ASCII in most files.
        return len(text) if text.replace("…", "").isascii() else cell_len(text)


class _Drawing:
    """Lines as rich draws them: laid out already, so that it need not measure them as it does its own tables."""

    def __init__(self, lines: Iterable[str | Line]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in self._lines:
            if isinstance(line, str):
                yield Segment(f"{printable(line)}\n")
                continue
            parts = [(printable(text), style) for text, style in line.parts]
            for row in _wrapped(parts, console, options.max_width) if line.wrap else [parts]:
                yield from (Segment(text, console.get_style(style) if style else None) for text, style in row)
                yield Segment.line()


def _wrapped(parts: list[tuple[str, str]], console: Console, width: int) -> Iterator[list[tuple[str, str]]]:
    """A line in several: the last part goes on below itself, and the first line has what stands before it."""
    *before, (text, style) = parts
    indent = sum(cell_len(part) for part, _ in before)
    glued = Text(_NUMBER_AND_UNIT.sub(_GLUE, text))
    for row in glued.wrap(console, max(width - indent, 1), overflow="fold"):
        yield [*before, (row.plain.rstrip().replace(_GLUE, " "), style)]
        before = [(" " * indent, "")]

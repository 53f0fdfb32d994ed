"""The table of tensors: a line for each, with its statistics if they were computed."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from cogtools.render.style import CYAN, DIM, MIN_KEY_WIDTH, RED, without_beginning
from cogtools.render.text import printable, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cogtools.inspection.report import Statistics, TensorReport
    from cogtools.render.style import Style

MAX_PADDING = 120
"""Into a pipe, keys up to this length stand in a column."""

MAX_ON_SCREEN = 4096
"""Of a longer key, a screen gets only so much of its end; a hostile one has many millions of characters."""

MIN_STATISTICS_WIDTH = 150
"""On a narrower terminal, statistics stand under their tensor."""

MIN_RUN = 3
"""How many keys, on average, a line that spells out their beginning must serve."""

_STATISTICS = ("min", "max", "mean", "std", "norm", "zeros", "nan", "inf")


def table_lines(tensors: Sequence[TensorReport], style: Style) -> Iterator[str]:
    """A line for each tensor."""
    return _piped(tensors) if style.width is None else _on_terminal(tensors, style, style.width)


def _piped(tensors: Sequence[TensorReport]) -> Iterator[str]:
    """One line per tensor, every column one word: keys are whole and bytes exact, for grep and awk."""
    offsets, statistics = _has_offsets(tensors), _has_statistics(tensors)
    headings = _headings("bytes", offsets=offsets, statistics=statistics)
    rows = []
    for tensor in tensors:
        cells = [tensor.dtype, str(tensor.shape).replace(" ", ""), str(tensor.size_bytes)]
        rows.append(cells + _further_cells(tensor, offsets=offsets, statistics=statistics))
    keys = [printable(tensor.key) for tensor in tensors]
    key_width = min(max(map(len, keys)), MAX_PADDING)
    widths = _widths([headings, *rows])
    yield _row("key", key_width, headings, widths) + "  section"
    for tensor, key, cells in zip(tensors, keys, rows, strict=True):
        yield f"{_row(key, key_width, cells, widths)}  {tensor.section}"


def _on_terminal(tensors: Sequence[TensorReport], style: Style, width: int) -> Iterator[str]:
    """Each section under its name, keys shortened to what there is room for."""
    offsets, statistics = _has_offsets(tensors), _has_statistics(tensors)
    below = statistics and width < MIN_STATISTICS_WIDTH
    headings = _headings("size", offsets=offsets, statistics=statistics and not below)
    longest = max(len(_on_screen(tensor.key)) for tensor in tensors)
    for section, members in groupby(tensors, key=lambda tensor: tensor.section):
        block = list(members)
        rows = []
        for tensor in block:
            cells = [tensor.dtype, str(tensor.shape), size(tensor.size_bytes)]
            rows.append(cells + _further_cells(tensor, offsets=offsets, statistics=statistics and not below))
        widths = _widths([headings, *rows])
        key_width = min(longest, max(width - sum(widths) - 2 * len(widths), MIN_KEY_WIDTH))
        heading = _row(section, key_width, headings, widths)
        yield style.paint(section, CYAN) + style.paint(heading[len(section) :], DIM)
        rest = zip(block, rows, strict=True)
        for beginning, keys in runs([_on_screen(tensor.key) for tensor in block], key_width):
            if beginning:
                yield style.paint(f"(… is {without_beginning(beginning, max(width - 7, MIN_KEY_WIDTH))})", DIM)
            for key, (tensor, cells) in zip(keys, rest, strict=False):
                shown = f"…{key[len(beginning) :]}" if beginning else key
                yield _row(without_beginning(shown, key_width), key_width, cells, widths)
                if below and tensor.statistics is not None:
                    yield from _statistics_below(tensor.statistics, style)


def _on_screen(key: str) -> str:
    """A key as a screen shows it: of one longer than any screen is wide, the end."""
    return printable(key if len(key) <= MAX_ON_SCREEN else f"…{key[-MAX_ON_SCREEN:]}")


def _has_offsets(tensors: Sequence[TensorReport]) -> bool:
    return any(tensor.offset_bytes is not None for tensor in tensors)


def _has_statistics(tensors: Sequence[TensorReport]) -> bool:
    return any(tensor.statistics is not None for tensor in tensors)


def _headings(size_heading: str, *, offsets: bool, statistics: bool) -> list[str]:
    headings = ["dtype", "shape", size_heading]
    if offsets:
        headings.append("offset")
    if statistics:
        headings += _STATISTICS
    return headings


def _widths(rows: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _row(key: str, key_width: int, cells: list[str], widths: list[int]) -> str:
    """Key, dtype and shape to the left, numbers to the right."""
    parts = [key.ljust(key_width), cells[0].ljust(widths[0]), cells[1].ljust(widths[1])]
    parts += [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(parts)


def _further_cells(tensor: TensorReport, *, offsets: bool, statistics: bool) -> list[str]:
    cells = []
    if offsets:
        cells.append("-" if tensor.offset_bytes is None else str(tensor.offset_bytes))
    if statistics:
        cells += _statistics_cells(tensor.statistics)
    return cells


def _statistics_cells(statistics: Statistics | None) -> list[str]:
    if statistics is None or statistics.not_computed is not None:
        return ["-"] * len(_STATISTICS)
    numbers = (statistics.min, statistics.max, statistics.mean, statistics.std, statistics.norm)
    cells = ["-" if value is None else f"{value:.4g}" for value in numbers]
    cells.append("-" if statistics.zeros is None else f"{statistics.zeros:.2%}")
    cells += ["-" if count is None else str(count) for count in (statistics.nans, statistics.infs)]
    return cells


def _statistics_below(statistics: Statistics, style: Style) -> Iterator[str]:
    if statistics.not_computed is not None:
        yield style.paint(f"  not computed: {statistics.not_computed}", DIM)
        return
    cells = list(zip(_STATISTICS, _statistics_cells(statistics), strict=True))
    wrong = bool(statistics.nans or statistics.infs)
    for line in (cells[:4], cells[4:]):
        text = "  " + "  ".join(f"{name:<5} {cell:<11}" for name, cell in line).rstrip()
        yield style.paint(text, RED if wrong else DIM)


class Run(NamedTuple):
    """Keys that follow each other, and what is left out at the beginning of all of them; it ends with a dot."""

    beginning: str
    keys: Sequence[str]

    def fits(self, width: int) -> bool:
        """Whether its keys, without their beginning, have at most this many columns."""
        return max(map(len, self.keys)) - len(self.beginning) + bool(self.beginning) <= width


def runs(keys: Sequence[str], width: int) -> Sequence[Run]:
    """Keys in runs with a common beginning, without which they fit.

    A key that is too long without it stands alone. Where runs would be short, in an order that is not that of the
    keys, all are one.
    """
    whole = Run(_shortest_beginning(keys, width), keys)
    if whole.fits(width):
        return [whole]
    found = []
    waiting = _split(keys)
    while waiting:
        run = waiting.pop()
        if len(run.keys) == 1 or run.fits(width):
            found.append(run)
        else:
            waiting += _split(run.keys)
    return found if len(keys) >= MIN_RUN * len(found) else [whole]


def _split(keys: Sequence[str]) -> list[Run]:
    """Runs of keys that have one more segment in common than all of them have, the first run last."""
    start = len(_common_segments(keys))
    parts = [list(part) for _, part in groupby(keys, key=lambda key: key[start:].partition(".")[0])]
    return [Run(_common_segments(part), part) for part in reversed(parts)]


def _common_segments(keys: Sequence[str]) -> str:
    """The segments that all of some keys begin with, except their last ones."""
    first, last = min(keys), max(keys)
    equal = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    common = min(first, last, key=len) if equal is None else first[:equal]
    return common[: common.rfind(".") + 1]


def _shortest_beginning(keys: Sequence[str], width: int) -> str:
    """As little of what keys have in common as must be left out for the longest to fit, but whole segments."""
    too_much = max(map(len, keys)) - width
    common = _common_segments(keys)
    return common[: common.find(".", too_much) + 1] or common if too_much > 0 else ""

"""The table of tensors: a line for each, with its statistics if they were computed."""

from __future__ import annotations

from itertools import groupby
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

from cogtools.formatting import size, truncate
from cogtools.render.lines import MAX_PADDING, MIN_KEY_WIDTH, Line, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cogtools.inspection.report import Statistics, TensorReport
    from cogtools.render.lines import Output

MAX_ON_SCREEN = 4096
"""Of a longer key, a screen gets only so much of its end; a hostile one has many millions of characters."""

MIN_STATISTICS_WIDTH = 150
"""On a narrower terminal, statistics stand under their tensor."""

MIN_GROUP = 3
"""How many keys, on average, a line that spells out their prefix must serve."""

EMPTY_KEY = '""'

_STATISTICS = ["min", "max", "mean", "std", "norm", "zeros", "nan", "inf"]


def table_lines(tensors: Sequence[TensorReport], output: Output) -> Iterator[str | Line]:
    """A line for each tensor."""
    return _piped(tensors) if output.width is None else _on_terminal(tensors, output, output.width)


def _piped(tensors: Sequence[TensorReport]) -> Iterator[str]:
    """One line per tensor, every column one word: keys are whole and bytes exact, for grep and awk."""
    keys = ["key", *(printable(tensor.key).replace(" ", r"\x20") or EMPTY_KEY for tensor in tensors)]
    sections = ["section", *(tensor.section for tensor in tensors)]
    width = min(max(map(len, keys)), MAX_PADDING)
    for key, cells, section in zip(keys, _beside_keys(tensors, piped=True), sections, strict=True):
        yield f"{key:<{width}}  {cells}  {section}"


def _on_terminal(tensors: Sequence[TensorReport], output: Output, width: int) -> Iterator[str | Line]:
    """Each section under its name, keys shortened to what there is room for."""
    is_wide = width >= MIN_STATISTICS_WIDTH
    shown = [printable(truncate(tensor.key, MAX_ON_SCREEN, keep="end")) or EMPTY_KEY for tensor in tensors]
    longest = max(map(output.columns, shown))
    for section, members in groupby(zip(tensors, shown, strict=True), key=lambda member: member[0].section):
        block, block_keys = zip(*members, strict=True)
        headings, *rows = _beside_keys(block, piped=False, statistics=is_wide)
        key_width = min(longest, max(width - len(headings) - 2, MIN_KEY_WIDTH))
        yield Line((section, "cyan"), (f"{' ' * (key_width - len(section))}  {headings}", "dim"))
        rest = zip(block, rows, strict=True)
        for prefix, keys in group_by_prefix(block_keys, key_width):
            if prefix:
                yield Line((f"(… is {last_segments(prefix, max(width - 7, MIN_KEY_WIDTH))})", "dim"))
            for key, (tensor, cells) in zip(keys, rest, strict=False):
                short = last_segments(f"…{key[len(prefix) :]}" if prefix else key, key_width)
                yield f"{output.pad(short, key_width)}  {cells}"
                if tensor.statistics is not None and not is_wide:
                    yield from _statistics_below(tensor.statistics)


def _beside_keys(tensors: Sequence[TensorReport], *, piped: bool, statistics: bool = True) -> list[str]:
    """The columns beside the keys, as a line of headings and one for each tensor; for a pipe, with exact bytes."""
    columns: list[Sequence[str]] = [["dtype", *(tensor.dtype for tensor in tensors)]]
    if piped:
        columns.append(["shape", *(str(tensor.shape).replace(" ", "") for tensor in tensors)])
        columns.append(["bytes", *(str(tensor.size_bytes) for tensor in tensors)])
    else:
        columns.append(["shape", *(str(tensor.shape) for tensor in tensors)])
        columns.append(["size", *(size(tensor.size_bytes) for tensor in tensors)])
    offsets = [tensor.offset_bytes for tensor in tensors]
    if any(offset is not None for offset in offsets):
        columns.append(["offset", *("-" if offset is None else str(offset) for offset in offsets)])
    if statistics and any(tensor.statistics is not None for tensor in tensors):
        columns += zip(_STATISTICS, *(_statistics_cells(tensor.statistics) for tensor in tensors), strict=True)
    widths = [max(map(len, column)) for column in columns]
    form = "  ".join(f"{{:{'<' if place < 2 else '>'}{width}}}" for place, width in enumerate(widths))
    return [form.format(*cells) for cells in zip(*columns, strict=True)]


def _statistics_cells(statistics: Statistics | None) -> list[str]:
    if statistics is None or statistics.not_computed is not None:
        return ["-"] * len(_STATISTICS)
    numbers = (statistics.min, statistics.max, statistics.mean, statistics.std, statistics.norm)
    cells = ["-" if value is None else f"{value:.4g}" for value in numbers]
    cells.append("-" if statistics.zeros is None else f"{statistics.zeros:.2%}")
    cells += ["-" if count is None else str(count) for count in (statistics.nans, statistics.infs)]
    return cells


def _statistics_below(statistics: Statistics) -> Iterator[Line]:
    if statistics.not_computed is not None:
        yield Line((f"  not computed: {statistics.not_computed}", "dim"))
        return
    cells = list(zip(_STATISTICS, _statistics_cells(statistics), strict=True))
    style = "bold red" if statistics.nans or statistics.infs else "dim"
    for line in (cells[:4], cells[4:]):
        yield Line(("  " + "  ".join(f"{name:<5} {cell:<11}" for name, cell in line).rstrip(), style))


def last_segments(text: str, width: int) -> str:
    """A key or a label of which at most so many columns are shown: the end, from the start of a segment on."""
    if len(text) <= width:
        return text
    longer = truncate(text, width + 1, keep="end")  # has the dot that a segment begins after
    _, dot, segments = longer.partition(".")
    return f"…{segments}" if dot else truncate(text, width, keep="end")


class Group(NamedTuple):
    """Keys that follow each other, and the prefix that is left out of all of them; it ends with a dot."""

    prefix: str
    keys: Sequence[str]

    def fits(self, width: int) -> bool:
        """Whether its keys, without their prefix, have at most this many columns."""
        return max(map(len, self.keys)) - len(self.prefix) + bool(self.prefix) <= width


def group_by_prefix(keys: Sequence[str], width: int) -> Sequence[Group]:
    """Keys in groups with a common prefix, without which they fit.

    A key that is too long without it stands alone. Where groups would be small, in an order that is not that of the
    keys, all are one.
    """
    whole = Group(_shortest_prefix(keys, width), keys)
    if whole.fits(width):
        return [whole]
    found = []
    waiting = _split(keys)
    while waiting:
        group = waiting.pop()
        if len(group.keys) == 1 or group.fits(width):
            found.append(group)
        else:
            waiting += _split(group.keys)
    return found if len(keys) >= MIN_GROUP * len(found) else [whole]


def _split(keys: Sequence[str]) -> list[Group]:
    """Groups of keys that have one more segment in common than all of them have, the first group last."""
    start = len(_common_segments(keys))
    parts = [list(part) for _, part in groupby(keys, key=lambda key: key[start:].partition(".")[0])]
    return [Group(_common_segments(part), part) for part in reversed(parts)]


def _common_segments(keys: Sequence[str]) -> str:
    """The segments that all of some keys begin with, except their last ones."""
    common = commonprefix([min(keys), max(keys)])  # noqa: RUF071 - not paths: characters are to be compared
    return common[: common.rfind(".") + 1]


def _shortest_prefix(keys: Sequence[str], width: int) -> str:
    """As little of what keys have in common as must be left out for the longest to fit, but whole segments."""
    too_much = max(map(len, keys)) - width
    common = _common_segments(keys)
    return common[: common.find(".", too_much) + 1] or common if too_much > 0 else ""

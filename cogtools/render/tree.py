"""The tree of tensors: equal layers folded into one line, opened as far as there is room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.render.folding import fold, open_lines
from cogtools.render.style import CYAN, MIN_KEY_WIDTH
from cogtools.render.text import printable, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.inspection.report import CheckpointReport
    from cogtools.render.folding import TreeLine
    from cogtools.render.style import Style

MAX_PADDING = 120
"""Into a pipe, labels and details up to this length stand in a column."""

CLOSED = " +"
"""Stands after what has more below it that there is no room for."""

_SIZE_WIDTH = 9


def tree_lines(report: CheckpointReport, style: Style, lines_above: int) -> Iterator[str]:
    """The tensors of a report as a tree.

    Args:
        report: what was found.
        style: how to lay out; on a terminal, as many parts are opened as there is room for.
        lines_above: how many lines stand above the tree.
    """
    opened = list(open_lines(fold(report.tensors), _room(style, lines_above)))
    details = [printable(line.detail) for line, _ in opened]
    marks = [_marks(line, is_open=is_open) for line, is_open in opened]
    label_width = max(
        2 * line.depth + len(printable(line.label)) + len(mark) for (line, _), mark in zip(opened, marks, strict=True)
    )
    detail_width = max(map(len, details))
    if style.width is None:
        label_width, detail_width = min(label_width, MAX_PADDING), min(detail_width, MAX_PADDING)
    else:
        room = style.width - _SIZE_WIDTH - 4
        label_width = min(label_width, max(room - detail_width, room // 2, MIN_KEY_WIDTH))
        detail_width = min(detail_width, max(room - label_width, 1))
    for (line, _), mark, detail in zip(opened, marks, details, strict=True):
        label = "  " * line.depth + printable(line.label)
        if style.width is not None:
            label = _shortened(label, 2 * line.depth, label_width - len(mark))
            detail = detail if len(detail) <= detail_width else detail[: detail_width - 1] + "…"
        padded = f"{label}{mark}".ljust(label_width)
        painted = style.paint(padded, CYAN) if line.depth == 0 else padded
        yield f"{painted}  {detail:<{detail_width}}  {size(line.size_bytes):>{_SIZE_WIDTH}}"
    if not all(is_open for _, is_open in opened):
        yield f"{CLOSED.strip()} has more below it, which --keys GLOB shows"


def _shortened(label: str, indent: int, width: int) -> str:
    """A label of at most this many columns, as far in as it was; what is cut out is in the middle."""
    room = max(width - indent, 2)
    text = label[indent:]
    if len(text) > room:
        end = 2 * room // 3
        text = f"{text[: room - end - 1]}…{text[-end:]}"
    return label[:indent] + text


def _room(style: Style, lines_above: int) -> int | None:
    """How many lines of the terminal are left, but at least half of them; None without a terminal.

    The blank line above the tree, the line that explains `CLOSED`, and the prompt take one each.
    """
    return None if style.height is None else max(style.height - lines_above - 3, style.height // 2)


def _marks(line: TreeLine, *, is_open: bool) -> str:
    """What stands after a label, however short that is cut."""
    times = f" ({line.times} x)" if line.times > 1 else ""
    return times + ("" if is_open else CLOSED)

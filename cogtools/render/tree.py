"""The tree of tensors: equal layers folded into one line, opened as far as there is room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.formatting import size, truncate
from cogtools.render.folding import fold, open_lines
from cogtools.render.lines import MAX_PADDING, MIN_KEY_WIDTH, Line, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cogtools.inspection.report import TensorReport
    from cogtools.render.folding import TreeLine
    from cogtools.render.lines import Output

CLOSED = " +"
"""Stands after a label with more below it than there is room for."""

_SIZE_WIDTH = 9


def tree_lines(tensors: Sequence[TensorReport], output: Output, room: int | None) -> Iterator[str | Line]:
    """The tensors of a report as a tree.

    Args:
        tensors: of the report.
        output: a terminal, or a pipe, which gets whole labels.
        room: how many lines may be used to open parts of the tree; None opens all.
    """
    opened = list(open_lines(fold(tensors), room))
    marks = [_marks(line, is_open=is_open) for line, is_open in opened]
    labels = [printable(line.label) for line, _ in opened]
    details = [printable(line.detail) for line, _ in opened]
    label_width = max(
        2 * line.depth + output.columns(label + mark)
        for (line, _), label, mark in zip(opened, labels, marks, strict=True)
    )
    detail_width = max(map(output.columns, details))
    if output.width is None:
        label_width, detail_width = min(label_width, MAX_PADDING), min(detail_width, MAX_PADDING)
    else:
        free = output.width - _SIZE_WIDTH - 4
        label_width = min(label_width, max(free - detail_width, free // 2, MIN_KEY_WIDTH))
        detail_width = min(detail_width, max(free - label_width, 1))
    for (line, _), label, mark, detail in zip(opened, labels, marks, details, strict=True):
        indent = "  " * line.depth
        if output.width is not None:
            label = truncate(label, max(label_width - len(indent + mark), 2), keep="both")
            detail = truncate(detail, detail_width)
        labelled = output.pad(f"{indent}{label}{mark}", label_width)
        yield Line(
            (labelled, "" if line.depth else "cyan"),
            f"  {output.pad(detail, detail_width)}  {size(line.size_bytes):>{_SIZE_WIDTH}}",
        )
    if not all(is_open for _, is_open in opened):
        yield f"{CLOSED.strip()} means more below: list it with --keys GLOB"


def _marks(line: TreeLine, *, is_open: bool) -> str:
    """What stands after a label, however short that is cut."""
    times = f" ({line.times} x)" if line.times > 1 else ""
    return times + ("" if is_open else CLOSED)

"""What `inspect` says: a header, the sections, how strong a LoRA's updates are, and the tensors.

Into a pipe go plain lines with whole keys. A terminal gets the same facts laid out to its size. rich is not used:
its table takes half a second for the tensors of one checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.formatting import counted
from cogtools.render.header import header_lines, section_lines
from cogtools.render.heat_map import heat_map_lines
from cogtools.render.style import BOLD, Style
from cogtools.render.table import table_lines
from cogtools.render.text import emit, notice, printable
from cogtools.render.tree import tree_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.inspection.report import CheckpointReport, InspectReport


def show_inspection(report: InspectReport, *, tree: bool = False) -> None:
    """Print what was found."""
    style = Style.of_stdout()
    parts = ["\n".join(inspection_lines(checkpoint, style, tree=tree)) for checkpoint in report.checkpoints]
    emit("\n\n".join(parts))
    if report.plot is not None:
        notice(f"The picture is in {report.plot}.")


def inspection_lines(report: CheckpointReport, style: Style, *, tree: bool = False) -> list[str]:
    """A report as lines of text."""
    lines = list(_summary_lines(report, style))
    if report.tensors:
        lines += ["", *(tree_lines(report, style, len(lines)) if tree else table_lines(report.tensors, style))]
    more = report.selected - len(report.tensors)
    if more:
        lines.append(f"… and {counted(more, 'more tensor')}")
    elif not report.selected and report.sections:
        lines += ["", "no tensor matches"]
    return lines


def _summary_lines(report: CheckpointReport, style: Style) -> Iterator[str]:
    """All but the tensors."""
    yield style.paint(printable(str(report.checkpoint)), BOLD)
    yield from header_lines(report, style)
    if report.sections:
        yield ""
        yield from section_lines(report, style)
    if report.lora is not None and report.lora.updates is not None:
        yield ""
        yield from heat_map_lines(report.lora, report.lora.updates, style)

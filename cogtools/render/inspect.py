"""What `inspect` prints: a header, the sections, how strong a LoRA's updates are, and the tensors.

A pipe gets plain lines with whole keys, a terminal the same facts laid out to its size.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cogtools.formatting import counted
from cogtools.render.comparison import comparison_lines
from cogtools.render.header import header_lines, section_lines
from cogtools.render.heat_map import heat_map_lines
from cogtools.render.lines import Line
from cogtools.render.table import table_lines
from cogtools.render.text import emit, notice, output_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.inspection.report import CheckpointReport, InspectReport
    from cogtools.render.lines import Output


def show_inspection(report: InspectReport, *, tree: bool = False) -> None:
    """Print what was found."""
    output = output_of(sys.stdout)
    parts = [_inspection(checkpoint, output, tree=tree) for checkpoint in report.checkpoints]
    if report.comparison is not None:
        parts.append(output.draw(comparison_lines(report.comparison)))
    emit("\n\n".join(parts))
    if report.plot is not None:
        notice(f"Picture written to {report.plot}.")


def _inspection(report: CheckpointReport, output: Output, *, tree: bool) -> str:
    text = output.draw(_summary(report, output))
    if report.tensors and tree:
        from cogtools.render.tree import tree_lines

        text += "\n\n" + output.draw(tree_lines(report.tensors, output, _room(output, text)))
    elif report.tensors:
        text += "\n\n" + output.draw(table_lines(report.tensors, output))
    more = report.selected - len(report.tensors)
    if more:
        text += f"\n… and {counted(more, 'more tensor')}"
    elif not report.selected and report.sections:
        text += "\n\nno tensors match"
    return text


def _summary(report: CheckpointReport, output: Output) -> Iterator[str | Line]:
    """All but the tensors."""
    yield Line((str(report.checkpoint), "bold"))
    yield from header_lines(report)
    if report.sections:
        yield ""
        yield from section_lines(report, output)
    if report.lora is not None and report.lora.updates is not None:
        yield ""
        yield from heat_map_lines(report.lora, report.lora.updates)


def _room(output: Output, above: str) -> int | None:
    """How many lines of a terminal are left for a tree under this text, but at least half of them.

    The last line of the text, a blank one, the one that explains what is closed, and the prompt take one each.
    """
    return None if output.height is None else max(output.height - above.count("\n") - 4, output.height // 2)

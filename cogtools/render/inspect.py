"""What `inspect` says.

Into a pipe go plain lines with whole keys. A terminal gets the same facts laid out to its width. rich is not used:
its table takes half a second for the tensors of one checkpoint.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from cogtools.errors import SHOWN_PROBLEMS
from cogtools.layouts.cogvideox import PROJECTIONS
from cogtools.render.folding import TreeLine, fold, open_lines
from cogtools.render.text import emit, has_colour, is_terminal, notice, number, printable, size
from cogtools.words import ALPHA_SOURCES, fold_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cogtools.inspection.report import (
        CheckpointReport,
        GlobalReport,
        InspectReport,
        LoraReport,
        Statistics,
        TensorReport,
        UpdateReport,
    )

MAX_PADDING = 120
"""Into a pipe, keys up to this length stand in a column."""

MAX_SHOWN_CHARS = 100
"""How much of a text from the file, other than a key, is shown."""

MIN_KEY_WIDTH = 20
MIN_STATISTICS_WIDTH = 150
"""On a narrower terminal, statistics stand under their tensor."""

_STATISTICS = ("min", "max", "mean", "std", "norm", "zeros", "nan", "inf")


class Style(NamedTuple):
    """How to lay out.

    Attributes:
        width: columns of the terminal; None if it is none.
        colour: whether to colour.
    """

    width: int | None = None
    colour: bool = False

    def paint(self, text: str, code: str) -> str:
        """The text in a colour, by its number in ECMA-48's SGR."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text


BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "1;31", "32", "33", "36"


def show_inspection(report: InspectReport, *, tree: bool = False) -> None:
    """Print what was found."""
    width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
    style = Style(width, has_colour(sys.stdout))
    parts = ["\n".join(inspection_lines(checkpoint, style, tree=tree)) for checkpoint in report.checkpoints]
    emit("\n\n".join(parts))
    if report.plot is not None:
        notice(f"The picture is in {report.plot}.")


def inspection_lines(report: CheckpointReport, style: Style, *, tree: bool = False) -> Iterator[str]:
    """A report as lines of text."""
    yield style.paint(printable(str(report.checkpoint)), BOLD)
    for label, value, code in _header(report):
        yield from _field(label, value, code, style)
    if report.sections:
        yield ""
        yield from _section_table(report, style)
    if report.lora is not None and report.lora.updates:
        yield ""
        yield from _heat_map(report.lora, report.lora.updates, style)
    if report.tensors:
        yield ""
        yield from _tree(report.tensors, style) if tree else _table(report.tensors, style)
    more = report.selected - len(report.tensors)
    if more:
        yield f"… and {more:,} more tensors"
    elif not report.selected and report.sections:
        yield ""
        yield "no tensor is as asked for"


# The header


def _header(report: CheckpointReport) -> Iterator[tuple[str, str, str]]:
    """The lines of the header: label, value, colour."""
    yield "format", f"{report.format}, {size(report.size_bytes)}", ""
    for part in report.files[:SHOWN_PROBLEMS]:
        yield "", f"{part.file.name}: {part.tensors:,} tensors, {size(part.size_bytes)}", ""
    if len(report.files) > SHOWN_PROBLEMS:
        yield "", f"… and {len(report.files) - SHOWN_PROBLEMS} more files (--json lists all)", ""
    if report.iterations:
        yield "iterations", ", ".join(_iteration_names(report)), ""
    yield "tensors", _tensors(report), ""
    if report.model is not None:
        facts = f" ({report.model.layers} layers, hidden size {report.model.hidden})" if report.model.slugs else ""
        yield "model", report.model.name + facts, ""
    if report.lora is not None:
        yield from _lora(report.lora)
    if report.trainer:
        yield "trainer", ", ".join(f"{name} {value}" for name, value in report.trainer.items()), ""
    copy = report.second_copy
    if copy is not None:
        certainty = "their CRC-32s are equal" if copy.checked else "told by their names: there are no CRC-32s"
        share = f"{size(copy.size_bytes)} of {size(report.stored_bytes)}"
        yield "twice", f"{share} are a second copy: {copy.tensors:,} tensors ({certainty})", YELLOW
    others = [entry for entry in report.entries if entry.name not in report.trainer and entry.kind != "None"]
    if others:
        yield "beside it", _some(entry.name for entry in others), ""
    if report.not_tensors:
        yield "no tensors", _some(f"{entry.name} ({entry.kind})" for entry in report.not_tensors), ""
    if report.metadata:
        yield "metadata", _some(f"{name}={_cut(value)}" for name, value in report.metadata.items()), ""
    if report.globals:
        yield from _globals(report.globals)


def _iteration_names(report: CheckpointReport) -> Iterator[str]:
    for iteration in report.iterations:
        marks = [mark for mark, is_so in (("latest", iteration.latest), ("this one", iteration.inspected)) if is_so]
        yield iteration.name + (f" ({', '.join(marks)})" if marks else "")


def _tensors(report: CheckpointReport) -> str:
    where = f" in {_cut(report.wrapper)!r}" if report.wrapper else ""
    beside = f"; {report.beside_tensors:,} more beside them" if report.beside_tensors else ""
    dtypes = ", ".join(
        dtype.dtype if len(report.dtypes) == 1 else f"{dtype.dtype} {size(dtype.size_bytes)}" for dtype in report.dtypes
    )
    parameters = f", {report.parameters:,} parameters, {dtypes}" if report.dtypes else ""
    return f"{report.state_dict_tensors:,}{where}{parameters}{beside}"


def _lora(lora: LoraReport) -> Iterator[tuple[str, str, str]]:
    state = {True: "complete", False: "not complete", None: "in a layout that is not known"}[lora.complete]
    facts = [f"{len(lora.layers)} layers" + (f" ({fold_numbers(lora.layers)})" if lora.layers else "")]
    facts += [f"rank {', '.join(map(str, lora.ranks))}"] if lora.ranks else []
    facts += [", ".join(lora.dtypes), f"{lora.tensors:,} tensors", size(lora.size_bytes)]
    facts = facts if lora.layers else facts[1:]
    yield (
        "LoRA",
        f"{state}: {', '.join(fact for fact in facts if fact)} ({lora.layout} layout)",
        (GREEN if lora.complete else YELLOW),
    )
    if lora.missing:
        yield "missing", _some(lora.missing, "; "), YELLOW
    if lora.unplaced:
        yield "no place", _some(lora.unplaced), YELLOW
    if lora.alpha is not None:
        source = ALPHA_SOURCES.get(lora.alpha_source or "", "")
        scaling = f", scaling {number(lora.alpha)}/{lora.ranks[0]} = {number(lora.scaling)}" if lora.scaling else ""
        yield "alpha", f"{number(lora.alpha)} ({source}){scaling}", ""
    elif lora.misstated:
        yield "alpha", f"not to be used: {lora.misstated[0]}", YELLOW
    elif lora.layout == "diffusers":
        yield "alpha", "not stated: diffusers takes alpha = rank, a scaling of 1", YELLOW
    elif lora.layout == "PEFT":
        yield "alpha", "not stated: without adapter_config.json PEFT loads nothing", YELLOW
    outlook = lora.export
    if outlook is not None and outlook.possible:
        yield "exports to", f"{outlook.tensors} tensors, {size(outlook.size_bytes)}, in diffusers' layout", ""
        for text in outlook.notices:
            yield "", text, ""
    elif outlook is not None:
        yield "no export", (outlook.reason or "") + (f" (found: {outlook.found})" if outlook.found else ""), YELLOW
        for problem in outlook.problems[:3]:
            yield "", str(problem), ""
        if len(outlook.problems) > 3:
            yield "", f"… and {len(outlook.problems) - 3:,} more problems (--json lists all)", ""
        if outlook.hint is not None:
            yield "", f"try: {outlook.hint}", ""


def _globals(names: tuple[GlobalReport, ...]) -> Iterator[tuple[str, str, str]]:
    """The names in the pickle, by how dangerous they are."""
    labels = {
        "dangerous": ("DANGER", "can run code if this file is loaded elsewhere", RED),
        "unknown": ("unknown", "not known here", YELLOW),
        "harmless": ("harmless", "known", ""),
    }
    for danger, (label, meaning, code) in labels.items():
        fitting = [f"{_cut(name.name)} ({name.count}x)" for name in names if name.danger == danger]
        if fitting:
            yield label, f"{_some(fitting)}: {meaning}", code
    yield "", "None of these names was imported or called.", ""


def _field(label: str, value: str, code: str, style: Style) -> Iterator[str]:
    value = printable(value)
    lines = [value]
    if style.width is not None:
        lines = textwrap.wrap(value, max(style.width - 13, MIN_KEY_WIDTH), break_on_hyphens=False) or [""]
    for line in lines:
        yield f"  {style.paint(f'{label:<10}', CYAN)} {style.paint(line, code) if code else line}".rstrip()
        label = ""


def _some(items: Iterable[str], separator: str = ", ") -> str:
    every = list(items)
    more = len(every) - SHOWN_PROBLEMS
    shown = separator.join(_cut(item) for item in every[:SHOWN_PROBLEMS])
    return shown + (f" … and {more:,} more (--json lists all)" if more > 0 else "")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"


def _section_table(report: CheckpointReport, style: Style) -> Iterator[str]:
    yield style.paint(f"  {'section':<23} {'tensors':>8} {'parameters':>15} {'stored':>10}  share", DIM)
    for section in report.sections:
        stored = size(section.stored_bytes) if section.stored_bytes else "shared"
        share = section.stored_bytes / report.stored_bytes if report.stored_bytes else 0
        percent = f"{share:6.1%}" if section.stored_bytes else " " * 6
        line = f"{section.tensors:>8,} {section.parameters:>15,} {stored:>10} {percent}".rstrip()
        bar = "█" * round(share * 12) if style.width is not None else ""
        yield f"  {style.paint(f'{section.section:<23}', CYAN)} {line}" + (f" {style.paint(bar, CYAN)}" if bar else "")


# The tensors


def _table(tensors: tuple[TensorReport, ...], style: Style) -> Iterator[str]:
    """A line for each tensor; on a terminal, under the name of its section and as wide as that is."""
    offsets = any(tensor.offset_bytes is not None for tensor in tensors)
    statistics = any(tensor.statistics is not None for tensor in tensors)
    narrow = style.width is not None and style.width < MIN_STATISTICS_WIDTH
    headings = ["dtype", "shape", "bytes", *["offset"] * offsets, *_STATISTICS * (statistics and not narrow)]
    rows = [_cells(tensor, offsets=offsets, statistics=statistics and not narrow) for tensor in tensors]
    keys = [printable(tensor.key) for tensor in tensors]
    longest = max(map(len, keys))
    if style.width is None:
        widths = _widths([headings, *rows])
        yield _row("key", min(longest, MAX_PADDING), headings, widths) + "  section"
        for tensor, key, cells in zip(tensors, keys, rows, strict=True):
            yield f"{_row(key, min(longest, MAX_PADDING), cells, widths)}  {tensor.section}"
        return
    for section, group in groupby(zip(tensors, keys, rows, strict=True), key=lambda row: row[0].section):
        members = list(group)
        widths = _widths([headings, *(cells for _, _, cells in members)])
        key_width = min(longest, max(style.width - sum(widths) - 2 * len(widths) - 2, MIN_KEY_WIDTH))
        heading = _row(section, key_width + 2, headings, widths)
        yield style.paint(section, CYAN) + style.paint(heading[len(section) :], DIM)
        for tensor, key, cells in members:
            yield "  " + _row(shortened(key, key_width), key_width, cells, widths)
            if narrow and tensor.statistics is not None:
                yield from _statistics_below(tensor.statistics, style)


def _widths(rows: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _row(key: str, key_width: int, cells: list[str], widths: list[int]) -> str:
    """Key, dtype and shape to the left, numbers to the right."""
    parts = [key.ljust(key_width), cells[0].ljust(widths[0]), cells[1].ljust(widths[1])]
    parts += [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(parts)


def _cells(tensor: TensorReport, *, offsets: bool, statistics: bool) -> list[str]:
    cells = [tensor.dtype, str(tensor.shape), size(tensor.size_bytes)]
    if offsets:
        cells.append("" if tensor.offset_bytes is None else str(tensor.offset_bytes))
    if statistics:
        cells += _statistics_cells(tensor.statistics)
    return cells


def _statistics_cells(statistics: Statistics | None) -> list[str]:
    if statistics is None or statistics.not_computed is not None:
        return ["-"] * len(_STATISTICS)
    numbers = (statistics.min, statistics.max, statistics.mean, statistics.std, statistics.norm)
    counts = (statistics.nans, statistics.infs)
    return [
        *("-" if value is None else f"{value:.4g}" for value in numbers),
        "-" if statistics.zeros is None else f"{statistics.zeros:.2%}",
        *("-" if count is None else str(count) for count in counts),
    ]


def _statistics_below(statistics: Statistics, style: Style) -> Iterator[str]:
    if statistics.not_computed is not None:
        yield style.paint(f"    not computed: {statistics.not_computed}", DIM)
        return
    cells = list(zip(_STATISTICS, _statistics_cells(statistics), strict=True))
    wrong = bool(statistics.nans or statistics.infs)
    for line in (cells[:4], cells[4:]):
        text = "    " + "  ".join(f"{name:<5} {cell:<11}" for name, cell in line).rstrip()
        yield style.paint(text, RED if wrong else DIM)


def shortened(key: str, width: int) -> str:
    """The end of a key, from the start of a segment on: it tells more than the beginning, which is always the same."""
    if len(key) <= width:
        return key
    rest = key
    while len(rest) >= width and "." in rest:
        rest = rest.partition(".")[2]
    return f"…{rest[-(width - 1) :]}"


def _tree(tensors: tuple[TensorReport, ...], style: Style) -> Iterator[str]:
    opened = list(open_lines(fold(tensors)))
    lines = [line for line, _ in opened]
    labels = [_tree_label(line, is_open=is_open) for line, is_open in opened]
    details = [printable(line.detail) for line in lines]
    longest = min(max(map(len, labels)), MAX_PADDING)
    if style.width is not None:
        longest = min(longest, max(style.width - max(map(len, details)) - 14, MIN_KEY_WIDTH))
    detail_width = min(max(map(len, details)), MAX_PADDING)
    for line, label, detail in zip(lines, labels, details, strict=True):
        indented = label if len(label) <= longest or style.width is None else label[: longest - 1] + "…"
        padded = indented.ljust(longest)
        painted = style.paint(padded, CYAN) if line.depth == 0 else padded
        yield f"{painted}  {detail:<{detail_width}}  {size(line.size_bytes):>9}"
    if not all(is_open for _, is_open in opened):
        yield "… has more below it, which --keys GLOB shows"


def _tree_label(line: TreeLine, *, is_open: bool) -> str:
    times = f" ({line.times} x)" if line.times > 1 else ""
    return "  " * line.depth + printable(line.label) + times + ("" if is_open else " …")


# The heat map

_HEAT = (17, 18, 19, 20, 26, 32, 38, 37, 36, 35, 71, 107, 143, 179, 215, 221, 227)
"""Dark blue over green to yellow, in the 256 colours of terminals."""
_DARK = 8
"""How many of these need light text."""


def _heat_map(lora: LoraReport, updates: tuple[UpdateReport, ...], style: Style) -> Iterator[str]:
    """Layers x projections: how strong each update is, and how many directions it has."""
    by_place = {(update.layer, update.projection): update for update in updates}
    largest = max(update.norm for update in updates)
    scaling = number(lora.scaling) if lora.scaling is not None else "1 (not stated)"
    yield f"update: norm of scaling * B A (scaling {scaling}), and effective rank of at most {max(lora.ranks)}"
    names = " ".join(f"{name:>8}" for name in PROJECTIONS)
    yield style.paint(f"layer  {names}   {names}", DIM)
    for layer in sorted({update.layer for update in updates}):
        row = [by_place.get((layer, name)) for name in PROJECTIONS]
        strengths = [_cell(update.norm if update else None, largest, ".3g", style) for update in row]
        ranks = [_cell(update.effective_rank if update else None, max(lora.ranks), ".1f", style) for update in row]
        yield f"{layer:>5}  {' '.join(strengths)}   {' '.join(ranks)}"


def _cell(value: float | None, largest: float, form: str, style: Style) -> str:
    if value is None:
        return f"{'-':>8}"
    text = f"{value:>8{form}}"
    step = round(min(value / largest, 1) * (len(_HEAT) - 1)) if largest else 0
    return style.paint(text, f"48;5;{_HEAT[step]};38;5;{231 if step < _DARK else 16}")

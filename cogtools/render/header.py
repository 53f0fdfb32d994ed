"""The header of `inspect`: what kind of file it is, what is in it, and what that is good for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.conversion.scale import ALPHA_SOURCES
from cogtools.errors import SHOWN_PROBLEMS
from cogtools.formatting import MAX_SHOWN_CHARS, counted, fold_numbers, number
from cogtools.render.style import CYAN, DIM, GREEN, RED, YELLOW
from cogtools.render.text import printable, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cogtools.inspection.report import (
        CheckpointReport,
        ExportOutlook,
        FileReport,
        GlobalReport,
        IterationReport,
        LoraReport,
        SecondCopy,
    )
    from cogtools.render.style import Style

SHOWN_ITERATIONS = 3
"""Of many iterations so many are named at the beginning and at the end, besides the marked ones."""

SHOWN_LORA_PROBLEMS = 3

MAX_BAR_WIDTH = 12
SECTION_WIDTH = 68
"""How wide a line of the table of sections is without its bar."""

NOTEWORTHY_SHARE = 0.01
"""Storages have some bytes that no tensor views, where a trainer aligns them. From this share on it is worth a line."""


class Field(NamedTuple):
    """A line of the header; it goes on with lines that have no label."""

    label: str
    value: str
    colour: str = ""


def header_lines(report: CheckpointReport, style: Style) -> Iterator[str]:
    """The header as lines of text."""
    for field in _fields(report):
        label = field.label
        for line in style.wrapped(printable(field.value), indent=13):
            value = style.paint(line, field.colour) if field.colour else line
            yield f"  {style.paint(f'{label:<10}', CYAN)} {value}".rstrip()
            label = ""


def _fields(report: CheckpointReport) -> Iterator[Field]:
    yield Field("format", f"{report.format}, {size(report.size_bytes)}")
    yield from _files(report)
    if report.iterations:
        yield Field("iterations", _iterations(report.iterations))
    yield Field("tensors", _tensors(report))
    if report.model is not None:
        facts = f" ({report.model.layers} layers, hidden size {report.model.hidden})" if report.model.slugs else ""
        yield Field("model", report.model.name + facts)
    if report.lora is not None:
        yield from _lora(report.lora)
    else:
        yield from _lora_beside(report)
    if report.trainer:
        yield Field("trainer", ", ".join(f"{name} {value}" for name, value in report.trainer.items()))
    if report.second_copy is not None:
        yield _second_copy(report.second_copy, report.stored_bytes)
    if report.unviewed_bytes > NOTEWORTHY_SHARE * report.stored_bytes:
        unviewed = f"{size(report.unviewed_bytes)} of {size(report.stored_bytes)}"
        yield Field("unused", f"{unviewed} are in no tensor: tensors are views of larger storages", YELLOW)
    others = [entry for entry in report.entries if entry.name not in report.trainer and entry.kind != "None"]
    if others:
        yield Field("beside it", _some(entry.name for entry in others))
    entries = [entry for entry in report.not_tensors if entry.name not in report.trainer]
    if entries:
        yield Field("entries", _some(f"{entry.name} ({entry.kind})" for entry in entries))
    if report.metadata:
        yield Field("metadata", _some(f"{name}={_cut(value)}" for name, value in report.metadata.items()))
    if report.globals:
        yield from _globals(report.globals)


def _files(report: CheckpointReport) -> Iterator[Field]:
    for part in report.files[:SHOWN_PROBLEMS]:
        yield Field("", f"{_name_in(report, part)}: {counted(part.tensors, 'tensor')}, {size(part.size_bytes)}")
    more = len(report.files) - SHOWN_PROBLEMS
    if more > 0:
        yield Field("", f"… and {counted(more, 'more file')} (--json lists all)")


def _name_in(report: CheckpointReport, part: FileReport) -> str:
    """The name of a file, with its folder if that is another one than the checkpoint's: a pipeline's component."""
    folder = report.checkpoint.parent
    return str(part.file.relative_to(folder)) if part.file.is_relative_to(folder) else part.file.name


def _iterations(iterations: tuple[IterationReport, ...]) -> str:
    """The names of iterations; of many, the first and the last ones and those that are marked."""
    names = []
    for number_, iteration in enumerate(iterations):
        marks = [mark for mark, is_so in (("latest", iteration.latest), ("this one", iteration.inspected)) if is_so]
        name = iteration.name + (f" ({', '.join(marks)})" if marks else "")
        is_shown = marks or not SHOWN_ITERATIONS <= number_ < len(iterations) - SHOWN_ITERATIONS
        if is_shown:
            names.append(name)
        elif names[-1] != "…":
            names.append("…")
    in_all = f"; {len(iterations)} in all" if "…" in names else ""
    return ", ".join(names).replace(", …, ", " … ") + in_all


def _tensors(report: CheckpointReport) -> str:
    dtypes = ", ".join(
        dtype.dtype if len(report.dtypes) == 1 else f"{dtype.dtype} {size(dtype.size_bytes)}" for dtype in report.dtypes
    )
    facts = f", {report.parameters:,} parameters, {dtypes}" if report.dtypes else ""
    if not report.state_dict_tensors:
        where = {0: "", 1: ", not in a state dict"}.get(report.beside_tensors, ", none in a state dict")
        return f"{report.beside_tensors:,}{where}{facts}"
    where = f" in {_cut(report.wrapper)!r}" if report.wrapper else ""
    beside = f"; {report.beside_tensors:,} more beside them" if report.beside_tensors else ""
    return f"{report.state_dict_tensors:,}{where}{facts}{beside}"


def _lora_beside(report: CheckpointReport) -> Iterator[Field]:
    """What to say of LoRA tensors whose keys are spread over nested dicts."""
    tensors = next((section.tensors for section in report.sections if section.section == "lora"), 0)
    if tensors:
        yield Field("LoRA", f"{counted(tensors, 'tensor')} of one, but not in the state dict (see --lora)", YELLOW)
        yield Field("exports to", "nothing: its keys are spread over nested dicts")


def _second_copy(copy: SecondCopy, stored_bytes: int) -> Field:
    if copy.checked == copy.tensors:
        certainty = "their CRC-32s are equal"
    elif copy.checked:
        certainty = f"{copy.checked:,} have equal CRC-32s, the others equal keys and shapes"
    else:
        certainty = "their keys and shapes are equal; there are no CRC-32s to compare"
    share = f"{size(copy.size_bytes)} of {size(stored_bytes)}"
    return Field("twice", f"{share} are a second copy: {counted(copy.tensors, 'tensor')} ({certainty})", YELLOW)


def _lora(lora: LoraReport) -> Iterator[Field]:
    state = {True: "complete", False: "not complete", None: "in a layout that is not known"}[lora.complete]
    facts = [f"{counted(len(lora.layers), 'layer')} ({fold_numbers(lora.layers)})"] if lora.layers else []
    facts += [f"rank{'s' if len(lora.ranks) > 1 else ''} {', '.join(map(str, lora.ranks))}"] if lora.ranks else []
    facts += [", ".join(lora.dtypes)] if lora.dtypes else []
    facts += [counted(lora.tensors, "tensor"), size(lora.size_bytes)]
    layout = "" if lora.complete is None else f" ({lora.names or f'{lora.layout} layout'})"
    yield Field("LoRA", f"{state}: {', '.join(facts)}{layout}", GREEN if lora.complete else YELLOW)
    if lora.missing:
        yield Field("missing", _some(lora.missing, "; "), YELLOW)
    if lora.unplaced:
        label = "its keys" if lora.complete is None else "unexpected"
        yield Field(label, _some(lora.unplaced), YELLOW)
    yield from _alpha(lora)
    yield from _export(lora.export)


def _alpha(lora: LoraReport) -> Iterator[Field]:
    if lora.alpha is not None:
        source = ALPHA_SOURCES.get(lora.alpha_source or "", "")
        yield Field("alpha", f"{number(lora.alpha)} ({source}){_scaling(lora, lora.alpha)}")
    elif lora.misstated:
        yield Field("alpha", f"cannot be used: {lora.misstated[0]}", YELLOW)
    elif lora.alpha_source is not None:
        yield Field("alpha", f"different by module ({ALPHA_SOURCES[lora.alpha_source]}){_scalings(lora)}")
    elif lora.layout is not None and lora.unstated_scaling is not None:
        yield Field("alpha", f"not stated: {lora.reader} runs it at scaling {number(lora.unstated_scaling)}", YELLOW)
    elif lora.layout is not None:
        yield Field("alpha", f"not stated: {lora.reader} loads nothing without it", YELLOW)


def _scaling(lora: LoraReport, alpha: float) -> str:
    if len(lora.scalings) != 1:
        return _scalings(lora)
    (scaling,) = lora.scalings
    is_quotient = len(lora.ranks) == 1 and lora.ranks[0] > 0 and alpha / lora.ranks[0] == scaling
    return f", scaling {f'{number(alpha)}/{lora.ranks[0]} = ' if is_quotient else ''}{number(scaling)}"


def _scalings(lora: LoraReport) -> str:
    shown = ", ".join(map(number, lora.scalings[:SHOWN_PROBLEMS]))
    return f", scaling {shown} by module" if shown else ""


def _export(outlook: ExportOutlook) -> Iterator[Field]:
    """What export-lora would make of the LoRA."""
    if outlook.possible:
        yield Field("exports to", f"{outlook.tensors} tensors, {size(outlook.size_bytes)}, in diffusers' layout")
        for text in outlook.notices:
            yield Field("", text)
        return
    found = f" (found: {outlook.found})" if outlook.found else ""
    yield Field("no export", f"{outlook.reason}{found}", YELLOW)
    for problem in outlook.problems[:SHOWN_LORA_PROBLEMS]:
        yield Field("", str(problem))
    more = len(outlook.problems) - SHOWN_LORA_PROBLEMS
    if more > 0:
        yield Field("", f"… and {counted(more, 'more problem')} (--json lists all)")
    if outlook.hint is not None:
        yield Field("", f"try: {outlook.hint}")


def _globals(names: tuple[GlobalReport, ...]) -> Iterator[Field]:
    """The names in the pickle, by how dangerous they are."""
    labels = {
        "dangerous": ("DANGER", "can run code if this file is loaded elsewhere", RED),
        "unknown": ("unknown", "not known here", YELLOW),
        "harmless": ("harmless", "known", ""),
    }
    for danger, (label, meaning, code) in labels.items():
        fitting = [f"{_cut(name.name)} ({name.count}x)" for name in names if name.danger == danger]
        if fitting:
            yield Field(label, f"{_some(fitting)}: {meaning}", code)
    yield Field("", "None of these names was imported or called.")


def _some(items: Iterable[str], separator: str = ", ") -> str:
    every = list(items)
    more = len(every) - SHOWN_PROBLEMS
    shown = separator.join(_cut(item) for item in every[:SHOWN_PROBLEMS])
    return shown + (f" … and {more:,} more (--json lists all)" if more > 0 else "")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"


def section_lines(report: CheckpointReport, style: Style) -> Iterator[str]:
    """The table of sections as lines of text."""
    bar_width = 0 if style.width is None else min(MAX_BAR_WIDTH, max(style.width - SECTION_WIDTH - 1, 0))
    yield style.paint(f"  {'section':<23} {'tensors':>8} {'parameters':>15} {'stored':>10}  share", DIM)
    for section in report.sections:
        stored = size(section.stored_bytes) if section.stored_bytes else "shared"
        share = section.stored_bytes / report.stored_bytes if report.stored_bytes else 0
        percent = f"{share:6.1%}" if section.stored_bytes else " " * 6
        line = f"{section.tensors:>8,} {section.parameters:>15,} {stored:>10} {percent}".rstrip()
        bar = "█" * round(share * bar_width)
        yield f"  {style.paint(f'{section.section:<23}', CYAN)} {line}" + (f" {style.paint(bar, CYAN)}" if bar else "")

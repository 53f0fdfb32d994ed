"""The header of `inspect`: what kind of file it is, what is in it, and what can be done with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.conversion.scale import ALPHA_SOURCES
from cogtools.errors import SHOWN_PROBLEMS
from cogtools.formatting import counted, first_of, fold_numbers, number, size, truncate
from cogtools.render.lines import Line
from cogtools.render.readers import reader_lines

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
    from cogtools.render.lines import Output

SHOWN_ITERATIONS = 3
"""Of many iterations, so many are named at the beginning and at the end, besides the marked ones."""

SHOWN_LORA_PROBLEMS = 3

MAX_BAR_WIDTH = 12
SECTION_WIDTH = 68
"""How wide a line of the table of sections is without its bar."""

NOTEWORTHY_SHARE = 0.01
"""Storages have some bytes that no tensor views, where a trainer aligns them. From this share on it is worth a line."""


def _field(label: str, value: str, style: str = "") -> Line:
    """A line of the header; what goes on with the one above it has no label."""
    return Line((f"  {label:<10} ", "cyan"), (value, style), wrap=True)


def header_lines(report: CheckpointReport) -> Iterator[Line]:
    """The header as lines of text."""
    yield _field("format", f"{report.format}, {size(report.size_bytes)}")
    yield from _files(report)
    if report.iterations:
        yield _field("iterations", _iterations(report.iterations))
    yield _field("tensors", _tensors(report))
    if report.model is not None:
        facts = f" ({report.model.layers} layers, hidden size {report.model.hidden})" if report.model.slugs else ""
        yield _field("model", report.model.name + facts)
    if report.lora is not None:
        yield from _lora(report.lora)
    elif report.other_adapter is None:
        yield from _lora_beside(report)
    else:
        adapter = report.other_adapter
        yield _field("adapter", f"{adapter.name}, not a LoRA: load it with {adapter.readers}", "yellow")
    if report.trainer:
        yield _field("trainer", ", ".join(f"{name} {value}" for name, value in report.trainer.items()))
    if report.second_copy is not None:
        yield _second_copy(report.second_copy, report.stored_bytes)
    if report.unviewed_bytes > NOTEWORTHY_SHARE * report.stored_bytes:
        unviewed = f"{size(report.unviewed_bytes)} of {size(report.stored_bytes)}"
        yield _field("unused", f"{unviewed} belong to no tensor: tensors are views of larger storages", "yellow")
    others = [entry for entry in report.entries if entry.name not in report.trainer and entry.kind != "None"]
    if others:
        yield _field("also holds", _some(entry.name for entry in others))
    entries = [entry for entry in report.not_tensors if entry.name not in report.trainer]
    if entries:
        yield _field("entries", _some(f"{entry.name} ({entry.kind})" for entry in entries))
    if report.metadata:
        yield _field("metadata", _some(f"{name}={truncate(value)}" for name, value in report.metadata.items()))
    if report.globals:
        yield from _globals(report.globals)


def _files(report: CheckpointReport) -> Iterator[Line]:
    files = [
        f"{_name_in(report, part)}: {counted(part.tensors, 'tensor')}, {size(part.size_bytes)}" for part in report.files
    ]
    yield from (_field("", text) for text in first_of(files, SHOWN_PROBLEMS))


def _name_in(report: CheckpointReport, part: FileReport) -> str:
    """The name of a file, with its folder where that is not the checkpoint's: a component of a pipeline."""
    folder = f"{report.checkpoint.parent}/"
    return str(part.file).removeprefix(folder) if str(part.file).startswith(folder) else part.file.name


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
    where = f" in {truncate(report.wrapper)!r}" if report.wrapper else ""
    beside = f"; {report.beside_tensors:,} more outside the state dict" if report.beside_tensors else ""
    return f"{report.state_dict_tensors:,}{where}{facts}{beside}"


def _lora_beside(report: CheckpointReport) -> Iterator[Line]:
    """LoRA tensors whose keys are spread over nested dicts."""
    tensors = next((section.tensors for section in report.sections if section.section == "lora"), 0)
    if tensors:
        yield _field("LoRA", f"{counted(tensors, 'tensor')}, but not in the state dict (see --lora)", "yellow")
        yield _field("exports to", "nothing: its keys are spread over nested dicts")


def _second_copy(copy: SecondCopy, stored_bytes: int) -> Line:
    if copy.checked == copy.tensors:
        certainty = "their CRC-32s are equal"
    elif copy.checked:
        certainty = f"{copy.checked:,} have equal CRC-32s, the others equal keys and shapes"
    else:
        certainty = "their keys and shapes are equal; there are no CRC-32s to compare"
    share = f"{size(copy.size_bytes)} of {size(stored_bytes)}"
    return _field("twice", f"{share} are a second copy: {counted(copy.tensors, 'tensor')} ({certainty})", "yellow")


def _lora(lora: LoraReport) -> Iterator[Line]:
    state = {True: "complete", False: "incomplete", None: "unknown layout"}[lora.complete]
    facts = [f"{counted(len(lora.layers), 'layer')} ({fold_numbers(lora.layers)})"] if lora.layers else []
    facts += [f"rank{'s' if len(lora.ranks) > 1 else ''} {', '.join(map(str, lora.ranks))}"] if lora.ranks else []
    facts += [", ".join(lora.dtypes)] if lora.dtypes else []
    facts += [counted(lora.tensors, "tensor"), size(lora.size_bytes)]
    layout = "" if lora.complete is None else f" ({lora.names or f'{lora.layout} layout'})"
    yield _field("LoRA", f"{state}: {', '.join(facts)}{layout}", "green" if lora.complete else "yellow")
    if lora.missing:
        yield _field("missing", _some(lora.missing, "; "), "yellow")
    if lora.unplaced:
        label = "keys" if lora.complete is None else "unexpected"
        yield _field(label, _some(lora.unplaced), "yellow")
    yield from _alpha(lora)
    yield from (_field(label, text) for label, text in reader_lines(lora.readers))
    yield from _export(lora.export)


def _alpha(lora: LoraReport) -> Iterator[Line]:
    if lora.alpha is not None:
        source = ALPHA_SOURCES.get(lora.alpha_source or "", "")
        yield _field("alpha", f"{number(lora.alpha)} ({source}){_scaling(lora, lora.alpha)}")
    elif lora.misstated:
        yield _field("alpha", f"cannot be used: {lora.misstated[0]}", "yellow")
    elif lora.alpha_source is not None:
        yield _field("alpha", f"different by module ({ALPHA_SOURCES[lora.alpha_source]}){_scalings(lora)}")
    elif lora.layout is not None and lora.unstated_scaling is not None:
        yield _field("alpha", f"not stated: {lora.reader} runs it at scaling {number(lora.unstated_scaling)}", "yellow")
    elif lora.layout is not None:
        yield _field("alpha", f"not stated: {lora.reader} loads nothing without it", "yellow")


def _scaling(lora: LoraReport, alpha: float) -> str:
    if len(lora.scalings) != 1:
        return _scalings(lora)
    (scaling,) = lora.scalings
    is_quotient = len(lora.ranks) == 1 and lora.ranks[0] > 0 and alpha / lora.ranks[0] == scaling
    return f", scaling {f'{number(alpha)}/{lora.ranks[0]} = ' if is_quotient else ''}{number(scaling)}"


def _scalings(lora: LoraReport) -> str:
    shown = ", ".join(map(number, lora.scalings[:SHOWN_PROBLEMS]))
    return f", scaling {shown} by module" if shown else ""


def _export(outlook: ExportOutlook) -> Iterator[Line]:
    """What export-lora would make of the LoRA."""
    if outlook.possible:
        yield _field("exports to", f"{outlook.tensors} tensors, {size(outlook.size_bytes)}, in diffusers' layout")
        for text in outlook.notices:
            yield _field("", text)
        yield _field("formats", ", ".join(outlook.formats))
        if outlook.hint is not None:
            yield _field("", f"try: {outlook.hint}")
        return
    found = f" (found: {outlook.found})" if outlook.found else ""
    yield _field("no export", f"{outlook.reason}{found}", "yellow")
    for text in first_of([str(problem) for problem in outlook.problems], SHOWN_LORA_PROBLEMS):
        yield _field("", text)
    if outlook.hint is not None:
        yield _field("", f"try: {outlook.hint}")


def _globals(names: tuple[GlobalReport, ...]) -> Iterator[Line]:
    """The names in the pickle, by how dangerous they are."""
    labels = {
        "dangerous": ("DANGER", ": can run code if this file is loaded elsewhere", "bold red"),
        "unknown": ("unknown", ": not known to be harmless", "yellow"),
        "harmless": ("harmless", "", ""),
    }
    for danger, (label, meaning, style) in labels.items():
        fitting = [f"{truncate(name.name)} ({name.count}x)" for name in names if name.danger == danger]
        if fitting:
            yield _field(label, f"{_some(fitting)}{meaning}", style)
    yield _field("", "None of these names was imported or called.")


def _some(items: Iterable[str], separator: str = ", ") -> str:
    every = list(items)
    more = len(every) - SHOWN_PROBLEMS
    shown = separator.join(truncate(item) for item in every[:SHOWN_PROBLEMS])
    return shown + (f" … and {more:,} more (--json lists all)" if more > 0 else "")


def section_lines(report: CheckpointReport, output: Output) -> Iterator[Line]:
    """The table of sections as lines of text; with a bar where a terminal has room for it."""
    bar_width = 0 if output.width is None else min(MAX_BAR_WIDTH, max(output.width - SECTION_WIDTH - 1, 0))
    yield Line((f"  {'section':<23} {'tensors':>8} {'parameters':>15} {'stored':>10}  share", "dim"))
    for section in report.sections:
        stored = size(section.stored_bytes) if section.stored_bytes else "shared"
        share = section.stored_bytes / report.stored_bytes if report.stored_bytes else 0
        percent = f"{share:6.1%}" if section.stored_bytes else ""
        facts = f" {section.tensors:>8,} {section.parameters:>15,} {stored:>10} {percent}".rstrip()
        bar = f" {'█' * round(share * bar_width)}".rstrip()
        yield Line((f"  {section.section:<23}", "cyan"), facts, (bar, "cyan"))

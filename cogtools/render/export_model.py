"""What `export-model` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.errors import command
from cogtools.formatting import counted, size
from cogtools.render.text import notice, show

if TYPE_CHECKING:
    from cogtools.export.model_report import ModelExportReport, ModelPlanReport, PartReport, TensorReport

_COLUMN = 10


def show_model_export(report: ModelExportReport) -> None:
    """Print what was found and written, and how to load it."""
    for text in report.notices:
        notice(text)
    show(*summary(report))


def summary(report: ModelExportReport) -> list[str]:
    """The result in a few lines; for a dry run a line for each tensor before it."""
    rows = []
    if report.model is not None:
        known_by = f" (as {report.known_by} say)" if report.known_by in _SAY else ""
        rows.append(("model", report.model + known_by))
    rows.append(("written" if report.written else "to write", f"{report.output}: {size(report.size_bytes)}"))
    rows += [("", text) for text in part_lines(report)]
    rows += missing_rows(report, completed_by="--base PIPELINE")
    if report.crc32 == "checked":
        rows.append(("checked", "the CRC-32s of the weights that were read"))
    lines = [] if report.plan is None else [*plan_lines(report.plan), ""]
    lines += [f"{name:<{_COLUMN}}{value}" for name, value in rows]
    if not report.written:
        return lines
    check = command("verify", report.output, "--against", report.checkpoint).command
    return [*lines, "", *loading_lines(report), f"Check every value of it: {check}"]


def part_lines(report: ModelExportReport) -> list[str]:
    """A line for each part."""
    width = max(len(part.name) for part in report.parts)
    return [f"{part.name:<{width}}  {_about(part)}" for part in report.parts]


def missing_rows(report: ModelExportReport, *, completed_by: str | None = None) -> list[tuple[str, str]]:
    """The parts of a pipeline that were not written, in a row, and what adds them; [] if all were."""
    if not report.missing:
        return []
    advice = f" ({completed_by} completes it)" if completed_by is not None else ""
    return [("missing", f"{', '.join(report.missing)}: this is not a whole pipeline{advice}")]


def loading_lines(report: ModelExportReport) -> list[str]:
    """How to load what was written."""
    how = "Load it in SAT's configuration, under args:" if report.format == "sat" else "Load it:"
    return [how, *(f"    {line}" for line in report.load.splitlines())]


_SAY = ("its sizes", "its layers and hidden size", "its positional keys")


def _about(part: PartReport) -> str:
    """What is in a part's folder."""
    weights = [name for name in part.files if name.endswith((".safetensors", ".pt", ".bin"))]
    if not part.tensors:
        return f"a copy of {part.source}, {size(part.size_bytes)}" if part.source else size(part.size_bytes)
    files = counted(len(weights), "file")
    return f"{counted(part.tensors, 'tensor')}, {' and '.join(part.dtype)}, {size(part.size_bytes)} in {files}"


def plan_lines(plan: ModelPlanReport) -> list[str]:
    """What becomes of every tensor: its key, its shape, and the rows that it consists of."""
    width = max((len(tensor.key) for tensor in plan.tensors), default=0)
    lines = [f"{tensor.part}  {tensor.key:<{width}}  {_shape(tensor)}  {_sources(tensor)}" for tensor in plan.tensors]
    return lines + [f"left out  {item.key}  ({item.reason})" for item in plan.left_out]


def _shape(tensor: TensorReport) -> str:
    return f"{tensor.dtype} ({','.join(map(str, tensor.shape))})"


def _sources(tensor: TensorReport) -> str:
    """The rows of each source, as Python writes slices."""
    rows: dict[str, list[str]] = {}
    for source in tensor.sources:
        rows.setdefault(source.key, []).append(f"{source.first}:{source.last}")
    return " + ".join(f"{key}[{', '.join(slices)}]" for key, slices in rows.items()) or "made up"

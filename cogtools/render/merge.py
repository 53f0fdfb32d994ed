"""What `merge` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.conversion.scale import ALPHA_SOURCES
from cogtools.errors import command
from cogtools.formatting import number, percent, size
from cogtools.render.export import how_to_load, lost
from cogtools.render.export_model import loading_lines, missing_rows, part_lines, plan_lines
from cogtools.render.text import notice, show

if TYPE_CHECKING:
    from cogtools.conversion.loss import LossReport
    from cogtools.export.merge import MergedLora, MergeReport


def show_merge(report: MergeReport) -> None:
    """Print what was found and written, and how to load it."""
    for text in report.notices:
        notice(text)
    show(*summary(report))


def summary(report: MergeReport) -> list[str]:
    """The result in a few lines; for a dry run of a model a line for each tensor before it."""
    exported = report.exported
    rank = "different by module" if report.rank is None else report.rank
    rows = [("model", report.model)]
    rows += [] if report.base is None else [("base", str(report.base))]
    rows += [("LoRA", _lora(lora)) for lora in report.loras]
    if exported is None:
        rows.append(("merged", f"a LoRA, {report.modules} modules, rank {rank}, scaling 1"))
        about = f"{report.tensors} tensors, {report.dtype}, {size(report.size_bytes)}"
    else:
        rows.append(("merged", f"into {report.modules} modules of the base"))
        about = size(report.size_bytes)
    rows.append(("written" if report.written else "to write", f"{report.output}: {about}"))
    if exported is None:
        rows += [("", str(file)) for file in report.files if file != report.output]
    else:
        rows += [("", text) for text in part_lines(exported)]
        rows += missing_rows(exported)
    if report.largest_relative_error is not None:
        rows.append(("rounding", f"largest relative error of any tensor {report.largest_relative_error:.2g}"))
    if report.lost is not None:
        rows += _lost_in_rounding(report.lost) if exported else [("cut", f"to rank {rank}: {lost(report.lost)}")]
    if report.crc32 == "checked":
        rows.append(("checked", "the CRC-32s of the weights that were read"))
    lines = [] if exported is None or exported.plan is None else [*plan_lines(exported.plan), ""]
    lines += [f"{name:<9} {value}".rstrip() for name, value in rows]
    if not report.written:
        return lines
    if exported is not None:
        loras = [lora.file for lora in report.loras]
        loras = [] if loras == [report.base] else loras  # its own LoRA, which is known by the base's name
        check = command("verify", report.output, "--against", report.base, *loras).command
        return [*lines, "", *loading_lines(exported), f"Check every value of it: {check}"]
    return [*lines, "", *how_to_load(
        report.format, report.output, report.folder, rank=report.rank, alpha=str(rank), pipeline=report.pipeline
    )]  # fmt: skip


def _lost_in_rounding(report: LossReport) -> list[tuple[str, str]]:
    """How much of the LoRA rounding loses: of all, and of each kind of module from the least to the most."""
    kinds: dict[str, list[float]] = {}
    for module in report.modules:
        kinds.setdefault(module.name, []).append(module.lost)
    rows = [("lost", f"{percent(report.lost)} of the LoRA, in the rounding")]
    width = max(map(len, kinds))
    for name, found in kinds.items():
        least, most = percent(min(found)), percent(max(found))
        shown = most if least == most else f"{least} to {most}"
        rows.append(("", f"{name:<{width}}  {shown}" + (f" in {len(found)} modules" if len(found) > 1 else "")))
    return rows


def _lora(lora: MergedLora) -> str:
    """A LoRA that was merged, and how strongly."""
    rank = "of different ranks" if lora.rank is None else f"of rank {lora.rank}"
    scaling = "different scalings" if lora.scaling is None else f"scaling {number(lora.scaling)}"
    return (
        f"{lora.file}: {lora.modules} modules {rank}, {scaling} ({ALPHA_SOURCES[lora.alpha_source]}), "
        f"weight {number(lora.weight)}"
    )

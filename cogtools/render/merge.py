"""What `merge` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.conversion.scale import ALPHA_SOURCES
from cogtools.formatting import number, size
from cogtools.render.export import loading_call, lost
from cogtools.render.text import notice, show

if TYPE_CHECKING:
    from cogtools.export.merge import MergedLora, MergeReport


def show_merge(report: MergeReport) -> None:
    """Print what was found and written, and how to load it."""
    for text in report.notices:
        notice(text)
    show(*summary(report))


def summary(report: MergeReport) -> list[str]:
    """The result in a few lines."""
    rows = [("model", report.model)]
    rows += [("LoRA", _lora(lora)) for lora in report.loras]
    rank = "different by module" if report.rank is None else report.rank
    what = f"a LoRA, {report.modules} modules, rank {rank}, scaling 1"
    rows.append(("merged", what))
    rows.append(
        (
            "written" if report.written else "to write",
            f"{report.output}: {report.tensors} tensors, {report.dtype}, {size(report.size_bytes)}",
        )
    )
    if report.largest_relative_error is not None:
        rows.append(("rounding", f"largest relative error of any tensor {report.largest_relative_error:.2g}"))
    if report.lost is not None:
        rows.append(("cut", f"to rank {rank}: {lost(report.lost)}"))
    if report.crc32 == "checked":
        rows.append(("checked", "the CRC-32s of the weights that were read"))
    lines = [f"{name:<9} {value}" for name, value in rows]
    if report.written:
        lines += ["", "Load it at weight 1.0: all scalings and weights are multiplied in:",
                  f"    {loading_call(report.output)}"]  # fmt: skip
    return lines


def _lora(lora: MergedLora) -> str:
    """A LoRA that was merged, and how strongly."""
    rank = "of different ranks" if lora.rank is None else f"of rank {lora.rank}"
    scaling = "different scalings" if lora.scaling is None else f"scaling {number(lora.scaling)}"
    return (
        f"{lora.file}: {lora.modules} modules {rank}, {scaling} ({ALPHA_SOURCES[lora.alpha_source]}), "
        f"weight {number(lora.weight)}"
    )

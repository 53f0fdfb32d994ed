"""What `export-lora` says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cogtools.layouts.cogvideox import PROJECTIONS
from cogtools.render.text import emit, notice, number, printable, size, talk
from cogtools.words import ALPHA_SOURCES

if TYPE_CHECKING:
    from cogtools.batch import BatchItem, BatchReport
    from cogtools.convert import ExportReport


def show_export(report: ExportReport) -> None:
    """Print what was found and written, and how to load it."""
    for text in report.notices:
        notice(text)
    emit(summary(report))


def summary(report: ExportReport) -> str:
    """The result in a few lines."""
    modules = len(report.layers) * len(PROJECTIONS)
    rows = [
        ("model", report.model),
        ("LoRA", f"{len(report.layers)} layers, {modules} modules, rank {report.rank}, {report.source_dtype}"),
        ("alpha", f"{number(report.alpha)} ({ALPHA_SOURCES[report.alpha_source]}), {_scaling(report)}"),
        (
            "written" if report.written else "to write",
            f"{report.output}: {report.tensors} tensors, {report.dtype}, {size(report.size_bytes)}",
        ),
    ]
    if report.largest_relative_error is not None:
        rows.append(("rounding", f"largest relative error of a tensor {report.largest_relative_error:.2g}"))
    if report.crc32 == "checked":
        rows.append(("checked", "the CRC-32s of the weights that were read"))
    if report.sha256 is not None:
        rows.append(("sha256", report.sha256))
    lines = [f"{name:<9} {printable(value)}" for name, value in rows]
    if report.written:
        lines += ["", *_how_to_load(report)]
    return "\n".join(lines)


def _scaling(report: ExportReport) -> str:
    scaling = f"scaling {number(report.alpha)}/{report.rank} = {number(report.scaling)}"
    ways = {"metadata": "stated in the header", "fold": "multiplied in", "none": "not in the file"}
    return f"{scaling}, {ways[report.scale]}"


def _how_to_load(report: ExportReport) -> list[str]:
    folder, name = _literal(str(report.output.parent)), _literal(report.output.name)
    call = f'pipe.load_lora_weights({folder}, weight_name={name}, adapter_name="lora")'
    if report.scale == "none":
        return ["Load it, and bring the scale yourself:", f"    {call}",
                f'    pipe.set_adapters("lora", {number(report.scaling)})']  # fmt: skip
    return ["Load it at weight 1.0, for the scale is in the file (no set_adapters or fuse_lora with 1/rank):",
            f"    {call}"]  # fmt: skip


def _literal(text: str) -> str:
    """A text as Python code has it; JSON's strings are Python's too, but for how they escape."""
    return printable(json.dumps(text, ensure_ascii=False))


def show_batch_item(item: BatchItem, *, quiet: bool = False) -> None:
    """Print what became of one checkpoint of several, in a line."""
    if item.error is not None:
        found = f" (found: {item.error['found']})" if item.error["found"] else ""
        talk(printable(f"failed   {item.checkpoint}: {item.error['what']}{found}"))
    elif not quiet:
        emit(printable(f"{item.status:<8} {item.output}{_told(item)}"))


def _told(item: BatchItem) -> str:
    report = item.report
    if report is None:
        return ": there already, and verifies"
    scaling = f"scaling {number(report.alpha)}/{report.rank}"
    return f": {report.tensors} tensors, {report.dtype}, {size(report.size_bytes)}, {scaling}"


def show_batch(report: BatchReport) -> None:
    """Print the sum of it."""
    emit(f"{report.done} done, {report.skipped} skipped, {report.failed} failed")
    for text in dict.fromkeys(text for item in report.exports if item.report for text in item.report.notices):
        notice(text)

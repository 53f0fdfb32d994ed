"""What `export-lora` prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cogtools.conversion.scale import ALPHA_SOURCES
from cogtools.formatting import number, percent, size
from cogtools.render.text import notice, shortened, show, talk

if TYPE_CHECKING:
    from pathlib import Path

    from cogtools.conversion.loss import LossReport
    from cogtools.errors import CogtoolsError
    from cogtools.export.batch import BatchItem, BatchReport
    from cogtools.export.export import ExportReport


def show_export(report: ExportReport) -> None:
    """Print what was found and written, and how to load it."""
    for text in report.notices:
        notice(text)
    show(*summary(report))


def summary(report: ExportReport) -> list[str]:
    """The result in a few lines."""
    rank = "different by module" if report.rank is None else report.rank
    rows = [
        ("model", report.model),
        ("LoRA", f"{len(report.layers)} layers, {report.modules} modules, rank {rank}, {report.source_dtype}"),
        ("alpha", _scale(report)),
        (
            "written" if report.written else "to write",
            f"{report.output}: {report.tensors} tensors, {report.dtype}, {size(report.size_bytes)}",
        ),
    ]
    if report.largest_relative_error is not None:
        rows.append(("rounding", f"largest relative error of any tensor {report.largest_relative_error:.2g}"))
    if report.lost is not None:
        rows.append(("cut", f"to rank {rank}: {lost(report.lost)}"))
    if report.crc32 == "checked":
        rows.append(("checked", "the CRC-32s of the weights that were read"))
    if report.sha256 is not None:
        rows.append(("sha256", report.sha256))
    lines = [f"{name:<9} {value}" for name, value in rows]
    if report.written:
        lines += ["", *_how_to_load(report)]
    return lines


def lost(report: LossReport) -> str:
    """How much of a LoRA is lost, and where most."""
    worst = report.worst
    return f"{percent(report.lost)} of the LoRA is lost; most, {percent(worst.lost)}, in {worst.module}"


def _scale(report: ExportReport) -> str:
    """The scale, who states it, and how the file carries it."""
    alpha = "different by module" if report.alpha is None else number(report.alpha)
    if report.alpha is None and report.scaling is not None:
        alpha = "not stated"
    return f"{alpha} ({ALPHA_SOURCES[report.alpha_source]}), scaling {_scaling(report)}, {_CARRIED[report.scale]}"


_CARRIED = {"metadata": "stated in the header", "fold": "multiplied in", "none": "not in the file"}


def _scaling(report: ExportReport) -> str:
    """The scaling, as the quotient that it is where all modules have one alpha and one rank."""
    if report.scaling is None:
        return "different by module"
    if report.alpha is None or report.rank is None or report.alpha / report.rank != report.scaling:
        return number(report.scaling)
    return f"{number(report.alpha)}/{report.rank} = {number(report.scaling)}"


def _how_to_load(report: ExportReport) -> list[str]:
    call = loading_call(report.output)
    weight = "…" if report.scaling is None else number(report.scaling)
    if report.scale == "none":
        return ["Load it and apply the scale:", f"    {call}",
                f'    pipe.set_adapters("lora", {weight})']  # fmt: skip
    return ["Load it at weight 1.0: the scale is already in the file (no set_adapters or fuse_lora with 1/rank):",
            f"    {call}"]  # fmt: skip


def loading_call(path: Path) -> str:
    """The call with which diffusers loads a LoRA."""
    folder, name = _literal(str(path.parent)), _literal(path.name)
    return f'pipe.load_lora_weights({folder}, weight_name={name}, adapter_name="lora")'


def _literal(text: str) -> str:
    """A text as a string in Python code: JSON's strings are valid there."""
    return json.dumps(text, ensure_ascii=False)


def show_batch_item(item: BatchItem, *, quiet: bool = False) -> None:
    """Print the result of one checkpoint of several: a line, and one with a hint if it failed."""
    if item.error is not None:
        talk(shortened(f"failed   {item.checkpoint}: {_why(item.error)}"))
        if item.error.hint is not None:
            talk(shortened(f"         try: {item.error.hint}"))
    elif not quiet:
        report = item.report
        if report is None:
            show(shortened(f"{item.status:<8} {item.output or item.checkpoint}: {item.reason}"))
        else:
            show(shortened(f"{'done    ' if report.written else 'would write'} {item.output}: {_in_short(report)}"))


def _why(error: CogtoolsError) -> str:
    """What failed, what was found, and the first problem."""
    details = [f"found: {error.found}"] if error.found else []
    if error.problems:
        more = f" and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
        details.append(f"{error.problems[0]}{more}")
    return error.what + (f" ({'; '.join(details)})" if details else "")


def _in_short(report: ExportReport) -> str:
    scaling = f"scaling {_scaling(report).partition(' = ')[0]}"
    parts = [f"{report.tensors} tensors", report.dtype, size(report.size_bytes), scaling]
    return ", ".join([*parts, f"sha256 {report.sha256}"] if report.sha256 else parts)


def show_batch(report: BatchReport) -> None:
    """Print how many were exported, and each notice once, with the checkpoints that it is about unless it is all."""
    exports = [(item.checkpoint, item.report) for item in report.exports if item.report is not None]
    done = "would be written" if any(not export.written for _, export in exports) else "done"
    show(f"{report.done} {done}, {report.skipped} skipped, {report.failed} failed")
    named: dict[str, list[str]] = {}
    for checkpoint, export in exports:
        for text in export.notices:
            named.setdefault(text, []).append(checkpoint)
    for text, checkpoints in named.items():
        if len(checkpoints) == len(exports):
            notice(text)
        elif len(checkpoints) == 1:
            notice(f"{checkpoints[0]}: {text}")
        else:
            notice(f"{len(checkpoints)} of {len(exports)} checkpoints: {text}")

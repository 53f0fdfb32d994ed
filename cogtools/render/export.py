"""What `export-lora` prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.conversion.scale import ALPHA_SOURCES
from cogtools.errors import command
from cogtools.formatting import number, percent, python_literal, size
from cogtools.layouts.recognition import BY_NAME
from cogtools.render.text import notice, show
from cogtools.render.verify import show_verification

if TYPE_CHECKING:
    from cogtools.conversion.loss import LossReport
    from cogtools.conversion.options import Format
    from cogtools.export.export import ExportReport
    from cogtools.layouts.lora import ScalePlace


def show_export(report: ExportReport, *, quiet: bool = False) -> None:
    """Print what was found and written, how to load it, and how to check it; if quiet, only what is wrong with it."""
    for text in () if quiet else report.notices:
        notice(text)
    if not quiet:
        show(*summary(report), *_how_to_check(report))
    if report.verification is not None:
        if not quiet:
            show("")
        show_verification(replace(report.verification, notices=()), quiet=quiet)


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
        *(("", str(file)) for file in report.files if file != report.output),
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


def _how_to_check(report: ExportReport) -> list[str]:
    """The next command, if there is one: the same export checks all values itself with --verify."""
    if not report.written or report.verification is not None:
        return []
    check = command("verify", report.output, "--against", report.checkpoint).command
    return [f"Check every value of it (or export with --verify): {check}"]


def lost(report: LossReport) -> str:
    """How much of a LoRA is lost, and where most."""
    worst = report.worst
    return f"{percent(report.lost)} of the LoRA is lost; most, {percent(worst.lost)}, in {worst.module}"


def _scale(report: ExportReport) -> str:
    """The scale, who states it, and how the file carries it."""
    alpha = "different by module" if report.alpha is None else number(report.alpha)
    if report.alpha is None and report.scaling is not None:
        alpha = "not stated"
    carried = {"fold": "multiplied in", "none": "not in the file"}.get(report.scale)
    carried = carried or _STATED[BY_NAME[report.format].scale]
    return f"{alpha} ({ALPHA_SOURCES[report.alpha_source]}), scaling {scaling_of(report)}, {carried}"


_STATED: dict[ScalePlace, str] = {
    "header": "stated in the header",
    "adapter_config": "stated in adapter_config.json",
    "alpha_tensors": "stated in alpha tensors",
    "training_config": "stated in training_config.yaml",
}


def scaling_of(report: ExportReport) -> str:
    """The scaling, as the quotient that it is where all modules have one alpha and one rank."""
    if report.scaling is None:
        return "different by module"
    if report.alpha is None or report.rank is None or report.alpha / report.rank != report.scaling:
        return number(report.scaling)
    return f"{number(report.alpha)}/{report.rank} = {number(report.scaling)}"


def _how_to_load(report: ExportReport) -> list[str]:
    alpha = "…" if report.alpha is None else number(report.alpha)
    if report.scale == "fold":
        alpha = "1" if report.lost is None else str(report.rank)
    return how_to_load(
        report.format,
        report.output,
        report.folder,
        rank=report.rank,
        alpha=alpha,
        pipeline=report.pipeline,
        weight="1.0" if report.scale != "none" else "…" if report.weight is None else number(report.weight),
        is_scaled=report.scale != "none",
        has_base=report.has_base,
    )


def how_to_load(
    format_: Format,
    file: Path,
    folder: Path,
    *,
    rank: int | None,
    alpha: str,
    pipeline: str | None,
    weight: str = "1.0",
    is_scaled: bool = True,
    has_base: bool = False,
) -> list[str]:
    """How the program of a format loads a LoRA.

    Args:
        format_: the format.
        file: the file of its tensors.
        folder: the folder that the program is given, where it is given one.
        rank: its rank, for a program that has to be told.
        alpha: the same of its alpha.
        pipeline: the class of its model's pipeline in diffusers.
        weight: the strength to load it at.
        is_scaled: whether the file carries its scale.
        has_base: whether base weights are beside it.
    """
    usage = BY_NAME[format_].usage
    facts = {
        "path": python_literal(str(file)),
        "folder": python_literal(str(folder)),
        "name": python_literal(file.name),
        "weight": weight,
        "rank": rank,
        "alpha": alpha,
    }
    advice, templates = usage.whole if has_base and usage.whole is not None else usage[:2]
    if not is_scaled and usage.unscaled:
        advice, templates = "Load it and apply the scale:", (*templates, *usage.unscaled)
    lines = [line.format_map(facts) for line in templates]
    if not isinstance(file, Path):  # the URL of an object
        lines.insert(0, "# download it first: no program loads it from there")
    if pipeline is not None and any("pipe." in line for line in lines):
        lines.insert(0, f"pipe = {pipeline}.from_pretrained(...)")
    return [advice.format_map(facts), *(f"    {line}" for line in lines)]

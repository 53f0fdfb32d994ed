"""Exporting a LoRA: from a checkpoint through the plan to the file that is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from cogtools.checkpoint.formats.safetensors import safetensors_header
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.carry_out import Written, write
from cogtools.conversion.notices import export_notices
from cogtools.conversion.options import Cast, ExportOptions, Scale
from cogtools.conversion.output import AtomicFile, refuse_unwritable
from cogtools.conversion.plan import LoraPlan, Planned, carried, plan_lora, planned_tensors, target_dtype
from cogtools.conversion.record import RECORD_KEY, ExportRecord
from cogtools.errors import OptionError
from cogtools.layouts import diffusers
from cogtools.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath, RemotePath


Crc32Status = Literal["checked", "not checked", "not recorded"]


class PreparedExport(NamedTuple):
    """An export that is ready to be carried out.

    Attributes:
        plan: what it means.
        tensors: what is written.
        dtype: of the LoRA's tensors in the output.
        header: the output up to where its tensors begin.
        size_bytes: of the whole output.
    """

    plan: LoraPlan
    tensors: tuple[Planned, ...]
    dtype: DType
    header: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export found and wrote.

    Attributes:
        checkpoint: the file that was read.
        output: the file that was written, or would be.
        written: false for a dry run.
        model: name of the model, or of what can be said of it.
        layers: the adapted layers.
        modules: how many modules are adapted.
        rank: the rank of every module; None if they differ.
        alpha: the training's alpha; None if modules have different ones, or none is stated.
        alpha_source: where the scale comes from: "--alpha", "training_config.yaml", "default" …
        scaling: what every module's update is multiplied by: alpha / rank; None if that differs.
        scale: how the output carries it: "metadata", "fold" or "none".
        dtype: of the output's tensors.
        source_dtype: of the checkpoint's.
        tensors: how many tensors the output has.
        size_bytes: the size of the output file.
        crc32: "checked"; "not checked" in a dry run, or where only parts of storages were fetched; "not recorded" if
            the checkpoint has no CRC-32s to check.
        largest_relative_error: of any tensor, where folding or casting changed the values; else None.
        sha256: of the output file, if asked for.
        notices: what the user should know.
    """

    checkpoint: AnyPath
    output: AnyPath
    written: bool
    model: str
    layers: tuple[int, ...]
    modules: int
    rank: int | None
    alpha: float | None
    alpha_source: str
    scaling: float | None
    scale: Scale
    dtype: str
    source_dtype: str
    tensors: int
    size_bytes: int
    crc32: Crc32Status
    largest_relative_error: float | None
    sha256: str | None
    notices: tuple[str, ...]


def export_lora(
    checkpoint: str | os.PathLike[str] | RemotePath,
    out: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    scale: Scale = "metadata",
    dtype: Cast = "keep",
    iteration: int | None = None,
    ema: bool = False,
    allow_partial: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    sha256: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Export the LoRA in a SAT checkpoint as a file that diffusers loads at the right strength.

    Load it at weight 1.0: the file carries the scale.

    Args:
        checkpoint: a file of the trainer, the folder of an iteration, or the save folder; or the URL of one.
        out: a folder, in which `pytorch_lora_weights.safetensors` is written, or a file name ending in .safetensors.
        alpha: the training's alpha; None takes it from `training_config.yaml` beside the checkpoint, and 1, SAT's
            default, where that does not say.
        scale: "metadata" states alpha / rank in the header, where diffusers reads it from 0.34 on; "fold" multiplies
            it into the weights, for everything else; "none" leaves it out.
        dtype: "keep" copies the bytes; the others cast.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        allow_partial: accept a LoRA that adapts some of the layers only.
        overwrite: replace a file that is there already.
        dry_run: find out everything, write nothing.
        sha256: compute the SHA-256 of the output.
        progress: called with the bytes written so far and the bytes in all.

    Raises:
        CogtoolsError: if it cannot be done. The target is then as it was before.
    """
    options = ExportOptions(alpha, scale, dtype, iteration, ema, allow_partial, overwrite, dry_run, sha256)
    return export_checkpoint(checkpoint, out, options, progress=progress)


def export_checkpoint(
    checkpoint: str | os.PathLike[str] | RemotePath,
    out: str | os.PathLike[str],
    options: ExportOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """The same as `export_lora`, with the options as one record."""
    target = output_path(Path(out))
    output = AtomicFile(target, overwrite=options.overwrite)
    with open_checkpoint(checkpoint, iteration=options.iteration, ema=options.ema) as opened:
        output.refuse_existing()
        prepared = prepare_export(opened, options)
        output.refuse_source(opened.files)
        refuse_unwritable(target, prepared.size_bytes)
        written = Written()
        if not options.dry_run:
            tensors = prepared.tensors
            written = write(output, prepared.header, tensors, opened.files, progress, sha256=options.sha256)
    plan = prepared.plan
    return ExportReport(
        checkpoint=opened.path,
        output=target,
        written=not options.dry_run,
        model=plan.transformer.name,
        layers=plan.layers,
        modules=len(plan.modules),
        rank=plan.rank,
        alpha=plan.scale.alpha,
        alpha_source=plan.scale.source,
        scaling=plan.scaling,
        scale=options.scale,
        dtype=prepared.dtype.name,
        source_dtype=plan.dtype.name,
        tensors=len(prepared.tensors),
        size_bytes=prepared.size_bytes,
        crc32=_crc32(plan, written, options),
        largest_relative_error=written.largest_relative_error,
        sha256=written.sha256,
        notices=export_notices(opened, plan, options.scale),
    )


def _crc32(
    plan: LoraPlan, written: Written, options: ExportOptions
) -> Literal["checked", "not checked", "not recorded"]:
    if not plan.has_crc32:
        return "not recorded"
    return "not checked" if options.dry_run or written.unchecked else "checked"


def output_path(out: Path) -> Path:
    """The file that an export writes: `out` itself if it is named .safetensors, else the usual name in that folder."""
    return out if out.suffix == ".safetensors" else out / diffusers.FILE_NAME


def prepare_export(checkpoint: Checkpoint, options: ExportOptions) -> PreparedExport:
    """Find out all about an export without reading weights.

    Raises:
        CogtoolsError: if it cannot be done.
    """
    scale = options.scale
    if scale not in get_args(Scale):
        raise OptionError("there is no such way to carry the scale", found=scale, expected=", ".join(get_args(Scale)))
    plan = plan_lora(checkpoint, diffusers.LAYOUT, alpha=options.alpha, allow_partial=options.allow_partial)
    tensors = planned_tensors(plan, options)
    dtype = target_dtype(plan, options)
    header = safetensors_header(tensors, _metadata(plan, checkpoint, options, dtype))
    size_bytes = len(header) + sum(tensor.size_bytes for tensor in tensors)
    return PreparedExport(plan, tuple(tensors), dtype, header, size_bytes)


def _metadata(plan: LoraPlan, checkpoint: Checkpoint, options: ExportOptions, dtype: DType) -> dict[str, str]:
    """The text entries of the output's header: the scale, and how the file was made."""
    iteration, run = checkpoint.values.get("iteration"), checkpoint.run
    record = ExportRecord(
        version=__version__,
        source=checkpoint.path.name,
        iteration=iteration if isinstance(iteration, int) else None,
        ema=None if run is None else run.chosen.ema,
        models=tuple(model.slug for model in plan.transformer.models),
        transformer_layers=plan.transformer.layers,
        hidden_size=plan.transformer.hidden,
        rank=plan.rank,
        alpha=plan.scale.alpha,
        alpha_source=plan.scale.source,
        scale=options.scale,
        source_dtype=plan.dtype.name,
        dtype=dtype.name,
    )
    return {"format": "pt", RECORD_KEY: record.text(), **carried(plan, options).header}

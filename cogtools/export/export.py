"""Exporting a LoRA: from a checkpoint through the plan to the file that is written."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.formats.safetensors import safetensors_header
from cogtools.checkpoint.formats.torch_zip_writer import TorchArchive
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.paths import as_path
from cogtools.checkpoint.places import is_folder
from cogtools.conversion.carry_out import PlannedFile, Written, crc32_status, write
from cogtools.conversion.lora import read_lora
from cogtools.conversion.notices import export_notices
from cogtools.conversion.options import BY_HAND, BY_SCALING, Cast, ExportOptions, Format, Scale
from cogtools.conversion.output import AtomicFile, AtomicFolder, refuse_unwritable
from cogtools.conversion.plan import (
    LoraPlan,
    Planned,
    carried,
    one_rank,
    plan_lora,
    planned_tensors,
    target_dtype,
    target_ranks,
)
from cogtools.conversion.record import RECORD_KEY, ExportRecord
from cogtools.conversion.scale import BY_NOTHING
from cogtools.errors import OptionError
from cogtools.export.names import Target, local_type, target_of
from cogtools.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath, RemotePath
    from cogtools.conversion.carry_out import Crc32Status, Output
    from cogtools.conversion.loss import LossReport
    from cogtools.conversion.scale import Carried
    from cogtools.layouts.lora import LoraLayout
    from cogtools.verification.report import VerifyReport


class PreparedExport(NamedTuple):
    """An export that is ready to be carried out.

    Attributes:
        plan: what it means.
        files: what is written, the file of tensors first.
        dtype: of the LoRA's tensors in the output.
        notices: what the user should know of the base weights.
    """

    plan: LoraPlan
    files: tuple[PlannedFile, ...]
    dtype: DType
    notices: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[Planned, ...]:
        """The tensors of the output."""
        return self.files[0].tensors

    @property
    def size_bytes(self) -> int:
        """The size of the output."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export found and wrote.

    Attributes:
        checkpoint: the file that was read.
        output: the file of tensors that was written, or would be.
        folder: the folder that the format's program is given, where it is given one.
        files: the files that were written, or would be.
        format: the layout of the output.
        written: false for a dry run.
        model: name of the model, or of what can be said of it.
        pipeline: the class of its pipeline in diffusers; None if that is not known.
        layers: the adapted layers.
        modules: how many modules are adapted.
        rank: the rank of every module in the output; None if they differ.
        alpha: the training's alpha; None if modules have different ones, or none is stated.
        alpha_source: where the scale comes from: "--alpha", "training_config.yaml", "default" …
        scaling: what every module's update was multiplied by in the training: alpha / rank; None if that differs.
        scale: how the output carries it: "metadata", "fold" or "none".
        weight: the strength at which the format's program has to load it; None if that differs by module.
        dtype: of the LoRA's tensors in the output.
        source_dtype: of the checkpoint's.
        has_base: whether the output has base weights beside the LoRA.
        tensors: how many tensors the output has.
        size_bytes: the size of the output.
        crc32: whether the CRC-32s that the checkpoint records were checked.
        largest_relative_error: of any tensor, where folding, casting or cutting changed the values; else None.
        lost: how much of the LoRA was lost where it was cut to a lower rank; else None.
        sha256: of the file of tensors, if asked for.
        notices: what the user should know.
        verification: what `verify --against` found of it, all values looked at; None if not asked for.
    """

    checkpoint: AnyPath
    output: Path
    folder: Path
    files: tuple[Path, ...]
    format: Format
    written: bool
    model: str
    pipeline: str | None
    layers: tuple[int, ...]
    modules: int
    rank: int | None
    alpha: float | None
    alpha_source: str
    scaling: float | None
    scale: Scale
    weight: float | None
    dtype: str
    source_dtype: str
    has_base: bool
    tensors: int
    size_bytes: int
    crc32: Crc32Status
    largest_relative_error: float | None
    lost: LossReport | None
    sha256: str | None
    notices: tuple[str, ...]
    verification: VerifyReport | None = None


def export_lora(
    checkpoint: str | os.PathLike[str] | RemotePath,
    out: str | os.PathLike[str] | RemotePath,
    *,
    format: Format = "diffusers",  # noqa: A002 - the option's name
    alpha: float | None = None,
    scaling: float | None = None,
    scale: Scale | None = None,
    dtype: Cast = "keep",
    base: str | os.PathLike[str] | None = None,
    iteration: int | None = None,
    ema: bool = False,
    allow_partial: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    sha256: bool = False,
    rank: int | None = None,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write the LoRA in a checkpoint or a LoRA file so that a program loads it at the right strength.

    Load it at weight 1.0: the output carries the scale.

    Args:
        checkpoint: a file or folder with a LoRA in any layout: of SAT's trainer, diffusers, PEFT, ComfyUI, VideoX-Fun
            or DiffSynth-Studio.
        out: a folder, in which the file gets the name that the format's program looks for; or a file name ending in
            .safetensors, but for the formats that are folders: "peft" and "sat".
        format: for which program: "diffusers", "peft", "comfyui", "videox-fun", "diffsynth" or "sat".
        alpha: the training's alpha; None takes what is stated in the file or beside it. Where nothing is, it is 1 for
            SAT's checkpoints, its default, and the scaling is 1 for all others.
        scaling: what every update is multiplied by, instead of alpha / rank.
        scale: "metadata" states alpha / rank where the format's program looks for it; "fold" multiplies it into the
            weights; "none" leaves it out. None takes "metadata", and "fold" for "diffsynth", which cannot state it.
        dtype: "keep" copies the bytes; the others cast.
        base: for "sat": a checkpoint of SAT, or a model of diffusers, whose base weights are written beside the LoRA.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        allow_partial: accept a LoRA that adapts some of the layers only.
        overwrite: replace an output that is there already.
        dry_run: find out everything, write nothing.
        sha256: compute the SHA-256 of the output.
        rank: cut every module of a higher rank down to this one, to the best approximation there is; the scale is
            then multiplied in, and alpha / rank is 1.
        verify: check what was written as `verify --against` does, every value of it.
        progress: called with the bytes written so far and the bytes in all.

    Raises:
        CogtoolsError: if it cannot be done. The target is then as it was before.
    """
    options = ExportOptions(
        format=format,
        alpha=alpha,
        scaling=scaling,
        scale=scale,
        dtype=dtype,
        base=base,
        iteration=iteration,
        ema=ema,
        allow_partial=allow_partial,
        overwrite=overwrite,
        dry_run=dry_run,
        sha256=sha256,
        rank=rank,
        verify=verify,
    )
    return export_checkpoint(checkpoint, out, options, progress=progress)


def export_checkpoint(
    checkpoint: str | os.PathLike[str] | RemotePath,
    out: str | os.PathLike[str] | RemotePath | Target,
    options: ExportOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """The same as `export_lora`, with the options as one record."""
    layout = options.layout
    _refuse_base(options)
    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(checkpoint, iteration=options.iteration, ema=options.ema))
        target = out if isinstance(out, Target) else target_of(as_path(out), layout, opened.path)
        output = output_at(target, layout, overwrite=options.overwrite)
        output.refuse_existing()
        base = None if options.base is None else stack.enter_context(open_checkpoint(options.base))
        sources = [*opened.files, *(base.files if base is not None else ())]
        prepared = prepare_export(opened, options, base)
        output.refuse_source(sources)
        refuse_unwritable(output.target, prepared.size_bytes)
        written = Written()
        if not options.dry_run:
            written = write(output, prepared.files, sources, progress, sha256=options.sha256)
        notices = (*export_notices(opened, prepared.plan, options), *prepared.notices)
    plan = prepared.plan
    folder, file = local_type(target.folder), local_type(target.file)
    weights = set(plan.folded.values()) if options.way == "none" else {1.0}
    return ExportReport(
        checkpoint=opened.path,
        output=file,
        folder=folder,
        files=tuple(folder / planned.path if target.is_folder else file for planned in prepared.files),
        format=options.format,
        written=not options.dry_run,
        model=plan.transformer.name,
        pipeline=plan.transformer.pipeline,
        layers=plan.layers,
        modules=len(plan.modules),
        rank=one_rank(target_ranks(plan, options)),
        alpha=plan.scale.alpha,
        alpha_source=plan.scale.source,
        scaling=plan.scaling,
        scale=options.way,
        weight=weights.pop() if len(weights) == 1 else None,
        dtype=prepared.dtype.name,
        source_dtype=plan.dtype.name,
        has_base=base is not None,
        tensors=len(prepared.tensors),
        size_bytes=prepared.size_bytes,
        crc32=crc32_status(plan.storages, written, dry_run=options.dry_run),
        largest_relative_error=written.largest_relative_error,
        lost=written.lost,
        sha256=written.sha256,
        notices=notices,
        verification=_verified(opened, target, options) if options.verify and not options.dry_run else None,
    )


def _verified(source: Checkpoint, target: Target, options: ExportOptions) -> VerifyReport:
    """What `verify --against` finds of what was written."""
    from cogtools.verification.verify import verify_lora

    return verify_lora(target.file, against=source.path, format=options.format)


def _refuse_base(options: ExportOptions) -> None:
    if options.base is not None and options.layout.lora_only_note is None:
        raise OptionError(
            f"--base does not go with --format {options.format}, which holds a LoRA only",
            expected="--format sat, whose program loads whole models",
            hint="leave --base out",
        )


def output_at(target: Target, layout: LoraLayout, *, overwrite: bool) -> Output:
    """The file or folder of a LoRA that is to be written."""
    place = target.folder if target.is_folder else target.file
    if not isinstance(place, Path):
        from cogtools.conversion.upload import Upload

        names = [layout.path or "", *layout.beside] if target.is_folder else []
        return Upload(place, overwrite=overwrite, names=names)
    if not target.is_folder:
        return AtomicFile(place, overwrite=overwrite)
    return AtomicFolder(place, overwrite=overwrite, is_ours=partial(is_ours, layout=layout))


def is_ours(folder: Path, layout: LoraLayout) -> bool:
    """Whether cogtools wrote all of a folder, in this layout."""
    file = folder / (layout.path or "")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not is_folder(path)}
    if layout.path not in names or not names <= {layout.path, *layout.beside}:
        return False
    with open_checkpoint(file) as opened:
        return read_lora(opened).record.version is not None


def prepare_export(checkpoint: Checkpoint, options: ExportOptions, base: Checkpoint | None = None) -> PreparedExport:
    """Find out all about an export without reading weights.

    Raises:
        CogtoolsError: if it cannot be done.
    """
    _ = options.way  # before the long work: an option that makes no sense is an error at once
    layout = options.layout
    plan = plan_lora(
        checkpoint, layout, alpha=options.alpha, scaling=options.scaling, allow_partial=options.allow_partial
    )
    dtype = target_dtype(plan, options)
    tensors = tuple(planned_tensors(plan, options))
    notices: tuple[str, ...] = ()
    if base is not None:
        from cogtools.conversion.base import base_weights

        beside = base_weights(base, plan.transformer)
        tensors, notices = (*tensors, *beside.tensors), beside.notices
    record = _record(plan, checkpoint, options, dtype, base)
    files = lora_files(layout, tensors, carried(plan, options, record), record)
    return PreparedExport(plan, files, dtype, notices)


def lora_files(
    layout: LoraLayout, tensors: tuple[Planned, ...], carries: Carried, record: str
) -> tuple[PlannedFile, ...]:
    """The files of a LoRA, that of its tensors first.

    Args:
        layout: its layout.
        tensors: its tensors.
        carries: how it states its scale.
        record: how it was made.
    """
    path = layout.path or ""
    if layout.container == "torch":
        file = PlannedFile(path, tensors=tensors, archive=TorchArchive(tensors, "module"))
    else:
        metadata = {"format": "pt", RECORD_KEY: record, **carries.header}
        file = PlannedFile(path, safetensors_header(tensors, metadata), tensors)
    beside = {**layout.beside_content, **carries.files}
    return (file, *(PlannedFile(name, content) for name, content in beside.items()))


def _alpha_source(plan: LoraPlan) -> str:
    """Where the scale comes from. One that an earlier export assumed is still that where its output states it."""
    source = plan.scale.source
    is_assumed = plan.lora.record.alpha_source == BY_NOTHING and source not in (BY_HAND, BY_SCALING)
    return BY_NOTHING if is_assumed else source


def _is_plain(plan: LoraPlan) -> bool:
    """Whether the scaling of every module is the common alpha / its rank."""
    alpha, ranks = plan.scale.alpha, plan.lora.ranks
    return alpha is not None and all(
        scaling is not None and math.isclose(scaling * ranks[module], alpha, rel_tol=1e-9)
        for module, scaling in plan.scale.scalings.items()
    )


def _record(
    plan: LoraPlan, checkpoint: Checkpoint, options: ExportOptions, dtype: DType, base: Checkpoint | None
) -> str:
    """How the output was made."""
    before = plan.lora.record
    return ExportRecord(
        version=__version__,
        source=checkpoint.path.name,
        iteration=before.iteration if checkpoint.iteration is None else checkpoint.iteration,
        ema=before.ema if checkpoint.ema is None else checkpoint.ema,
        models=tuple(model.slug for model in plan.transformer.models),
        transformer_layers=plan.transformer.layers,
        hidden_size=plan.transformer.hidden,
        rank=one_rank(target_ranks(plan, options)),
        cut_to=options.rank,
        base=None if base is None else base.path.name,
        alpha=None if plan.scaling is None and not _is_plain(plan) else plan.scale.alpha,
        scaling=plan.scaling,
        alpha_source=_alpha_source(plan),
        format=options.format,
        scale=options.way,
        source_dtype=plan.dtype.name,
        dtype=dtype.name,
    ).text()

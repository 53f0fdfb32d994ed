"""Merging LoRAs: into one LoRA, or into base weights."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from cogtools.checkpoint.folder import find_save_folder
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.paths import as_path
from cogtools.checkpoint.places import is_folder
from cogtools.conversion.carry_out import Written, crc32_status, storages_of, write
from cogtools.conversion.lora import find_lora
from cogtools.conversion.loss import NOTABLE
from cogtools.conversion.merge_plan import Stack, Weighted, common_transformer, merged_into, sum_of
from cogtools.conversion.model import find_parts
from cogtools.conversion.notices import source_notices
from cogtools.conversion.options import MergeOptions, ModelFormat, ModelOptions, checked_format
from cogtools.conversion.output import refuse_unwritable
from cogtools.conversion.plan import named_dtype, one_rank, plan_lora, refuse_rank
from cogtools.conversion.record import ExportRecord, MergedRecord
from cogtools.conversion.refusals import what_it_holds
from cogtools.errors import ExportError, OptionError, command
from cogtools.export.export import lora_files, output_at
from cogtools.export.export_model import model_report, prepare_model
from cogtools.export.names import local_type, target_of
from cogtools.formatting import counted, percent
from cogtools.layouts import diffusers
from cogtools.layouts.pipeline import TRANSFORMER
from cogtools.layouts.recognition import BY_NAME, recognise_transformer
from cogtools.layouts.transformer import LORA_DROPPED
from cogtools.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.carry_out import Crc32Status
    from cogtools.conversion.loss import LossReport
    from cogtools.conversion.model_plan import PartPlan
    from cogtools.conversion.options import Dtype, Format
    from cogtools.export.model_report import ModelExportReport
    from cogtools.layouts.family import Model, Transformer


@dataclass(frozen=True, slots=True)
class MergedLora:
    """A LoRA that was merged.

    Attributes:
        file: the file that it was read from.
        layout: the layout that it is in.
        modules: how many modules it adapts.
        rank: the rank of every module; None if they differ.
        alpha: of every module; None if they differ, or none is stated.
        alpha_source: where the scale comes from: "--alpha", "training_config.yaml", "default" …
        scaling: what every module's update was multiplied by in the training; None if that differs.
        weight: what it was multiplied by beside that.
    """

    file: AnyPath
    layout: str | None
    modules: int
    rank: int | None
    alpha: float | None
    alpha_source: str
    scaling: float | None
    weight: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge found and wrote.

    Attributes:
        result: what was made: "lora" or "model".
        base: the file of the base weights; None where there are none.
        loras: the LoRAs, in the order of their weights.
        output: the file of tensors, or the folder of a model, that was written, or would be.
        folder: the folder that the program is given, where it is given one.
        files: the files that were written, or would be.
        written: false for a dry run.
        model: name of the model, or of what can be said of it.
        pipeline: the class of its pipeline in diffusers; None if that is not known.
        format: the layout of the output.
        modules: how many modules were changed, or the merged LoRA adapts.
        rank: the rank of every module of the merged LoRA; None if they differ, and for a model.
        dtype: of the output's tensors.
        tensors: how many tensors the output has.
        size_bytes: the size of the output.
        crc32: whether the CRC-32s that the files record were checked.
        largest_relative_error: of any tensor that was cast, or made of factors; else None.
        lost: how much of the LoRAs was lost where it was rounded or cut; None where nothing could be.
        exported: of a model, its parts and how to load it, and for a dry run what each tensor is made of.
        notices: what the user should know.
    """

    result: Literal["lora", "model"]
    base: AnyPath | None
    loras: tuple[MergedLora, ...]
    output: Path
    folder: Path
    files: tuple[Path, ...]
    written: bool
    model: str
    pipeline: str | None
    format: Format
    modules: int
    rank: int | None
    dtype: str
    tensors: int
    size_bytes: int
    crc32: Crc32Status
    largest_relative_error: float | None
    lost: LossReport | None
    exported: ModelExportReport | None
    notices: tuple[str, ...]


def merge(
    *paths: str | os.PathLike[str],
    out: str | os.PathLike[str],
    weights: Sequence[float] = (),
    alpha: float | None = None,
    dtype: Dtype | None = None,
    rank: int | None = None,
    format: Format | None = None,  # noqa: A002 - as on the command line
    model: str | None = None,
    iteration: int | None = None,
    ema: bool = False,
    allow_partial: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge LoRAs into one LoRA, or into base weights.

    What each path is shows in what it holds: one with base weights is the model that the others are merged into, and a
    single one with a LoRA beside its base weights is merged with itself.

    Args:
        paths: base weights and LoRAs: files, or the folders that `open_checkpoint` takes.
        out: a folder, or for a LoRA a file name ending in .safetensors.
        weights: of the LoRAs, in their order; () is 1 for all.
        alpha: the training's alpha of the only LoRA; None takes what is stated.
        dtype: what is written; None is the dtype of the base weights, and fp32 for a LoRA.
        rank: cut modules of a LoRA of several down to this rank, to the best approximation there is; None keeps all.
        format: the layout of the output, of a model "diffusers" or "sat"; None is diffusers'.
        model: the short name of the model ("2b", "5b", …), where nothing else tells.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        allow_partial: accept a LoRA that adapts some of the layers only.
        overwrite: replace an output that is there already.
        dry_run: find out everything, write nothing.
        progress: called with the bytes written so far and the bytes in all.

    Raises:
        CogtoolsError: if it cannot be done. The target is then as it was before.
    """
    options = MergeOptions(
        weights=tuple(map(float, weights)),
        alpha=alpha,
        dtype=dtype,
        rank=rank,
        format=format,
        model=model,
        iteration=iteration,
        ema=ema,
        allow_partial=allow_partial,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    return merge_checkpoints(paths, out, options, progress=progress)


class Source(NamedTuple):
    """One of the arguments, open.

    Attributes:
        checkpoint: what it is.
        has_base: whether it holds a transformer's base weights.
        has_lora: whether it holds a LoRA.
    """

    checkpoint: Checkpoint
    has_base: bool
    has_lora: bool


class Roles(NamedTuple):
    """What the arguments are.

    Attributes:
        base: the one that LoRAs are merged into; None if there is none.
        loras: those whose LoRAs are merged.
    """

    base: Source | None
    loras: tuple[Source, ...]


def merge_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: MergeOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """The same as `merge`, with the options as one record."""
    with ExitStack() as stack:
        opened = [stack.enter_context(checkpoint) for checkpoint in _open(paths, options)]
        roles = roles_of([_source(checkpoint) for checkpoint in opened])
        loras = _weighted(roles, options)
        if roles.base is None:
            return _merge_loras(loras, as_path(out), options, progress)
        return _merge_into_model(roles.base, loras, as_path(out), options, progress, stack)


def _open(paths: Sequence[str | os.PathLike[str]], options: MergeOptions) -> list[Checkpoint]:
    """Open the arguments. An iteration is that of the only one in which it can be chosen."""
    given = list(map(as_path, paths))
    runs = [path for path in given if is_folder(path) and find_save_folder(path) is not None]
    asked = options.iteration is not None or options.ema
    if asked and len(runs) > 1:
        raise OptionError(
            "--iteration and --ema choose in one save folder, and there are several",
            found=", ".join(map(str, runs)),
            hint="give the folder of an iteration for each",
        )
    chooses = runs[0] if runs else given[0] if given else None
    opened: list[Checkpoint] = []
    try:
        for path in given:
            if asked and path == chooses:
                opened.append(open_checkpoint(path, iteration=options.iteration, ema=options.ema))
            else:
                opened.append(open_checkpoint(path))
    except BaseException:
        for checkpoint in opened:
            checkpoint.close()
        raise
    return opened


def _source(checkpoint: Checkpoint) -> Source:
    shapes = {key: entry.shape for key, entry in checkpoint.tensors.items()}
    source = Source(checkpoint, recognise_transformer(shapes) is not None, find_lora(checkpoint) is not None)
    if not source.has_base and not source.has_lora:
        found, hint = what_it_holds(checkpoint)
        raise ExportError(
            "this is neither a LoRA nor a transformer's base weights", file=checkpoint.path, found=found, hint=hint
        )
    return source


def roles_of(sources: Sequence[Source]) -> Roles:
    """Which of the arguments is the base, and which are LoRAs.

    Of several that hold base weights, the one without a LoRA is the base, else the first.

    Raises:
        OptionError: if there is nothing to merge.
        ExportError: if there are several bases.
    """
    bases = [source for source in sources if not source.has_lora]
    if len(bases) > 1:
        raise ExportError(
            "there are several models among these, and LoRAs are merged into one",
            file=bases[1].checkpoint.path,
            found=f"base weights, as in {bases[0].checkpoint.path}",
            hint="give one model, and LoRAs",
        )
    base = next(iter(bases), None) or next((source for source in sources if source.has_base), None)
    loras = tuple(source for source in sources if source is not base)
    if base is not None and base.has_lora and not loras:
        return Roles(base, (base,))
    if base is not None and not loras:
        raise OptionError(
            "there is no LoRA to merge into these base weights",
            found=str(base.checkpoint.path),
            expected="cogtools merge MODEL LORA... OUT",
            hint=command(
                "export-model", base.checkpoint.path, "OUT", *_other_format(base), advice="to convert it as it is"
            ),
        )
    if base is None and len(loras) == 1:
        path = loras[0].checkpoint.path
        raise OptionError(
            "a LoRA alone cannot be merged: there are neither base weights nor another LoRA",
            found=str(path),
            expected="cogtools merge MODEL LORA OUT",
            hint=command("export-lora", path, "OUT_DIR", advice="to convert it, or cut it to a lower rank"),
        )
    return Roles(base, loras)


def _other_format(base: Source) -> list[str]:
    """What asks export-model for the layout that a base is not in."""
    part = find_parts(base.checkpoint).get(TRANSFORMER)
    return ["--format", "sat"] if part is not None and part.layout == "diffusers" else []


def _weighted(roles: Roles, options: MergeOptions) -> list[Weighted]:
    """The LoRAs, each with its weight.

    Raises:
        CogtoolsError: if options do not go with them, or one of them cannot be merged.
    """
    loras, weights = roles.loras, options.weights or (1.0,) * len(roles.loras)
    if len(weights) != len(loras):
        raise OptionError(
            "there has to be a --weight for each LoRA, in their order",
            found=counted(len(weights), "weight"),
            expected=f"{len(loras)}, for " + ", ".join(str(source.checkpoint.path) for source in loras),
        )
    for weight in weights:
        if weight == 0 or not math.isfinite(weight):
            raise OptionError("--weight must be a number other than 0", found=str(weight))
    if options.alpha is not None and len(loras) > 1:
        raise OptionError(
            "--alpha is that of one LoRA, and several have to state theirs",
            found=counted(len(loras), "LoRA"),
            hint="export the one that states none with --alpha first",
        )
    return [
        Weighted(
            plan_lora(source.checkpoint, diffusers.LAYOUT, alpha=options.alpha, allow_partial=options.allow_partial),
            weight,
        )
        for source, weight in zip(loras, weights, strict=True)
    ]


def _merge_into_model(
    base: Source,
    loras: Sequence[Weighted],
    out: AnyPath,
    options: MergeOptions,
    progress: Callable[[int, int], None] | None,
    opened: ExitStack,
) -> MergeReport:
    if options.rank is not None:
        raise OptionError("--rank is that of a LoRA, and base weights have none", hint="leave it out")
    if options.format not in (None, *get_args(ModelFormat)):
        raise OptionError(
            f"--format {options.format} is for LoRAs", found="base weights", expected=", ".join(get_args(ModelFormat))
        )
    source, updates = base.checkpoint, sum_of(loras)
    is_own = any(lora.plan.lora.checkpoint.path == source.path for lora in loras)
    dtype = None if options.dtype is None else named_dtype(options.dtype)
    model_options = ModelOptions(
        format=cast("ModelFormat", options.format or "diffusers"),
        model=options.model,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
    )

    def change(plan: PartPlan) -> PartPlan:
        tensors = merged_into(plan, model_options.format, updates, dtype)
        merged = [key for key, reason in plan.dropped.items() if is_own and reason == LORA_DROPPED]
        dropped = {key: reason for key, reason in plan.dropped.items() if key not in set(merged)}
        records = tuple(map(_merged_record, loras))
        return replace(plan, tensors=tensors, dropped=dropped, cast_to=dtype, merged=records)

    prepared = prepare_model(source, out, model_options, opened, change)
    sources = list(dict.fromkeys([*prepared.sources, *_files(loras)]))
    output = prepared.output(model_options)
    output.refuse(sources)
    written = Written() if options.dry_run else output.write(sources, progress)
    plan = next(plan for plan in prepared.plans if plan.name == TRANSFORMER)
    report = model_report(source, out, prepared, model_options, written)
    return MergeReport(
        result="model",
        base=source.path,
        loras=tuple(map(_merged_lora, loras)),
        output=report.output,
        folder=report.output,
        files=tuple(local_type(folder / file.path) for folder, files in prepared.folders.items() for file in files),
        written=not options.dry_run,
        model=report.model or "",
        pipeline=None if plan.reading.model is None else plan.reading.model.pipeline,
        format=model_options.format,
        modules=len(updates),
        rank=None,
        dtype=" and ".join(plan.dtypes),
        tensors=len(plan.tensors),
        size_bytes=report.size_bytes,
        crc32=report.crc32,
        largest_relative_error=written.largest_relative_error,
        lost=written.lost,
        exported=report,
        notices=(
            *prepared.notices,
            *_notices([lora for lora in loras if not is_own]),
            *([] if not is_own else loras[0].plan.notices),
            *_left_out(base, is_own=is_own),
            *_other_models(loras, plan.reading.model),
            *_lost_notice(written, plan.dtypes),
        ),
    )


def _left_out(base: Source, *, is_own: bool) -> list[str]:
    """What to say of the base's own LoRA where it is not the one that is merged."""
    if not base.has_lora or is_own:
        return []
    own = command("merge", base.checkpoint.path, "OUT").command
    return [f"{base.checkpoint.path} holds a LoRA of its own, which is left out. To merge that one: {own}"]


def _other_models(loras: Sequence[Weighted], model: Model | None) -> list[str]:
    """Warn of LoRAs that are known to be of another model, though it has the same sizes."""
    return [
        f"{lora.plan.lora.checkpoint.path} was trained on {lora.plan.transformer.name}, and the base is {model.name}."
        for lora in loras
        if model is not None and lora.plan.transformer.models and model not in lora.plan.transformer.models
    ]


def _lost_notice(written: Written, dtypes: Sequence[str]) -> list[str]:
    """Warn if much of the LoRA was lost in the rounding, and say what helps."""
    lost = written.lost
    if lost is None or lost.lost <= NOTABLE:
        return []
    return [
        f"{percent(lost.lost)} of the LoRA is lost where the weights are rounded to {' and '.join(dtypes)}: its update "
        "is small beside them. Write them with --dtype fp32, or load the LoRA beside the base weights; a larger "
        "--weight loses less of a stronger LoRA."
    ]


def _merge_loras(
    loras: Sequence[Weighted], out: AnyPath, options: MergeOptions, progress: Callable[[int, int], None] | None
) -> MergeReport:
    layout = BY_NAME[checked_format(options.format or diffusers.LAYOUT.name)]
    transformer, file = common_transformer(loras), loras[0].plan.lora.checkpoint.path
    updates = sum_of(loras)
    layers = tuple(sorted({layer for layer, _ in updates if layer is not None}))
    stack = Stack(
        updates=updates,
        layout=layout,
        dtype=named_dtype(options.dtype or "fp32"),
        file=file,
        layers=layers if len(layers) < transformer.layers else (),
    )
    if options.rank is not None:
        refuse_rank(options.rank, stack.ranks.values())
        stack = replace(stack, rank=options.rank)
    record = _record(stack, loras, transformer)
    planned = lora_files(layout, stack.tensors, stack.carried(record), record)
    size_bytes = sum(file.size_bytes for file in planned)
    target = target_of(out, layout, file)
    output = output_at(target, layout, overwrite=options.overwrite)
    output.refuse_existing()
    output.refuse_source(_files(loras))
    refuse_unwritable(output.target, size_bytes)
    written = Written() if options.dry_run else write(output, planned, _files(loras), progress, sha256=False)
    folder, tensors_file = local_type(target.folder), local_type(target.file)
    return MergeReport(
        result="lora",
        base=None,
        loras=tuple(map(_merged_lora, loras)),
        output=tensors_file,
        folder=folder,
        files=tuple(folder / file.path if target.is_folder else tensors_file for file in planned),
        written=not options.dry_run,
        model=transformer.name,
        pipeline=transformer.pipeline,
        format=checked_format(layout.name),
        modules=len(stack.updates),
        rank=one_rank(stack.ranks),
        dtype=stack.dtype.name,
        tensors=len(stack.tensors),
        size_bytes=size_bytes,
        crc32=crc32_status(storages_of(stack.tensors), written, dry_run=options.dry_run),
        largest_relative_error=written.largest_relative_error,
        lost=written.lost,
        exported=None,
        notices=(*_notices(loras), *layout.notes),
    )


def _files(loras: Sequence[Weighted]) -> list[SourceFile]:
    return [file for lora in loras for file in lora.plan.lora.checkpoint.files]


def _record(stack: Stack, loras: Sequence[Weighted], transformer: Transformer) -> str:
    """How a LoRA of several was made."""
    return ExportRecord(
        version=__version__,
        models=tuple(model.slug for model in transformer.models),
        transformer_layers=transformer.layers,
        hidden_size=transformer.hidden,
        rank=one_rank(stack.ranks),
        cut_to=stack.rank,
        format=stack.layout.name,
        scale="fold",
        dtype=stack.dtype.name,
        merged=tuple(map(_merged_record, loras)),
    ).text()


def _merged_record(lora: Weighted) -> MergedRecord:
    checkpoint, scale = lora.plan.lora.checkpoint, lora.plan.scale
    return MergedRecord(
        source=checkpoint.path.name,
        iteration=checkpoint.iteration,
        ema=checkpoint.ema,
        weight=lora.weight,
        scaling=lora.plan.scaling,
        alpha=scale.alpha,
        alpha_source=scale.source,
    )


def _merged_lora(lora: Weighted) -> MergedLora:
    plan = lora.plan
    return MergedLora(
        file=plan.lora.checkpoint.path,
        layout=None if plan.lora.layout is None else plan.lora.layout.name,
        modules=len(plan.modules),
        rank=plan.rank,
        alpha=plan.scale.alpha,
        alpha_source=plan.scale.source,
        scaling=plan.scaling,
        weight=lora.weight,
    )


def _notices(loras: Sequence[Weighted]) -> tuple[str, ...]:
    """What to say of each LoRA: with its name, where there are several."""
    found = []
    for lora in loras:
        checkpoint = lora.plan.lora.checkpoint
        name = f"{checkpoint.path}: " if len(loras) > 1 else ""
        found += [name + text for text in source_notices(checkpoint, lora.plan)]
    return tuple(found)

"""Exporting a whole model: from a checkpoint of SAT to folders that diffusers loads, and back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.paths import as_path, local_path
from cogtools.checkpoint.places import is_folder
from cogtools.conversion.base_pipeline import GIVEN, BasePipeline
from cogtools.conversion.carry_out import Written, crc32_status, storages_of
from cogtools.conversion.model import find_parts, no_model
from cogtools.conversion.model_output import ModelOutput, refuse_other_pipeline
from cogtools.conversion.model_plan import (
    SHARD_SIZE,
    PartPlan,
    diffusers_files,
    json_file,
    parse_size,
    plan_for_diffusers,
    plan_for_sat,
    sat_files,
    with_manifest,
)
from cogtools.conversion.model_reading import (
    model_name,
    model_of_slug,
    read_text_encoder,
    read_transformer,
    read_vae,
)
from cogtools.conversion.model_record import ModelRecord
from cogtools.conversion.notices import choice_notices, danger_notices
from cogtools.conversion.options import ModelFormat, ModelOptions
from cogtools.errors import ExportError, OptionError, command
from cogtools.export.model_report import (
    LeftOutReport,
    ModelExportReport,
    ModelPlanReport,
    PartReport,
    RowsReport,
    TensorReport,
)
from cogtools.export.names import local_type
from cogtools.formatting import counted, python_literal
from cogtools.layouts import sat, transformer
from cogtools.layouts.family import SLUGS
from cogtools.layouts.pipeline import (
    INDEX,
    PARTS,
    TRANSFORMER,
    model_index,
    scheduler_config,
)
from cogtools.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath, RemotePath
    from cogtools.conversion.carry_out import PlannedFile
    from cogtools.conversion.model import ModelPart
    from cogtools.conversion.model_reading import Reading
    from cogtools.layouts.family import Model

    Change = Callable[[PartPlan], PartPlan]
    """What is done to the transformer beside converting it: LoRAs are merged into it."""


def export_model(
    checkpoint: str | os.PathLike[str] | RemotePath,
    out: str | os.PathLike[str] | RemotePath,
    *,
    format: ModelFormat = "diffusers",  # noqa: A002 - as on the command line
    model: str | None = None,
    iteration: int | None = None,
    ema: bool = False,
    max_shard_size: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelExportReport:
    """Export a whole model from SAT's layout to diffusers' folders, or with `format="sat"` the other way.

    Nothing is computed: every byte is copied from the checkpoint.

    Args:
        checkpoint: a file of the trainer, the folder of an iteration, or the save folder; a file that is only a VAE or
            a text encoder. With `format="sat"` a pipeline, its `transformer` folder or a file of it.
        out: a folder, in which a folder for each part is written; with `format="sat"` the folder for SAT itself.
        format: "diffusers" or "sat".
        model: the short name of the model ("2b", "5b", …), where nothing else tells.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        max_shard_size: how large a file of weights may be, such as "5GB", the default.
        vae: a file of SAT's VAE, in place of the checkpoint's.
        base: the folder of a pipeline on this machine, which gives the parts that are missing.
        overwrite: replace the folders of parts, if cogtools wrote them.
        dry_run: find out everything, write nothing.
        progress: called with the bytes written so far and the bytes in all.

    Raises:
        CogtoolsError: if it cannot be done. All is then as it was before.
    """
    options = ModelOptions(
        format=format,
        model=model,
        iteration=iteration,
        ema=ema,
        max_shard_size=max_shard_size,
        vae=None if vae is None else str(vae),
        base=None if base is None else str(base),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    return export_model_checkpoint(checkpoint, out, options, progress=progress)


def export_model_checkpoint(
    checkpoint: str | os.PathLike[str] | RemotePath,
    out: str | os.PathLike[str] | RemotePath,
    options: ModelOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ModelExportReport:
    """The same as `export_model`, with the options as one record."""
    _refuse_options(options)
    place = as_path(out)
    with ExitStack() as opened:
        source = opened.enter_context(open_checkpoint(checkpoint, iteration=options.iteration, ema=options.ema))
        prepared = prepare_model(source, place, options, opened)
        output = prepared.output(options)
        output.refuse(prepared.sources)
        written = Written() if options.dry_run else output.write(prepared.sources, progress)
        return model_report(source, place, prepared, options, written)


def prepare_model(
    source: Checkpoint, out: AnyPath, options: ModelOptions, opened: ExitStack, change: Change | None = None
) -> PreparedModel:
    """Find out all about an export without reading weights.

    Args:
        source: the checkpoint.
        out: where to write.
        options: the options.
        opened: what is opened beside the checkpoint is closed with it.
        change: what is done to the transformer beside converting it: then it may be in the target's layout already.

    Raises:
        CogtoolsError: if it cannot be done.
    """
    if out.suffix == ".safetensors":
        raise OptionError(
            "a whole model is a folder of several files, and the output is named as one file",
            found=str(out),
            expected="the name of a folder",
            hint="leave .safetensors out",
        )
    if options.format == "sat":
        return _prepare_sat(source, out, options, change)
    return _prepare_diffusers(source, out, options, opened, change)


class PreparedModel(NamedTuple):
    """An export that is ready to be carried out.

    Attributes:
        plans: what becomes of each part.
        folders: the files of each folder, by its path.
        copied: the parts that are copies, and of what.
        pipeline_index: the index of the pipeline, and its path.
        sources: the files that are read.
        notices: what the user should know.
    """

    plans: tuple[PartPlan, ...]
    folders: Mapping[AnyPath, Sequence[PlannedFile]]
    copied: Mapping[str, Path]
    pipeline_index: tuple[AnyPath, PlannedFile] | None
    sources: Sequence[SourceFile]
    notices: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """How many bytes all files have together."""
        index = [] if self.pipeline_index is None else [self.pipeline_index[1]]
        return sum(file.size_bytes for files in [*self.folders.values(), index] for file in files)

    def output(self, options: ModelOptions) -> ModelOutput:
        """Where it is written."""
        return ModelOutput(self.folders, self.pipeline_index, overwrite=options.overwrite)


def _refuse_options(options: ModelOptions) -> None:
    if options.format not in get_args(ModelFormat):
        raise OptionError("there is no such format", found=options.format, expected=", ".join(get_args(ModelFormat)))
    only_diffusers = {"--max-shard-size": options.max_shard_size, "--vae": options.vae, "--base": options.base}
    given = [name for name, value in only_diffusers.items() if value is not None]
    if options.format == "sat" and given:
        raise OptionError(
            f"{given[0]} does not go with --format sat, which writes the transformer alone, in one file",
            hint=f"leave {given[0]} out",
        )


# To diffusers


def _prepare_diffusers(
    source: Checkpoint, out: AnyPath, options: ModelOptions, opened: ExitStack, change: Change | None
) -> PreparedModel:
    max_shard_bytes = parse_size(options.max_shard_size or SHARD_SIZE)
    parts = find_parts(source)
    if not parts:
        raise no_model(source)
    own = None
    if change is None:
        _refuse_diffusers(source, parts)
    elif TRANSFORMER in parts and parts[TRANSFORMER].layout == "diffusers":
        own = opened.enter_context(BasePipeline(_pipeline(source.path.parent))) if source.path.name == INDEX else None
        parts = {TRANSFORMER: parts[TRANSFORMER]}
    own_vae = "vae" in parts and options.vae is None
    if options.vae is not None:
        parts["vae"] = _open_vae(as_path(options.vae), opened)
    readings = _read_parts(parts, model_of_slug(options.model))
    plans = [plan_for_diffusers(reading) for reading in readings.values()]
    if change is not None:
        plans = [change(plan) if plan.name == TRANSFORMER else plan for plan in plans]
    folders: dict[AnyPath, Sequence[PlannedFile]] = {
        out / plan.name: diffusers_files(plan, _record(plan), max_shard_bytes) for plan in plans
    }
    copied: dict[str, Path] = {}
    index = None
    files = [file for part in parts.values() for file in part.checkpoint.files]
    main = readings.get(TRANSFORMER)
    if main is not None and main.model is not None:
        training = main.training
        shift = None if training is None else training.shift_scale
        scheduler = json_file(PARTS["scheduler"].config, scheduler_config(main.model, shift))
        folders[out / "scheduler"] = with_manifest([scheduler])
        if own is not None:
            for name in (*GIVEN, "scheduler"):
                if is_folder(own.folder / name):
                    folders[out / name], copied[name] = own.copies(name), own.folder / name
            files += own.files
        elif options.base is not None:
            base = opened.enter_context(BasePipeline(_pipeline(options.base)))
            for name in GIVEN:
                given = None if name in parts else base.part(name, main.model, main.shapes[_TEXT_PROJ][1])
                if given is not None:
                    folders[out / name], copied[name] = given, base.folder / name
            files += base.files
        content = model_index(main.model) if own is None else own.index
        refuse_other_pipeline(out, str(content.get("_class_name")))
        if {folder.name for folder in folders} == set(PARTS):
            index = out / INDEX, json_file(INDEX, content)
    elif options.base is not None:
        raise OptionError(
            "--base completes a transformer, and there is none in this checkpoint",
            found=", ".join(parts),
            hint="leave --base out",
        )
    notices = _notices(source, readings)
    if change is None and main is not None and main.has_lora:
        notices.append(_lora_notice(source, main))
    if own_vae and main is not None:
        notices += _vae_notice(readings["vae"], can_be_given=change is None)
    return PreparedModel(tuple(plans), folders, copied, index, tuple(files), tuple(notices))


_TEXT_PROJ = "patch_embed.text_proj.weight"


def _refuse_diffusers(source: Checkpoint, parts: Mapping[str, ModelPart]) -> None:
    already = [name for name, part in parts.items() if part.layout == "diffusers"]
    if already:
        raise ExportError(
            "this model is in diffusers' layout already",
            file=source.path,
            found=", ".join(already),
            expected="a checkpoint of SAT",
            hint=command("export-model", source.path, "OUT", "--format", "sat", advice="for SAT"),
        )


def _pipeline(given: str | os.PathLike[str] | RemotePath) -> Path:
    return local_path(given, "a pipeline whose parts are copied is on this machine")


def _open_vae(path: AnyPath, opened: ExitStack) -> ModelPart:
    """The VAE in a file of its own."""
    checkpoint = opened.enter_context(open_checkpoint(path))
    part = find_parts(checkpoint).get("vae")
    if part is None or part.layout != "sat":
        raise ExportError(
            "the file given with --vae is not SAT's VAE",
            file=checkpoint.path,
            found="diffusers' VAE" if part is not None else counted(len(checkpoint.tensors), "tensor"),
            expected="a file such as 3d-vae.pt",
            hint="give diffusers' VAE as a part of a pipeline, with --base" if part is not None else None,
        )
    return part


def _read_parts(parts: Mapping[str, ModelPart], asked: Model | None) -> dict[str, Reading]:
    """Each part, the transformer first: it decides how the VAE is configured."""
    readings: dict[str, Reading] = {}
    if TRANSFORMER in parts:
        readings[TRANSFORMER] = read_transformer(parts[TRANSFORMER], asked)
    if "vae" in parts:
        main = readings.get(TRANSFORMER)
        model = asked if main is None else main.model
        if model is None:
            raise ExportError(
                "it cannot be told which model this VAE is for: all have the same tensors, and other factors beside",
                file=parts["vae"].checkpoint.path,
                found="a VAE without a transformer",
                expected=", ".join(SLUGS),
                hint="state the model with --model",
            )
        readings["vae"] = read_vae(parts["vae"], model, None if main is None else main.training)
    if "text_encoder" in parts:
        readings["text_encoder"] = read_text_encoder(parts["text_encoder"])
    return readings


def _record(plan: PartPlan) -> ModelRecord:
    part, model = plan.reading.part, plan.reading.model
    return ModelRecord(
        version=__version__,
        source=part.checkpoint.path.name,
        part=part.name,
        model=None if model is None else model.slug,
        iteration=part.checkpoint.iteration,
        ema=part.checkpoint.ema,
        dtype=None if plan.cast_to is None else plan.cast_to.name,
        merged=plan.merged or None,
    )


def _vae_notice(reading: Reading, *, can_be_given: bool) -> list[str]:
    """The trainer casts the VAE with all else; the released one is in single precision."""
    dtypes = {entry.dtype.name for entry in reading.part.tensors.values()}
    if dtypes == {"float32"}:
        return []
    advice = ": give it with --vae 3d-vae.pt" if can_be_given else ""
    return [
        f"The VAE is the trainer's copy, in {' and '.join(sorted(dtypes))}. The released file is in float32{advice}."
    ]


# To SAT


def _prepare_sat(source: Checkpoint, out: AnyPath, options: ModelOptions, change: Change | None) -> PreparedModel:
    parts = find_parts(source)
    part = parts.get(TRANSFORMER)
    if part is None and not parts:
        raise no_model(source)
    if part is None or (part.layout == "sat" and change is None):
        raise ExportError(
            "there is no transformer in this checkpoint" if part is None else "this model is in SAT's layout already",
            file=source.path,
            found=", ".join(parts),
            expected="a transformer in diffusers' layout",
            hint="SAT takes its VAE and text encoder from files of their own" if part is None else None,
        )
    reading = read_transformer(part, model_of_slug(options.model))
    plan = plan_for_sat(reading)
    if change is not None:
        plan = change(plan)
    notices = list(_notices(source, {TRANSFORMER: reading}))
    others = [name for name in parts if name != TRANSFORMER]
    if others:
        notices.append(f"Left out: {', '.join(others)}. SAT takes its VAE and text encoder from files of their own.")
    notices += [f"Made up: {key} ({what})." for key, what in plan.made_up.items()]
    if sat.PREFIX + transformer.SAT_POSITIONS not in plan.rows and not _is_rotary(reading):
        notices.append(f"Left out: {transformer.SAT_POSITIONS}. SAT computes it, as it does for the released file.")
    return PreparedModel(
        (plan,), {out: sat_files(plan, _record(plan))}, {}, None, tuple(part.checkpoint.files), tuple(notices)
    )


def _is_rotary(reading: Reading) -> bool:
    return reading.model is not None and reading.model.rotary


# The report


def _notices(source: Checkpoint, readings: Mapping[str, Reading]) -> list[str]:
    notices = [*danger_notices(source), *choice_notices(source)]
    for reading in readings.values():
        notices += reading.notices
    return notices


def _lora_notice(source: Checkpoint, reading: Reading) -> str:
    lora = counted(len(reading.part.lora_keys), "tensor")
    return (
        f"The checkpoint holds a LoRA too ({lora}): this is the base without it. "
        f"To have it in the weights: {command('merge', source.path, 'OUT').command}"
    )


def model_report(
    source: Checkpoint, out: AnyPath, prepared: PreparedModel, options: ModelOptions, written: Written
) -> ModelExportReport:
    """What an export found, and wrote unless it is a dry run."""
    plans = {plan.name: plan for plan in prepared.plans}
    main = next((plan.reading for plan in prepared.plans if plan.reading.model is not None), None)
    storages = storages_of(tensor for plan in prepared.plans for tensor in plan.tensors)
    parts = tuple(
        _part_report(folder, files, plans, prepared.copied, options) for folder, files in prepared.folders.items()
    )
    names = [part.name for part in parts]
    missing = tuple(name for name in PARTS if name not in names) if options.format == "diffusers" else ()
    return ModelExportReport(
        checkpoint=source.path,
        output=local_type(out),
        written=not options.dry_run,
        format=options.format,
        model=None if main is None else model_name(main),
        known_by=None if main is None else main.known_by,
        parts=parts,
        missing=missing,
        pipeline=prepared.pipeline_index is not None,
        load=_how_to_load(out, parts, main, options.format),
        lora_tensors=sum(list(plan.dropped.values()).count(transformer.LORA_DROPPED) for plan in prepared.plans),
        size_bytes=prepared.size_bytes,
        crc32=crc32_status(storages, written, dry_run=options.dry_run),
        notices=prepared.notices,
        plan=_plan_report(prepared.plans) if options.dry_run else None,
    )


def _part_report(
    folder: AnyPath,
    files: Sequence[PlannedFile],
    plans: Mapping[str, PartPlan],
    copied: Mapping[str, Path],
    options: ModelOptions,
) -> PartReport:
    name = TRANSFORMER if options.format == "sat" else folder.name
    plan = plans.get(name)
    return PartReport(
        name=name,
        folder=local_type(folder),
        source=copied.get(name) if plan is None else plan.reading.part.checkpoint.path,
        files=tuple(file.path for file in files),
        tensors=0 if plan is None else len(plan.tensors),
        dtype=() if plan is None else plan.dtypes,
        size_bytes=sum(file.size_bytes for file in files),
    )


def _plan_report(plans: Sequence[PartPlan]) -> ModelPlanReport:
    tensors = tuple(
        TensorReport(
            plan.name,
            tensor.key,
            tensor.dtype.name,
            tensor.shape,
            tuple(RowsReport(*rows) for rows in plan.rows.get(tensor.key, ())),
        )
        for plan in plans
        for tensor in plan.tensors
    )
    left_out = (LeftOutReport(key, reason) for plan in plans for key, reason in plan.dropped.items())
    return ModelPlanReport(tensors, tuple(left_out))


def _how_to_load(out: AnyPath, parts: Sequence[PartReport], main: Reading | None, format_: ModelFormat) -> str:
    """Python code that loads what was written, and takes the rest from the published pipeline; or SAT's option."""
    if format_ == "sat":
        return f"load: {python_literal(str(out))}" + ("" if isinstance(out, Path) else "  # when it is downloaded")
    before = "" if isinstance(out, Path) else "# download it first: nothing loads it from there\n"
    return before + _python_code(out, parts, main)


def _python_code(out: AnyPath, parts: Sequence[PartReport], main: Reading | None) -> str:
    names = {part.name: part for part in parts}
    dtype = next((f", torch_dtype=torch.{part.dtype[0]}" for part in parts if len(part.dtype) == 1), "")
    model = None if main is None else main.model
    if set(names) == set(PARTS) and model is not None:
        call = f"{model.pipeline}.from_pretrained({python_literal(str(out))}{dtype})"
        return "\n".join(["import torch", f"from diffusers import {model.pipeline}", f"pipe = {call}"])
    loaded = [PARTS[name] for name in (TRANSFORMER, "vae", "text_encoder", "tokenizer") if name in names]
    by_library: dict[str, list[str]] = {}
    for part in loaded:
        by_library.setdefault(part.library, []).append(part.class_name)
    lines = ["import torch"]
    if TRANSFORMER in names and model is not None:
        by_library.setdefault("diffusers", []).insert(0, model.pipeline)
    lines += [f"from {library} import {', '.join(classes)}" for library, classes in sorted(by_library.items())]
    for part in loaded:
        options = dtype if part.stem is not None else ""
        place = python_literal(str(out / part.name))
        lines.append(f"{part.name} = {part.class_name}.from_pretrained({place}{options})")
    if TRANSFORMER in names and model is not None:
        given = ", ".join(f"{part.name}={part.name}" for part in loaded)
        lines.append(f"pipe = {model.pipeline}.from_pretrained({python_literal(model.repository)}, {given}{dtype})")
    return "\n".join(lines)

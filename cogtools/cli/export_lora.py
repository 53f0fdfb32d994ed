"""`cogtools export-lora`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from cogtools.cli.options import COULD_NOT, WRONG, Ema, Iteration, Json, Quiet, Rank
from cogtools.conversion.options import Cast, ExportOptions, Format, Scale
from cogtools.errors import OptionError, PrintError
from cogtools.render import text

if TYPE_CHECKING:
    from cogtools.export.batch import BatchItem


def export_lora_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT... OUT_DIR",
            show_default=False,
            help="A checkpoint or a LoRA (a file, an iteration's folder, a save folder), and where to write: a folder, "
            "or a file named .safetensors. With several checkpoints, or a folder and an OUT_DIR that ends "
            "in a slash, each gets a folder of its own in OUT_DIR.",
        ),
    ] = None,
    format: Annotated[  # noqa: A002
        Format,
        typer.Option(metavar="|".join(get_args(Format)), help="The program that is to load it."),
    ] = "diffusers",
    alpha: Annotated[
        float | None, typer.Option(metavar="A", help="The training's lora_alpha, if nothing states it.")
    ] = None,
    scaling: Annotated[
        float | None, typer.Option(metavar="S", help="What the updates are multiplied by, instead of alpha/rank.")
    ] = None,
    scale: Annotated[
        Scale | None,
        typer.Option(
            metavar="metadata|fold|none",
            show_default=False,
            help="How alpha/rank travels: stated where the format's program looks for it (the default), multiplied "
            "into the weights (the default for diffsynth), or not at all.",
        ),
    ] = None,
    dtype: Annotated[Cast, typer.Option(metavar="keep|fp32|fp16|bf16", help="Cast the tensors.")] = "keep",
    rank: Rank = None,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="For sat: write the base weights of this checkpoint beside it.")
    ] = None,
    iteration: Iteration = None,
    ema: Ema = False,
    every: Annotated[bool, typer.Option("--all", help="Export every iteration of a save folder.")] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept a LoRA of some layers.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Print the output's SHA-256.")] = False,
    dask: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Export on the Dask cluster whose scheduler has this address."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every value of what was written, as verify --against does.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    sat_pt_path: Annotated[str | None, typer.Option("--sat_pt_path", hidden=True)] = None,
    lora_save_directory: Annotated[str | None, typer.Option("--lora_save_directory", hidden=True)] = None,
) -> None:
    """Write the LoRA of a checkpoint, or of a LoRA file, so that a program loads it at the right strength.

    \b
    Examples:
      cogtools export-lora ckpts/lora-disney out
      cogtools export-lora out ComfyUI/models/loras --format comfyui
      cogtools export-lora old.safetensors fixed --alpha 1
      cogtools export-lora ckpts/*/ loras/
      cogtools export-lora 's3://runs/*/' s3://loras/ --dask tcp://10.0.0.1:8786
    """
    from cogtools.checkpoint.files import is_folder
    from cogtools.checkpoint.folder import has_pattern
    from cogtools.checkpoint.paths import as_path
    from cogtools.export.export import export_checkpoint
    from cogtools.render.export import show_export
    from cogtools.render.json_object import report_json
    from cogtools.render.progress import Progress

    *sources, out = _sources_and_output(paths or [], sat_pt_path, lora_save_directory)
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
        verify=verify,
        rank=rank,
    )
    source = as_path(sources[0])
    # As `cp` has it: a folder that goes into another one keeps a name of its own there.
    if (
        len(sources) > 1
        or every
        or dask is not None
        or has_pattern(source)
        or (out.endswith(("/", os.sep)) and is_folder(source))
    ):
        _export_many(sources, out, options, every=every, dask=dask, json=json, quiet=quiet)
        return
    with Progress("writing", hidden=quiet or json) as progress:
        report = export_checkpoint(source, out, options, progress=progress.update)
    wrong = report.verification is not None and report.verification.verdict == "fail"
    if json:
        text.emit(report_json("export-lora", "wrong" if wrong else "ok", report))
    else:
        show_export(report, quiet=quiet)
    if wrong:
        raise typer.Exit(WRONG)


def _sources_and_output(paths: list[str], sat_pt_path: str | None, lora_save_directory: str | None) -> list[str]:
    """The checkpoints and, last, the output, given as arguments or by the flags of CogVideo's own exporter."""
    given = [sat_pt_path, *paths, lora_save_directory]
    words = [word for word in given if word is not None]
    if "" in words:  # which would be the current folder
        raise OptionError(
            "an argument of export-lora is empty",
            found=" ".join(map(repr, words)),
            expected="cogtools export-lora CHECKPOINT OUT_DIR",
            hint="look whether a shell variable in the command has no value",
        )
    by_flags = sat_pt_path is not None or lora_save_directory is not None
    if len(words) < 2 or (by_flags and len(words) > 2):
        raise OptionError(
            "export-lora takes a checkpoint and a place for the output",
            found=" ".join(words) or "neither",
            expected="cogtools export-lora CHECKPOINT OUT_DIR",
            hint="cogtools export-lora --help",
        )
    return words


def _export_many(
    sources: list[str],
    out: str,
    options: ExportOptions,
    *,
    every: bool,
    dask: str | None,
    json: bool,
    quiet: bool,
) -> None:
    from cogtools.checkpoint.paths import as_path
    from cogtools.export.batch import batch_report, export_many, plan_batch
    from cogtools.render.export import show_batch, show_batch_item
    from cogtools.render.json_object import report_json

    items: list[BatchItem] = []
    unprinted: PrintError | None = None

    def show(show: Callable[..., None], *words: object, **options: bool) -> None:
        """Print, and go on if that fails: the exports are what matters."""
        nonlocal unprinted
        try:
            show(*words, **options)
        except PrintError as error:
            unprinted = unprinted or error

    jobs = plan_batch(sources, as_path(out), options, every=every)
    with ExitStack() as stack:
        executor = None
        if dask is not None:
            from cogtools.export.cluster import dask_executor

            executor = stack.enter_context(dask_executor(dask))
        for item in stack.enter_context(closing(export_many(jobs, options, executor))):
            items.append(item)
            if not json:
                show(show_batch_item, item, quiet=quiet)
    report = batch_report(items)
    if json:
        show(text.emit, report_json("export-lora", "error" if report.failed else "ok", report))
    elif not quiet:
        show(show_batch, report)
    if unprinted is not None:
        raise unprinted
    if report.failed:
        raise typer.Exit(COULD_NOT)
    if any(item.is_wrong for item in items):
        raise typer.Exit(WRONG)

"""`cogtools export-model`."""

from __future__ import annotations

from typing import Annotated

import typer

from cogtools.cli.batch import is_batch, refuse_arguments, run_batch
from cogtools.cli.options import Dask, Ema, Every, Iteration, Json, Quiet
from cogtools.conversion.options import ModelFormat, ModelOptions
from cogtools.layouts.family import SLUGS
from cogtools.render import text


def export_model_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT... OUT",
            show_default=False,
            help="A checkpoint: a file, an iteration's folder or the trainer's save folder; a VAE or a text encoder "
            "alone. With --format sat: a diffusers pipeline, its transformer folder, or a file of it. And a folder, in "
            "which each part gets a folder of its own; with several checkpoints, each gets a folder in OUT for that.",
        ),
    ] = None,
    format_: Annotated[
        ModelFormat,
        typer.Option("--format", metavar="diffusers|sat", help="What to write: folders for diffusers, or one for SAT."),
    ] = "diffusers",
    model: Annotated[
        str | None, typer.Option(metavar="|".join(SLUGS), help="Which model it is, where nothing else tells.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(metavar="FILE", help="SAT's VAE (3d-vae.pt), in place of the checkpoint's.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="A diffusers pipeline that gives missing parts: copies of its files."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="How large a file of weights may be.  [default: 5GB]")
    ] = None,
    iteration: Iteration = None,
    ema: Ema = False,
    every: Every = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folders of parts that cogtools wrote.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each tensor would be made of, and write nothing.")
    ] = False,
    dask: Dask = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a whole model from SAT for diffusers, or with --format sat the other way. Every byte is copied.

    \b
    Examples:
      cogtools export-model ckpts/sft-disney out
      cogtools export-model ckpts/sft-disney out --base CogVideoX-2b
      cogtools export-model CogVideoX-2b sat-2b --format sat
      cogtools export-model ckpts/*/ models/
    """
    from cogtools.export.export_model import export_model_checkpoint
    from cogtools.render.export_model import show_model_export
    from cogtools.render.json_object import report_json
    from cogtools.render.progress import Progress

    words = paths or []
    refuse_arguments("export-model", words, "cogtools export-model CHECKPOINT OUT")
    *sources, out = words
    options = ModelOptions(
        format=format_,
        model=model,
        iteration=iteration,
        ema=ema,
        max_shard_size=max_shard_size,
        vae=vae,
        base=base,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if is_batch(sources, every=every, dask=dask):
        run_batch("export-model", sources, out, options, every=every, dask=dask, json=json, quiet=quiet)
        return
    with Progress("writing", hidden=quiet or json) as progress:
        report = export_model_checkpoint(sources[0], out, options, progress=progress.update)
    if json:
        text.emit(report_json("export-model", "ok", report))
    elif not quiet:
        show_model_export(report)

"""`cogtools export-lora`."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from cogtools.cli.batch import goes_into, is_batch, refuse_arguments, run_batch
from cogtools.cli.options import WRONG, Dask, Ema, Every, Iteration, Json, Quiet, Rank
from cogtools.conversion.options import Cast, ExportOptions, Format, Scale
from cogtools.render import text


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
    every: Every = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept a LoRA of some layers.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Print the output's SHA-256.")] = False,
    dask: Dask = None,
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
    if is_batch(sources, every=every, dask=dask) or goes_into(sources[0], out):
        run_batch("export-lora", sources, out, options, every=every, dask=dask, json=json, quiet=quiet)
        return
    with Progress("writing", hidden=quiet or json) as progress:
        report = export_checkpoint(sources[0], out, options, progress=progress.update)
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
    by_flags = sat_pt_path is not None or lora_save_directory is not None
    refuse_arguments(
        "export-lora", words, "cogtools export-lora CHECKPOINT OUT_DIR", is_wrong=by_flags and len(words) > 2
    )
    return words

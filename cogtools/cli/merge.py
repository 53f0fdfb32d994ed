"""`cogtools merge`."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from cogtools.cli.batch import refuse_empty
from cogtools.cli.options import Ema, Iteration, Json, Quiet, Rank
from cogtools.conversion.options import Dtype, Format, MergeOptions
from cogtools.errors import OptionError
from cogtools.layouts.family import SLUGS
from cogtools.render import text

_EXPECTED = "cogtools merge MODEL LORA... OUT"


def merge_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|LORA... OUT",
            show_default=False,
            help="Base weights and LoRAs, told apart by what they hold, and where to write. A checkpoint that holds "
            "both can be the only one. Without base weights the LoRAs become one LoRA.",
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="W", show_default=False, help="The weight of a LoRA, once for each in their order [1]."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="A", help="The training's lora_alpha, of a single LoRA that states none.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(metavar="fp32|fp16|bf16", help="What to write [that of the base weights; fp32 for a LoRA]."),
    ] = None,
    rank: Rank = None,
    format_: Annotated[
        Format | None,
        typer.Option(
            "--format",
            metavar="|".join(get_args(Format)),
            help="The program that is to load it [diffusers]; of a model diffusers or sat.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="|".join(SLUGS), help="Which model the base is, where nothing else tells.")
    ] = None,
    iteration: Iteration = None,
    ema: Ema = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept a LoRA of some layers.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each tensor would be made of, and write nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge LoRAs into base weights, or several LoRAs into one.

    \b
    Examples:
      cogtools merge ckpts/lora-disney out
      cogtools merge CogVideoX-5b style.safetensors motion.safetensors out --weight 0.8 --weight 0.5
      cogtools merge style.safetensors motion.safetensors both.safetensors --rank 64
    """
    from cogtools.export.merge import merge_checkpoints
    from cogtools.render.json_object import report_json
    from cogtools.render.merge import show_merge
    from cogtools.render.progress import Progress

    refuse_empty("merge", paths or [], _EXPECTED)
    *sources, out = paths or [""]
    if not sources:
        raise OptionError(
            "merge takes at least one checkpoint and a place for the output",
            found=out or "neither",
            expected=_EXPECTED,
            hint="cogtools merge --help",
        )
    options = MergeOptions(
        weights=tuple(weight or ()),
        alpha=alpha,
        dtype=dtype,
        rank=rank,
        format=format_,
        model=model,
        iteration=iteration,
        ema=ema,
        allow_partial=allow_partial,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    with Progress("writing", hidden=quiet or json) as progress:
        report = merge_checkpoints(sources, out, options, progress=progress.update)
    if json:
        text.emit(report_json("merge", "ok", report))
    elif not quiet:
        show_merge(report)

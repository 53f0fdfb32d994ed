"""`cogtools inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogtools.cli.options import Ema, Iteration, Json
from cogtools.inspection.selection import Sort
from cogtools.render import text


def inspect_command(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT...", show_default=False, help="Files or folders, or their URLs."),
    ],
    keys: Annotated[
        list[str] | None,
        typer.Option("--keys", metavar="GLOB", help="List keys that match as a whole, or contain the text."),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="List only the LoRA.")] = False,
    section: Annotated[
        str | None, typer.Option(metavar="NAME", help="List only this section, such as transformer or vae.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Fold equal layers, so that all keys fit a screen.")] = False,
    sort: Annotated[Sort, typer.Option(metavar="key|size|offset", help="Sort the list.")] = "key",
    limit: Annotated[int | None, typer.Option(metavar="N", help="List at most N tensors.")] = None,
    offsets: Annotated[bool, typer.Option("--offsets", help="Show where in the file each tensor begins.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the listed tensors: min, max, mean, std, norm, zeros, NaN, Inf.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the strength of a LoRA's updates (.png, .svg), or of two LoRAs."),
    ] = None,
    iteration: Iteration = None,
    ema: Ema = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds. No code in it is run; weights are read only for --stats and --plot.

    \b
    Examples:
      cogtools inspect ckpts/lora-disney --tree
      cogtools inspect mp_rank_00_model_states.pt --keys layers.0. --offsets
      cogtools inspect lora-disney/500 lora-disney/1000 --lora --plot moved.png
    """
    from cogtools.inspection.inspect import inspect_checkpoints
    from cogtools.inspection.selection import Selection
    from cogtools.render.progress import Progress

    selection = Selection(
        keys=tuple(keys or ()),
        lora=lora,
        section=section,
        sort=sort,
        limit=limit,
        offsets=offsets,
        statistics=stats,
        tree=tree,
    )
    with Progress("reading", hidden=json) as progress:
        report = inspect_checkpoints(
            paths, selection, iteration=iteration, ema=ema, plot=plot, progress=progress.update
        )
    if json:
        from cogtools.render.json_object import report_json

        text.emit(report_json("inspect", "ok", report))
    else:
        from cogtools.render.inspect import show_inspection

        show_inspection(report, tree=tree)

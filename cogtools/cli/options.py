"""The options that commands share, and the exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

DONE = 0
WRONG = 1
COULD_NOT = 2
INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Iteration = Annotated[
    int | None, typer.Option(metavar="N", help="Take this iteration of a save folder, not the latest.")
]
Rank = Annotated[
    int | None,
    typer.Option(metavar="R", help="Cut modules of a higher rank down to this one, as near as that rank can come."),
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the EMA weights (the folder N-ema).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]

Every = Annotated[bool, typer.Option("--all", help="Export every iteration of a save folder.")]

Dask = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Export on the Dask cluster whose scheduler has this address.")
]

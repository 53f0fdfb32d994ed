"""Inspecting one checkpoint or several, and drawing them: what the command `inspect` does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.inspection.analysis import inspect_checkpoint
from cogtools.inspection.report import InspectReport
from cogtools.inspection.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
"""By these NumPy's linear algebra is told how many threads to use: when it is imported, never later."""


def inspect_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    selection: Selection | None = None,
    *,
    iteration: int | None = None,
    ema: bool = False,
    plot: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InspectReport:
    """Find out what checkpoints hold.

    Args:
        paths: the checkpoints.
        selection: which tensors to list; None lists all.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        plot: draw how strong the updates of the LoRA are, of one checkpoint or of two, into this file.
        progress: called with the bytes read so far and the bytes in all, where weights are read.

    Raises:
        CogtoolsError: if one of them cannot be read, or the picture cannot be drawn.
    """
    selection = selection or Selection()
    selection.check()
    if selection.statistics or plot is not None:
        _use_one_thread()
    if plot is not None:
        from cogtools.inspection.plot import refuse_unplottable

        refuse_unplottable(Path(plot), len(paths))
    reports = tuple(
        inspect_checkpoint(
            path,
            selection,
            iteration=iteration,
            ema=ema,
            updates=selection.statistics or plot is not None,
            progress=progress,
        )
        for path in paths
    )
    if plot is None:
        return InspectReport(reports)
    from cogtools.inspection.plot import plot_updates

    plot_updates(reports, Path(plot))
    return InspectReport(reports, Path(plot))


def _use_one_thread() -> None:
    """Keep NumPy from starting threads, unless the user has said how many.

    The matrices are small: its threads spend most of their time waiting for each other, ten times as long as the
    work takes if another program is running.
    """
    for name in _THREADS:
        os.environ.setdefault(name, "1")

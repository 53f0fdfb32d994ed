"""The strength of a LoRA's updates as a picture: a heat map per checkpoint, and the norm per layer.

matplotlib is an extra, `cogtools[plot]`: it is imported here only, and asked for politely.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cogtools.errors import ExportError, OptionError, OutputError
from cogtools.layouts.cogvideox import PROJECTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cogtools.inspection.report import CheckpointReport, UpdateReport

FORMATS = (".png", ".svg")
MAX_CHECKPOINTS = 2
MAX_TITLE_CHARS = 40
"""The longest end of a path that stands over a picture."""

_NORM = "norm of scaling · B A"
_COLOURS = {"q": "#1b6ca8", "k": "#e07b39", "v": "#3a7d44", "out": "#8e44ad"}


def refuse_unplottable(path: Path, checkpoints: int) -> None:
    """Raise, before anything is read, if no such picture could be drawn.

    Raises:
        OptionError: if it is no picture, there are too many checkpoints for it, or matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError("--plot draws a picture", found=path.name, expected="a name ending in .png or .svg")
    if checkpoints > MAX_CHECKPOINTS:
        raise OptionError("--plot draws one checkpoint, or two against each other", found=f"{checkpoints} checkpoints")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "--plot needs matplotlib, which is not installed", hint='pip install "cogtools[plot]"'
        ) from error


def plot_updates(reports: Sequence[CheckpointReport], path: Path) -> None:
    """Draw how strongly the LoRA of each checkpoint changes each module.

    Args:
        reports: one or two, with updates.
        path: the picture; its end says whether PNG or SVG.

    Raises:
        ExportError: if one of them has no LoRA that can be drawn.
        OutputError: if the picture cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for report in reports:
        if report.lora is None or not report.lora.updates:
            raise ExportError(
                "there is no LoRA in this checkpoint to draw",
                file=report.checkpoint,
                hint=f"cogtools inspect {report.checkpoint}",
            )
    # Fixed, so that the same input gives the same bytes.
    with rc_context({"svg.hashsalt": "cogtools", "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(6.8 + 2.6 * len(reports), 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, reports)
        metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise OutputError(f"the picture cannot be written: {error.strerror}", file=path) from error


def _draw(figure: Any, reports: Sequence[CheckpointReport]) -> None:
    """Heat maps side by side with one scale of colours, and beside them the norms per layer."""
    from matplotlib.ticker import MaxNLocator

    grids = [_grid(report) for report in reports]
    highest = max(value for grid in grids for row in grid for value in row if not math.isnan(value))
    columns = len(reports) + 1
    axes = figure.subplots(1, columns, width_ratios=[1.0] * len(reports) + [1.5])
    image = None
    for axis, report, grid in zip(axes, reports, grids, strict=False):
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=highest or 1, interpolation="nearest")
        layers = _layers(report)
        axis.set_xticks(range(len(PROJECTIONS)), PROJECTIONS)
        step = max(len(layers) // 15, 1)
        axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(_title(report), parse_math=False)
        axis.set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(axes[: len(reports)]), label=_NORM, shrink=0.8, location="bottom", aspect=30)
    bar.locator = MaxNLocator(4)
    bar.outline.set_visible(False)
    _draw_lines(axes[-1], reports)
    model = reports[0].model
    figure.suptitle("LoRA update per module" + (f" · {model.name}" if model is not None else ""), parse_math=False)


def _draw_lines(axis: Any, reports: Sequence[CheckpointReport]) -> None:
    for report, line_style in zip(reports, ("-", "--"), strict=False):
        layers = _layers(report)
        for projection, row in zip(PROJECTIONS, zip(*_grid(report), strict=True), strict=True):
            name = projection if len(reports) == 1 else f"{projection}, {_title(report)}"
            axis.plot(row, layers, line_style, color=_COLOURS[projection], marker=".", markersize=4, label=name)
    every = sorted({layer for report in reports for layer in _layers(report)})
    axis.set_ylim(every[-1] + 0.5, every[0] - 0.5)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.04)
    axis.set_xlabel(_NORM)
    axis.xaxis.get_major_locator().set_params(nbins=5)
    axis.set_ylabel("layer")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.grid(visible=True, alpha=0.25)
    axis.spines["right"].set_visible(False)
    axis.set_title("norm per layer")
    legend = axis.figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _grid(report: CheckpointReport) -> list[list[float]]:
    """The norms, a row for each layer and a column for each projection; NaN where there is no update."""
    updates: tuple[UpdateReport, ...] = report.lora.updates or () if report.lora is not None else ()
    norms = {(update.layer, update.projection): update.norm for update in updates if update.norm is not None}
    return [[norms.get((layer, name), math.nan) for name in PROJECTIONS] for layer in _layers(report)]


def _layers(report: CheckpointReport) -> list[int]:
    updates = (report.lora.updates or ()) if report.lora is not None else ()
    return sorted({update.layer for update in updates})


def _title(report: CheckpointReport) -> str:
    """What tells a checkpoint from another: its iteration's folder, else its name."""
    inspected = next((iteration.name for iteration in report.iterations if iteration.inspected), None)
    name = inspected or report.checkpoint.name
    return "".join(char if char.isprintable() else "?" for char in name[-MAX_TITLE_CHARS:])

"""The strength of a LoRA's updates as a picture: a heat map per checkpoint, and the norm per layer.

Of two checkpoints the picture also shows how the norms changed from the first to the second.
matplotlib is the extra `plot`: it is imported here only, and asked for politely.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from cogtools.checkpoint.places import is_folder
from cogtools.conversion.output import AtomicFile
from cogtools.errors import ExportError, OptionError, OutputError, command
from cogtools.formatting import counted, truncate
from cogtools.layouts.family import ATTENTION, IN_LAYERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cogtools.inspection.report import CheckpointReport

FORMATS = (".png", ".svg")
MAX_CHECKPOINTS = 2
MAX_TITLE_CHARS = 24
"""The longest part of a path that stands over a picture."""

_NORM, _UNSCALED_NORM = "norm of scaling · B A", "norm of B A (its scaling is not known)"
_COLOURS = {"q": "#1b6ca8", "k": "#e07b39", "v": "#3a7d44", "out": "#8e44ad", "ff_in": "#c0392b", "ff_out": "#16a2a2",
            "norm1": "#7f8c2d", "norm2": "#8d6e63"}  # fmt: skip
_NOT_COMPUTED = "#d9d9d9"
_THIN: dict[str, Any] = {"linewidth": 1.5, "marker": ".", "markersize": 4}
_BROAD: dict[str, Any] = {"linewidth": 5, "alpha": 0.3}


class Panel(NamedTuple):
    """What is drawn of one checkpoint.

    Attributes:
        title: what tells it from the other.
        norms: by layer and module, of the modules that lie in layers.
        is_scaled: whether a scaling is known, and multiplied in.
    """

    title: str
    norms: dict[tuple[int, str], float]
    is_scaled: bool

    def grid(self, layers: Sequence[int], names: Sequence[str]) -> list[list[float]]:
        """A row for each layer and a column for each kind of module; NaN where there is no update."""
        return [[self.norms.get((layer, name), math.nan) for name in names] for layer in layers]


def refuse_unplottable(path: Path, checkpoints: int) -> None:
    """Raise, before anything is read, if no such picture could be drawn.

    Raises:
        OptionError: if it is no picture, there are too many checkpoints for it, or matplotlib is missing.
        OutputError: if there is no folder for it, or a folder in its place.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError("--plot draws a picture", found=path.name, expected="a name ending in .png or .svg")
    if checkpoints > MAX_CHECKPOINTS:
        raise OptionError("--plot draws one checkpoint, or two against each other", found=f"{checkpoints} checkpoints")
    if is_folder(path):
        raise OutputError("the picture cannot be written: there is a folder of that name", file=path)
    if not is_folder(path.parent):
        raise OutputError("the picture cannot be written: there is no such folder", file=path.parent)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "--plot needs matplotlib, which is not installed",
            hint="pip install matplotlib, or cogtools with its extra plot",
        ) from error


def plot_updates(reports: Sequence[CheckpointReport], path: Path) -> None:
    """Draw how strongly the LoRA of each checkpoint changes each module.

    Args:
        reports: one or two, with updates.
        path: the picture; its end says whether PNG or SVG. One that exists is replaced.

    Raises:
        ExportError: if one of them has no LoRA that can be drawn.
        OutputError: if the picture cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        Panel(title, _norms(report), is_scaled=report.lora is not None and bool(report.lora.scalings))
        for title, report in zip(titles(reports), reports, strict=True)
    ]
    models = dict.fromkeys(report.model.name for report in reports if report.model is not None)
    file_format = path.suffix.lower().removeprefix(".")
    content = io.BytesIO()
    # Fixed, so that the same input gives the same bytes.
    with rc_context({"svg.hashsalt": "cogtools", "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(9.4 if len(panels) == 1 else 13.6, 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, panels)
        figure.suptitle(" · ".join(["LoRA update per module", *models]), parse_math=False)
        metadata: dict[str, Any] = {"Date": None} if file_format == "svg" else {}
        figure.savefig(content, format=file_format, dpi=150, metadata=metadata)
    with AtomicFile(path, overwrite=True) as picture:
        picture.write(content.getvalue())
        picture.sync()
        picture.publish()


def _norms(report: CheckpointReport) -> dict[tuple[int, str], float]:
    """What there is to draw."""
    if report.lora is None:
        raise _undrawable(report, "there is no LoRA in this checkpoint to draw")
    updates = report.lora.updates or ()
    norms = {
        (update.layer, update.module): update.norm
        for update in updates
        if update.norm is not None and update.layer is not None
    }
    if norms:
        return norms
    if not updates:
        raise _undrawable(
            report,
            "the updates of a LoRA in this layout are not computed",
            found=report.lora.names or "keys that are not known",
            expected="a LoRA in a layout that is known",
        )
    reasons = Counter(update.not_computed for update in updates)
    found = ", ".join(f"{counted(count, 'module')} with {reason}" for reason, count in reasons.items())
    raise _undrawable(report, "no update of this LoRA can be computed", found=found)


def _undrawable(
    report: CheckpointReport, what: str, *, found: str | None = None, expected: str | None = None
) -> ExportError:
    hint = command("inspect", report.checkpoint)
    return ExportError(what, file=report.checkpoint, found=found, expected=expected, hint=hint)


def _draw(figure: Any, panels: Sequence[Panel]) -> None:
    """Heat maps side by side with one scale of colours, the change where there are two, and the norms per layer."""
    layers = sorted({layer for panel in panels for layer, _ in panel.norms})
    names = [name for name in IN_LAYERS if any(name == one for panel in panels for _, one in panel.norms)]
    has_change = len(panels) == MAX_CHECKPOINTS
    maps = len(panels) + has_change
    axes = figure.subplots(1, maps + 1, width_ratios=[1.0] * maps + [1.6])
    norms = [norm for panel in panels for norm in panel.norms.values()]
    low, high = _range(min(norms), max(norms))
    image = None
    for axis, panel in zip(axes, panels, strict=False):
        image = _draw_map(
            axis, panel.grid(layers, names), layers, names, panel.title, cmap="viridis", vmin=low, vmax=high
        )
    label = _NORM if all(panel.is_scaled for panel in panels) else _UNSCALED_NORM
    _draw_colour_bar(figure, image, list(axes[: len(panels)]), label)
    if has_change:
        change = _change(panels[0], panels[1], layers, names)
        known = [abs(value) for row in change for value in row if not math.isnan(value)]
        most = max(known, default=0) or 1
        image = _draw_map(axes[-2], change, layers, names, "change", cmap="RdBu_r", vmin=-most, vmax=most)
        _draw_colour_bar(figure, image, [axes[-2]], "change of the norm")
    _draw_lines(axes[-1], panels, layers, names, label)


def _range(low: float, high: float) -> tuple[float, float]:
    """Where the colours begin and end: at the smallest and the largest norm, or around the only one."""
    return (low, high) if high > low else (low * 0.9, high * 1.1 or 1.0)


def _change(first: Panel, second: Panel, layers: Sequence[int], names: Sequence[str]) -> list[list[float]]:
    return [
        [after - before for before, after in zip(*rows, strict=True)]
        for rows in zip(first.grid(layers, names), second.grid(layers, names), strict=True)
    ]


def _draw_map(
    axis: Any, grid: list[list[float]], layers: Sequence[int], names: Sequence[str], title: str, **colours: Any
) -> Any:
    axis.set_facecolor(_NOT_COMPUTED)
    image = axis.imshow(grid, aspect="auto", interpolation="nearest", **colours)
    axis.set_xticks(range(len(names)), names, rotation=0 if len(names) <= len(ATTENTION) else 60)
    step = max(len(layers) // 15, 1)
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, parse_math=False)
    axis.set_ylabel("layer")
    return image


def _draw_colour_bar(figure: Any, image: Any, axes: list[Any], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    bar = figure.colorbar(image, ax=axes, label=label, location="bottom", aspect=18 * len(axes), pad=0.02)
    bar.locator = MaxNLocator(2 + 2 * len(axes))
    bar.outline.set_visible(False)


def _draw_lines(axis: Any, panels: Sequence[Panel], layers: Sequence[int], names: Sequence[str], label: str) -> None:
    """The norms per layer: of two checkpoints the first as broad pale lines, under those of the second."""
    looks = [_BROAD, _THIN][-len(panels) :]
    for panel, look in zip(panels, looks, strict=True):
        for name, row in zip(names, zip(*panel.grid(layers, names), strict=True), strict=True):
            axis.plot(row, layers, color=_COLOURS[name], **look)
    axis.set_ylim(layers[-1] + 0.5, layers[0] - 0.5)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.04)
    axis.set_xlabel(label)
    axis.xaxis.get_major_locator().set_params(nbins=5)
    axis.set_ylabel("layer")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.grid(visible=True, alpha=0.25)
    axis.spines["right"].set_visible(False)
    axis.set_title("norm per layer")
    _draw_legend(axis, panels, names, looks)


def _draw_legend(axis: Any, panels: Sequence[Panel], names: Sequence[str], looks: Sequence[dict[str, Any]]) -> None:
    """What the colours mean and, of two checkpoints, which lines are whose."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=_COLOURS[name], label=name, **_THIN) for name in names]
    if len(panels) > 1:
        for panel, look in zip(panels, looks, strict=True):
            lines.append(Line2D([], [], color="black", label=panel.title, **look))
    legend = axis.figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
    for text in legend.get_texts():
        text.set_parse_math(False)


def titles(reports: Sequence[CheckpointReport]) -> list[str]:
    """What tells checkpoints apart: the parts of their paths that differ, with a number if that is not enough."""
    if len(reports) == 1:
        (report,) = reports
        inspected = next((iteration.name for iteration in report.iterations if iteration.inspected), None)
        return [_shown(inspected or report.checkpoint.name)]
    first, second = (report.checkpoint.absolute().parts for report in reports)
    start = _equal(first, second)
    end = min(_equal(first[::-1], second[::-1]), len(first) - start, len(second) - start)
    found = [_shown("/".join(path[start : len(path) - end]) or path[-1]) for path in (first, second)]
    return found if found[0] != found[1] else [f"{title} ({number})" for number, title in enumerate(found, 1)]


def _equal(first: Sequence[str], second: Sequence[str]) -> int:
    """How many parts two paths have in common at their beginning."""
    places = (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(places, min(len(first), len(second)))


def _shown(name: str) -> str:
    name = "".join(char if char.isprintable() else "?" for char in name)
    return truncate(name, MAX_TITLE_CHARS, keep="end")

"""How strong the updates of a LoRA are, as a table of layers and projections that is coloured as a heat map."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from cogtools.formatting import counted, number
from cogtools.layouts.family import IN_LAYERS, Module
from cogtools.layouts.folded import fold_modules
from cogtools.render.style import DIM, YELLOW

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cogtools.inspection.report import LoraReport, UpdateReport
    from cogtools.render.style import Style

_HEAT = (17, 18, 19, 20, 26, 32, 38, 37, 36, 35, 71, 107, 143, 179, 215, 221, 227)
"""Dark blue over green to yellow, in the 256 colours of terminals."""

_DARK = 8
"""How many of these need light text."""

_BLACK, _WHITE = 16, 231


class _Scale(NamedTuple):
    """From what number to what number the colours go."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None]) -> _Scale:
        known = [value for value in values if value is not None]
        return cls(min(known), max(known))

    def colour(self, value: float) -> int:
        """The place of a number's colour in `_HEAT`; the middle one if all numbers are equal."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(share * (len(_HEAT) - 1))


def heat_map_lines(lora: LoraReport, updates: Sequence[UpdateReport], style: Style) -> Iterator[str]:
    """Layers x projections: how strong each update is, and how many directions it has; then what is not computed."""
    if not updates:
        yield "The updates of a LoRA in this layout are not computed."
        return
    computed = [update for update in updates if update.not_computed is None]
    if computed:
        yield from style.wrapped(f"norm of {_scaled_by(computed)}, and effective rank (at most {max(lora.ranks)})")
        yield from _rows(computed, style)
    reasons: dict[str, list[UpdateReport]] = defaultdict(list)
    for update in updates:
        if update.not_computed is not None:
            reasons[update.not_computed].append(update)
    for reason, members in reasons.items():
        where = fold_modules(Module(update.layer, update.module) for update in members)
        for line in style.wrapped(f"not computed: {counted(len(members), 'module')} with {reason} ({where})"):
            yield style.paint(line, YELLOW)


def _scaled_by(updates: Sequence[UpdateReport]) -> str:
    scalings = sorted({update.scaling for update in updates if update.scaling is not None})
    if not scalings:
        return "B A (its scaling is not known)"
    if len(scalings) == 1:
        return f"scaling * B A (scaling {number(scalings[0])})"
    return f"scaling * B A (scaling {number(scalings[0])} to {number(scalings[-1])})"


def _rows(updates: Sequence[UpdateReport], style: Style) -> Iterator[str]:
    by_place = {(update.layer, update.module): update for update in updates}
    columns = [name for name in IN_LAYERS if any(update.module == name for update in updates)]
    norms = _Scale.over(update.norm for update in updates)
    ranks = _Scale.over(update.effective_rank for update in updates)
    names = " ".join(f"{name:>8}" for name in columns)
    yield style.paint(f"layer  {names}   {names}", DIM)
    for layer in sorted({update.layer for update in updates if update.layer is not None}):
        row = [by_place.get((layer, name)) for name in columns]
        strengths = [_cell(update.norm if update else None, ".3g", norms, style) for update in row]
        directions = [_cell(update.effective_rank if update else None, ".1f", ranks, style) for update in row]
        yield f"{layer:>5}  {' '.join(strengths)}   {' '.join(directions)}"
    for update in updates:
        if update.layer is None:
            strength = _cell(update.norm, ".3g", norms, style)
            yield f"{update.module:<15}{strength}   {_cell(update.effective_rank, '.1f', ranks, style)}"


def _cell(value: float | None, form: str, scale: _Scale, style: Style) -> str:
    if value is None:
        return f"{'-':>8}"
    colour = scale.colour(value)
    return style.paint(f"{value:>8{form}}", f"48;5;{_HEAT[colour]};38;5;{_WHITE if colour < _DARK else _BLACK}")

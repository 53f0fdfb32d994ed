"""How strong the updates of a LoRA are, as a table of layers and projections that is coloured as a heat map."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from cogtools.formatting import counted, number
from cogtools.layouts.family import IN_LAYERS, Module
from cogtools.layouts.folded import fold_modules
from cogtools.render.text import Line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cogtools.inspection.report import LoraReport, UpdateReport

_HEAT = (17, 18, 19, 20, 26, 32, 38, 37, 36, 35, 71, 107, 143, 179, 215, 221, 227)
"""Dark blue over green to yellow, in the 256 colours of terminals."""

_DARK = 8
"""How many of these need light text."""

_BLACK, _WHITE = 16, 231

_WIDTH = 8
"""Columns of a cell."""


class _Scale(NamedTuple):
    """From what number to what number the colours go."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None]) -> _Scale:
        known = [value for value in values if value is not None]
        return cls(min(known), max(known))

    def style(self, value: float) -> str:
        """The style for a number; that of the middle if all numbers are equal."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        place = round(share * (len(_HEAT) - 1))
        return f"color({_WHITE if place < _DARK else _BLACK}) on color({_HEAT[place]})"


def heat_map_lines(lora: LoraReport, updates: Sequence[UpdateReport]) -> Iterator[str | Line]:
    """Layers x modules: how strong each update is, and how many directions it has; then what is not computed."""
    if not updates:
        yield "The updates of a LoRA in this layout are not computed."
        return
    computed = [update for update in updates if update.not_computed is None]
    if computed:
        measures = f"norm of {_scaled_by(computed)}, and effective rank (at most {max(lora.ranks)})"
        yield Line(measures, wrap=True)
        yield from _rows(computed)
    reasons: dict[str, list[UpdateReport]] = defaultdict(list)
    for update in updates:
        if update.not_computed is not None:
            reasons[update.not_computed].append(update)
    for reason, members in reasons.items():
        where = fold_modules(Module(update.layer, update.module) for update in members)
        yield Line((f"not computed: {counted(len(members), 'module')} with {reason} ({where})", "yellow"), wrap=True)


def _scaled_by(updates: Sequence[UpdateReport]) -> str:
    scalings = sorted({update.scaling for update in updates if update.scaling is not None})
    if not scalings:
        return "B A (unknown scaling)"
    ends = dict.fromkeys((scalings[0], scalings[-1]))
    return f"scaling * B A (scaling {' to '.join(map(number, ends))})"


def _rows(updates: Sequence[UpdateReport]) -> Iterator[Line]:
    by_place = {(update.layer, update.module): update for update in updates}
    columns = [name for name in IN_LAYERS if any(update.module == name for update in updates)]
    norms = _Scale.over(update.norm for update in updates)
    ranks = _Scale.over(update.effective_rank for update in updates)
    names = "".join(f" {name:>{_WIDTH}}" for name in columns)
    yield Line((f"layer {names}  {names}", "dim"))
    for layer in sorted({update.layer for update in updates if update.layer is not None}):
        row = [by_place.get((layer, name)) for name in columns]
        strengths = _cells([update.norm if update else None for update in row], ".3g", norms)
        directions = _cells([update.effective_rank if update else None for update in row], ".1f", ranks)
        yield Line(f"{layer:>5} ", *strengths, "  ", *directions)
    for update in updates:
        if update.layer is None:
            strength, direction = _cells([update.norm], ".3g", norms), _cells([update.effective_rank], ".1f", ranks)
            yield Line(f"{update.module:<14}", *strength, "  ", *direction)


def _cells(values: Iterable[float | None], form: str, scale: _Scale) -> Iterator[str | tuple[str, str]]:
    for value in values:
        yield " "
        yield f"{'-':>{_WIDTH}}" if value is None else (f"{value:>{_WIDTH}{form}}", scale.style(value))

"""How strong the updates of a LoRA are, as a table of layers and projections that is coloured as a heat map."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from cogtools.formatting import counted, number
from cogtools.layouts.family import IN_LAYERS, Module
from cogtools.layouts.folded import fold_modules
from cogtools.render.lines import Line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cogtools.inspection.report import LoraReport, ModuleChange, UpdateReport

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
        return cls(min(known, default=0.0), max(known, default=0.0))

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
        yield from _rows(updates)
    yield from not_computed_lines(updates)


def not_computed_lines(updates: Sequence[UpdateReport | ModuleChange]) -> Iterator[Line]:
    """The modules that are not computed, by the reason."""
    reasons: dict[str, list[Module]] = defaultdict(list)
    for update in updates:
        if update.not_computed is not None:
            reasons[update.not_computed].append(Module(update.layer, update.module))
    for reason, members in reasons.items():
        where = fold_modules(members)
        yield Line((f"not computed: {counted(len(members), 'module')} with {reason} ({where})", "yellow"), wrap=True)


def _scaled_by(updates: Sequence[UpdateReport]) -> str:
    scalings = sorted({update.scaling for update in updates if update.scaling is not None})
    if not scalings:
        return "B A (unknown scaling)"
    ends = dict.fromkeys((scalings[0], scalings[-1]))
    return f"scaling * B A (scaling {' to '.join(map(number, ends))})"


def _rows(updates: Sequence[UpdateReport]) -> Iterator[Line]:
    by_place = {Module(update.layer, update.module): update for update in updates}
    norms = {module: update.norm for module, update in by_place.items()}
    ranks = {module: update.effective_rank for module, update in by_place.items()}
    yield from module_rows([(norms, ".3g"), (ranks, ".1f")])


def module_rows(measures: Sequence[tuple[Mapping[Module, float | None], str]]) -> Iterator[Line]:
    """Layers x modules, side by side for each measure; then those beside the layers.

    Args:
        measures: a number for each module, and how it is formatted. All have the same modules.
    """
    modules = sorted({module for values, _ in measures for module in values}, key=lambda module: module.order)
    columns = [name for name in IN_LAYERS if any(module.name == name for module in modules)]
    scales = [_Scale.over(values.values()) for values, _ in measures]
    names = "".join(f" {name:>{_WIDTH}}" for name in columns)
    yield Line((f"layer {'  '.join([names] * len(measures))}", "dim"))
    rows: dict[str, list[Module]] = {}
    for module in modules:
        if module.layer is not None:
            rows[f"{module.layer:>5} "] = [Module(module.layer, name) for name in columns]
    rows |= {f"{module.name:<14}": [module] for module in modules if module.layer is None}
    for label, row in rows.items():
        parts: list[str | tuple[str, str]] = [label]
        for (values, form), scale in zip(measures, scales, strict=True):
            parts += ["  "] if len(parts) > 1 else []
            parts += _cells([values.get(module) for module in row], form, scale)
        yield Line(*parts)


def _cells(values: Iterable[float | None], form: str, scale: _Scale) -> Iterator[str | tuple[str, str]]:
    for value in values:
        yield " "
        yield f"{'-':>{_WIDTH}}" if value is None else (f"{value:>{_WIDTH}{form}}", scale.style(value))

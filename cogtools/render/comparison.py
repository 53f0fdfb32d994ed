"""What changed from one LoRA to another, as `inspect A B --stats` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.formatting import counted
from cogtools.layouts.family import Module
from cogtools.render.heat_map import module_rows, not_computed_lines
from cogtools.render.lines import Line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.inspection.report import LoraComparison


def comparison_lines(comparison: LoraComparison) -> Iterator[str | Line]:
    """All modules together in a line; then layers x modules."""
    compared = [change for change in comparison.modules if change.not_computed is None]
    only = [
        f"{counted(count, 'module')} in the {which} only"
        for count, which in ((comparison.only_first, "first"), (comparison.only_second, "second"))
        if count
    ]
    facts = [
        f"relative norm of the difference {_shown(comparison.difference)}",
        f"cosine {_shown(comparison.cosine)}",
        counted(len(compared), "module"),
        *only,
    ]
    yield Line(("change     ", "cyan"), ", ".join(facts), wrap=True)
    if compared:
        places = {Module(change.layer, change.module): change for change in compared}
        yield Line("relative norm of the difference, and cosine of the updates", wrap=True)
        differences = {module: change.difference for module, change in places.items()}
        yield from module_rows(
            [(differences, ".3g"), ({module: change.cosine for module, change in places.items()}, ".4f")]
        )
    yield from not_computed_lines(comparison.modules)


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.6g}"

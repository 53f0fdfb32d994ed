"""What `inspect` reports of the LoRA in a checkpoint, without reading its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.conversion.lora import find_scale, read_config
from cogtools.conversion.plan import LoraPlan, plan_lora
from cogtools.conversion.refusals import refuse_unexportable
from cogtools.conversion.scale import BY_NOTHING
from cogtools.errors import CogtoolsError, Hint
from cogtools.inspection.report import ExportOutlook, LoraReport
from cogtools.layouts import diffusers
from cogtools.layouts.folded import fold_names
from cogtools.layouts.lora import is_lora_key

if TYPE_CHECKING:
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.conversion.lora import Lora
    from cogtools.conversion.scale import Scale
    from cogtools.layouts.family import LoraKey, Transformer


def describe_lora(checkpoint: Checkpoint, lora: Lora, model: Transformer | None) -> LoraReport:
    """What can be reported of a LoRA."""
    plan, outlook = _export_outlook(checkpoint)
    scale = plan.scale if plan is not None else scale_of(lora)
    is_stated = scale is not None and scale.source != BY_NOTHING
    expected = _expected(lora, model, plan)
    kinds = {(name.name, name.part) for name in expected if name.layer is not None}
    lacking = sorted(expected - lora.tensors.keys(), key=lambda name: name.order)
    missing = tuple(fold_names(lacking, kinds))
    everything = [entry for key, entry in checkpoint.tensors.items() if is_lora_key(key)]
    stated = lora.stated.get(lora.intended.scale)
    scalings = () if scale is None else (scaling for scaling in scale.scalings.values() if scaling is not None)
    return LoraReport(
        layout=None if lora.layout is None else lora.layout.name,
        names=names_of(lora),
        tensors=len(everything),
        size_bytes=sum(entry.size_bytes for entry in everything),
        layers=lora.layers,
        modules=len(lora.modules),
        ranks=tuple(sorted(set(lora.ranks.values()))),
        dtypes=tuple(sorted({tensor.entry.dtype.name for tensor in lora.tensors.values()})),
        complete=None if lora.layout is None else _is_complete(checkpoint, lora, missing),
        missing=missing,
        unplaced=(*lora.unplaced, *lora.unreadable.values(), *lora.collisions),
        alpha=scale.alpha if scale is not None else None,
        alpha_source=scale.source if scale is not None and is_stated else None,
        reader=lora.intended.reader,
        unstated_scaling=lora.intended.unstated_scaling,
        misstated=stated.problems if stated is not None else (),
        scalings=tuple(sorted(set(scalings))),
        export=outlook,
    )


def names_of(lora: Lora) -> str | None:
    """What sets a LoRA's names apart from those that its layout has; None if nothing does."""
    if lora.names is None or lora.layout is None or lora.layout.written == lora.names.spelling:
        return None
    first = next((reading for reading in lora.names.readings.values() if reading.spelling == lora.names.spelling), None)
    return None if first is None else first.oddity


def _export_outlook(checkpoint: Checkpoint) -> tuple[LoraPlan | None, ExportOutlook]:
    try:
        plan = plan_lora(checkpoint, diffusers.LAYOUT)
    except CogtoolsError as error:
        return None, ExportOutlook(
            possible=False, reason=error.what, found=error.found, hint=_elsewhere(error.hint), problems=error.problems
        )
    size_bytes = sum(plan.entry(name).size_bytes for name in plan.names)
    return plan, ExportOutlook(possible=True, tensors=len(plan.names), size_bytes=size_bytes, notices=plan.notices)


def _elsewhere(hint: Hint | None) -> Hint | None:
    """What an error advises besides to inspect the checkpoint, which is what is being done."""
    if hint is None or hint.command is None or not hint.command.startswith("cogtools inspect"):
        return hint
    return None if hint.advice is None else Hint(hint.advice)


def _expected(lora: Lora, model: Transformer | None, plan: LoraPlan | None) -> frozenset[LoraKey]:
    """The tensors that a LoRA should have: those that the file states, else those of all layers."""
    if lora.layout is None:
        return frozenset()
    if plan is not None:
        return lora.expected(plan.layers)
    every = lora.expected(range(model.layers) if model is not None else lora.layers)
    stated = lora.stated.get(lora.intended.scale)
    if stated is None:
        return every
    targeted = set(stated.targeted([name.module for name in every]))
    return frozenset(name for name in every if name.module in targeted)


def scale_of(lora: Lora) -> Scale | None:
    """A LoRA's scale, and who states it; None if that cannot be read."""
    if lora.layout is None:
        return None
    try:
        config, _ = read_config(lora, by_hand=None)
        return find_scale(lora, config=config)
    except CogtoolsError:
        return None


def _is_complete(checkpoint: Checkpoint, lora: Lora, missing: tuple[str, ...]) -> bool:
    if missing or lora.unplaced or lora.unreadable or lora.collisions:
        return False
    if lora.layout is not None and lora.layout.one_rank and len(set(lora.ranks.values())) != 1:
        return False
    try:
        refuse_unexportable(checkpoint)
    except CogtoolsError:  # every layer is there, and of each a part only
        return False
    return True

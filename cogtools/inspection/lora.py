"""What `inspect` reports of the LoRA in a checkpoint, without reading its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.conversion.lora import find_scale, scale_of
from cogtools.conversion.options import FORMATS, format_words
from cogtools.conversion.plan import LoraPlan, can_hold, plan_lora
from cogtools.conversion.readers import readers_of
from cogtools.conversion.refusals import refuse_unexportable
from cogtools.conversion.scale import BY_NOTHING
from cogtools.errors import CogtoolsError, ExportError, Hint, Problem, command
from cogtools.inspection.report import ExportOutlook, LoraReport
from cogtools.layouts import comfyui, diffusers
from cogtools.layouts.folded import fold_names
from cogtools.layouts.recognition import BY_NAME

if TYPE_CHECKING:
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.conversion.lora import Lora
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
    scalings = () if scale is None else (scaling for scaling in scale.scalings.values() if scaling is not None)
    return LoraReport(
        layout=None if lora.layout is None else lora.layout.name,
        names=names_of(lora),
        tensors=len(lora.everything),
        size_bytes=sum(entry.size_bytes for entry in lora.everything),
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
        unstated_scaling=_unstated_scaling(lora),
        misstated=_misstated(lora),
        scalings=tuple(sorted(set(scalings))),
        export=outlook,
        readers=readers_of(lora, scale, model),
    )


def _unstated_scaling(lora: Lora) -> float | None:
    """What the program that the file is for multiplies every update by where nothing states the scale."""
    found = {lora.intended.scaling_unstated(rank) for rank in lora.ranks.values() if rank} or {None}
    return found.pop() if len(found) == 1 else None


def _misstated(lora: Lora) -> tuple[Problem, ...]:
    """What is wrong with what the file states of its scale."""
    stated = lora.stated.get(lora.intended.scale)
    if stated is not None and stated.problems:
        return stated.problems
    if lora.layout is None:
        return ()
    try:
        find_scale(lora)
    except ExportError as error:
        return error.problems
    return ()


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
    lora = plan.lora
    formats = tuple(name for name in FORMATS if can_hold(BY_NAME[name], lora))
    usual = (diffusers.LAYOUT, comfyui.LAYOUT)
    other = next((layout for layout in usual if layout.name in formats and layout is not lora.layout), None)
    scale = ["--alpha", "A"] if plan.scale.source == BY_NOTHING else []  # whoever does not know it can leave it out
    hint = None if other is None else command("export-lora", checkpoint.path, "OUT_DIR", *format_words(other), *scale)
    return plan, ExportOutlook(
        possible=True, tensors=len(plan.names), size_bytes=size_bytes, formats=formats, notices=plan.notices, hint=hint
    )


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
        return frozenset(plan.names)  # it is refused if any is missing
    every = lora.expected(range(model.layers) if model is not None else lora.layers)
    stated = lora.stated.get(lora.intended.scale)
    if stated is None:
        return every
    targeted = set(stated.targeted([name.module for name in every]))
    return frozenset(name for name in every if name.module in targeted)


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

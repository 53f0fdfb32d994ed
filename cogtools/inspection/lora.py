"""What can be said of the LoRA in a checkpoint, whatever layout it is in, without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cogtools.checkpoint.zero3 import whole_tensor
from cogtools.errors import CogtoolsError
from cogtools.inspection.report import ExportOutlook, LoraReport
from cogtools.layouts import diffusers, peft, sat
from cogtools.layouts.cogvideox import LoraKey, lora_keys, rank_of
from cogtools.layouts.naming import DIFFUSERS, PEFT
from cogtools.planning import DEFAULT_ALPHA, LoraPlan, plan_lora_export
from cogtools.stated import Stated, read_stated
from cogtools.training_config import find_training_config, read_training_config
from cogtools.words import fold_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.storage import TensorEntry
    from cogtools.layouts.cogvideox import Transformer

_LAYOUTS: dict[str, Callable[[str], LoraKey | None]] = {
    "SAT": sat.parse_lora_key,
    DIFFUSERS.name: DIFFUSERS.parse,
    PEFT.name: PEFT.parse,
}
"""How a LoRA's tensors can be named, by the layout's name: the first that fits one of its keys counts."""

_NAMINGS = {naming.name: naming for naming in (DIFFUSERS, PEFT)}


@dataclass(frozen=True, slots=True)
class Lora:
    """The tensors of a LoRA.

    Attributes:
        layout: whose key names it has: "SAT", "diffusers", "PEFT", or "unknown".
        tensors: by what they are.
        unplaced: its keys that the layout has no place for, or that are no tensors.
    """

    layout: str
    tensors: dict[LoraKey, TensorEntry] = field(default_factory=dict)
    unplaced: tuple[str, ...] = ()


def find_lora(checkpoint: Checkpoint) -> Lora | None:
    """The LoRA in a checkpoint's state dict; None if there is none."""
    keys = sat.lora_keys_in([*checkpoint.tensors, *checkpoint.not_tensors])
    if not keys:
        return None
    layout = next((layout for layout, parse in _LAYOUTS.items() if any(map(parse, keys))), "unknown")
    parse = _LAYOUTS.get(layout, _parse_nothing)
    tensors: dict[LoraKey, TensorEntry] = {}
    unplaced = []
    for key in keys:
        name = parse(key)
        if name is None or name in tensors or key not in checkpoint.tensors:
            unplaced.append(key)
        else:
            tensors[name] = whole_tensor(checkpoint.tensors[key])
    return Lora(layout, tensors, tuple(unplaced))


def _parse_nothing(_key: str) -> LoraKey | None:
    return None


def describe_lora(checkpoint: Checkpoint, lora: Lora, model: Transformer | None) -> LoraReport:
    """What can be said of a LoRA."""
    plan, outlook = _export_outlook(checkpoint) if lora.layout == "SAT" else (None, None)
    stated = read_stated(checkpoint, _NAMINGS[lora.layout]) if lora.layout in _NAMINGS else None
    ranks = sorted({rank_of(name.factor, entry.shape) for name, entry in lora.tensors.items() if len(entry.shape) == 2})
    alpha, alpha_source = _alpha(checkpoint, lora, plan, stated)
    expected = _expected(lora, model, plan, stated)
    missing = tuple(fold_names(name for name in expected if name not in lora.tensors))
    everything = [checkpoint.tensors[key] for key in sat.lora_keys_in(checkpoint.tensors)]
    return LoraReport(
        layout=lora.layout,
        tensors=len(everything),
        size_bytes=sum(entry.size_bytes for entry in everything),
        layers=tuple(sorted({name.layer for name in lora.tensors})),
        ranks=tuple(ranks),
        dtypes=tuple(sorted({entry.dtype.name for entry in everything})),
        complete=None if lora.layout == "unknown" else not (missing or lora.unplaced) and _is_one_rank(ranks, stated),
        missing=missing,
        unplaced=lora.unplaced,
        alpha=alpha,
        alpha_source=alpha_source,
        misstated=stated.problems if stated is not None else (),
        scaling=_scaling(lora, ranks, alpha, stated),
        export=outlook,
    )


def _export_outlook(checkpoint: Checkpoint) -> tuple[LoraPlan | None, ExportOutlook]:
    try:
        plan = plan_lora_export(checkpoint)
    except CogtoolsError as error:
        return None, ExportOutlook(
            possible=False, reason=error.what, found=error.found, hint=error.hint, problems=error.problems
        )
    size_bytes = sum(tensor.source.entry.size_bytes for tensor in plan.tensors)
    return plan, ExportOutlook(possible=True, tensors=len(plan.tensors), size_bytes=size_bytes, notices=plan.notices)


def _expected(lora: Lora, model: Transformer | None, plan: LoraPlan | None, stated: Stated | None) -> list[LoraKey]:
    """The tensors that a LoRA should have: those that it says, else all of the model, else all of its own layers."""
    if lora.layout == "unknown":
        return []
    if plan is not None:
        return lora_keys(plan.layers)
    layers = range(model.layers) if model is not None else tuple(sorted({name.layer for name in lora.tensors}))
    every = lora_keys(layers)
    return stated.targeted(every) if stated is not None else every


def _alpha(
    checkpoint: Checkpoint, lora: Lora, plan: LoraPlan | None, stated: Stated | None
) -> tuple[float | None, str | None]:
    """A LoRA's alpha, and where it is stated."""
    if plan is not None:
        return plan.alpha
    if lora.layout == "SAT":
        return _trainers_alpha(checkpoint)
    if stated is None or stated.config is None or stated.config.alpha is None:
        return None, None
    return stated.config.alpha, peft.CONFIG_NAME if lora.layout == PEFT.name else diffusers.ADAPTER_METADATA_KEY


def _trainers_alpha(checkpoint: Checkpoint) -> tuple[float | None, str | None]:
    path = find_training_config(checkpoint.path)
    if path is None:
        return DEFAULT_ALPHA, "default"
    try:
        alpha = read_training_config(path).alpha
    except CogtoolsError:
        return None, None
    return (DEFAULT_ALPHA, "default") if alpha is None else (alpha, path.name)


def _is_one_rank(ranks: list[int], stated: Stated | None) -> bool:
    """Whether a LoRA has one rank, or says itself that it has several."""
    return len(ranks) == 1 or bool(stated is not None and stated.config is not None and stated.config.rank_pattern)


def _scaling(lora: Lora, ranks: list[int], alpha: float | None, stated: Stated | None) -> float | None:
    """What every module's update is multiplied by; None if that is not known, or not one number."""
    if stated is None:
        return alpha / ranks[0] if alpha is not None and len(ranks) == 1 and ranks[0] else None
    modules = {diffusers.module_path(name) for name in lora.tensors}
    scalings = {stated.scaling_of(module) for module in modules}
    return scalings.pop() if len(scalings) == 1 else None


def hidden_size_of(lora: Lora) -> int | None:
    """The hidden size that a LoRA's shapes have; None if they do not agree."""
    sizes = {
        entry.shape[1 if name.factor == "A" else 0] for name, entry in lora.tensors.items() if len(entry.shape) == 2
    }
    return sizes.pop() if len(sizes) == 1 else None

"""What can be said of the LoRA in a checkpoint, whatever layout it is in, without reading its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from cogtools.checkpoint.tensors import whole_tensor
from cogtools.conversion.adapter_config import Stated, read_stated
from cogtools.conversion.plan import DEFAULT_ALPHA, LoraPlan, plan_lora_export
from cogtools.conversion.refusals import refuse_unexportable
from cogtools.conversion.scale import BY_CONFIG, BY_DEFAULT
from cogtools.conversion.training_config import find_training_config, read_training_config
from cogtools.errors import CogtoolsError, Hint
from cogtools.inspection.report import ExportOutlook, LoraReport
from cogtools.inspection.sections import is_lora_key
from cogtools.layouts import diffusers, peft, sat
from cogtools.layouts.family import LoraKey, hidden_of, lora_keys, rank_of
from cogtools.layouts.folded import fold_names
from cogtools.layouts.naming import DIFFUSERS, PEFT, near_miss

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.layouts.family import Transformer

_LAYOUTS: dict[str, Callable[[str], LoraKey | None]] = {
    "SAT": sat.parse_lora_key,
    DIFFUSERS.name: DIFFUSERS.parse,
    PEFT.name: PEFT.parse,
}
"""How a LoRA's tensors can be named, by the layout's name: the first that fits one of its keys counts."""

_NAMINGS = {naming.name: naming for naming in (DIFFUSERS, PEFT)}

OTHER, UNKNOWN = "other", "unknown"
"""Layouts whose keys are recognised but whose scale is not read, and all the rest."""

Module: TypeAlias = tuple[int, str]
"""A module that a LoRA adapts: its layer and its projection."""


@dataclass(frozen=True, slots=True)
class Lora:
    """The tensors of a LoRA.

    Attributes:
        layout: whose key names it has: "SAT", "diffusers", "PEFT", "other" or "unknown".
        names: what sets the names of an "other" layout apart.
        tensors: by what they are.
        unplaced: its keys that the layout has no place for, or that are no tensors.
        stated: what a file in diffusers' or PEFT's layout states of its scale.
    """

    layout: str
    names: str | None = None
    tensors: dict[LoraKey, TensorEntry] = field(default_factory=dict)
    unplaced: tuple[str, ...] = ()
    stated: Stated | None = None

    def scalings(self, alpha: float | None) -> dict[Module, float | None]:
        """What the update of each module is multiplied by; None where that is not known.

        Args:
            alpha: the training's, for a LoRA in SAT's layout, which does not state its scale.
        """
        found: dict[Module, float | None] = {}
        for name, entry in self.tensors.items():
            module = name.layer, name.projection
            if self.stated is not None:
                found[module] = self.stated.scaling_of(diffusers.module_path(name))
            elif self.layout == "SAT" and name.factor == "A" and alpha is not None and len(entry.shape) == 2:
                found[module] = alpha / entry.shape[0] if entry.shape[0] else None
        return found


def find_lora(checkpoint: Checkpoint) -> Lora | None:
    """The LoRA in a checkpoint's state dict; None if there is none."""
    odd = [key for key, value in checkpoint.not_tensors.items() if not isinstance(value, (dict, list, tuple))]
    keys = [key for key in [*checkpoint.tensors, *odd] if is_lora_key(key)]
    if not keys:
        return None
    layout, names, parse = _layout_of(keys)
    tensors: dict[LoraKey, TensorEntry] = {}
    unplaced = []
    for key in keys:
        name = parse(key)
        if name is not None and name not in tensors and key in checkpoint.tensors:
            tensors[name] = whole_tensor(checkpoint.tensors[key])
        elif layout != OTHER or not key.endswith(".alpha"):
            unplaced.append(key)
    stated = read_stated(checkpoint, _NAMINGS[layout]) if layout in _NAMINGS else None
    return Lora(layout, names, tensors, tuple(unplaced), stated)


def _layout_of(keys: list[str]) -> tuple[str, str | None, Callable[[str], LoraKey | None]]:
    """The layout that keys are in, what sets its names apart, and what reads them."""
    for layout, parse in _LAYOUTS.items():
        if any(map(parse, keys)):
            return layout, None, parse
    misses = Counter(miss.what for miss in map(near_miss, keys) if miss is not None)
    if misses:
        return OTHER, misses.most_common(1)[0][0], _parse_near_miss
    return UNKNOWN, None, _parse_nothing


def _parse_near_miss(key: str) -> LoraKey | None:
    miss = near_miss(key)
    return None if miss is None else miss.name


def _parse_nothing(_key: str) -> LoraKey | None:
    return None


def describe_lora(checkpoint: Checkpoint, lora: Lora, model: Transformer | None) -> LoraReport:
    """What can be said of a LoRA."""
    plan, outlook = _export_outlook(checkpoint)
    ranks = sorted({rank_of(name.factor, entry.shape) for name, entry in lora.tensors.items() if len(entry.shape) == 2})
    alpha, alpha_source = _alpha(checkpoint, lora, plan)
    expected = _expected(lora, model, plan)
    missing = tuple(fold_names(name for name in expected if name not in lora.tensors))
    everything = [entry for key, entry in checkpoint.tensors.items() if is_lora_key(key)]
    factors = [entry for key, entry in checkpoint.tensors.items() if sat.is_lora_key(key)]
    return LoraReport(
        layout=lora.layout,
        names=lora.names,
        tensors=len(everything),
        size_bytes=sum(entry.size_bytes for entry in everything),
        layers=tuple(sorted({name.layer for name in lora.tensors})),
        ranks=tuple(ranks),
        dtypes=tuple(sorted({entry.dtype.name for entry in factors})),
        complete=None if lora.layout == UNKNOWN else _is_complete(checkpoint, lora, missing, ranks),
        missing=missing,
        unplaced=lora.unplaced,
        alpha=alpha,
        alpha_source=alpha_source,
        misstated=lora.stated.problems if lora.stated is not None else (),
        scalings=tuple(sorted({scaling for scaling in lora.scalings(alpha).values() if scaling is not None})),
        export=outlook,
    )


def _export_outlook(checkpoint: Checkpoint) -> tuple[LoraPlan | None, ExportOutlook]:
    try:
        plan = plan_lora_export(checkpoint)
    except CogtoolsError as error:
        return None, ExportOutlook(
            possible=False, reason=error.what, found=error.found, hint=_elsewhere(error.hint), problems=error.problems
        )
    size_bytes = sum(tensor.source.entry.size_bytes for tensor in plan.tensors)
    return plan, ExportOutlook(possible=True, tensors=len(plan.tensors), size_bytes=size_bytes, notices=plan.notices)


def _elsewhere(hint: Hint | None) -> Hint | None:
    """What an error advises besides to inspect the checkpoint, which is what is being done."""
    if hint is None or hint.command is None or not hint.command.startswith("cogtools inspect"):
        return hint
    return None if hint.advice is None else Hint(hint.advice)


def _expected(lora: Lora, model: Transformer | None, plan: LoraPlan | None) -> list[LoraKey]:
    """The tensors that a LoRA should have: those that it says, else all of the model, else all of its own layers."""
    if lora.layout == UNKNOWN:
        return []
    if plan is not None:
        return lora_keys(plan.layers)
    layers = range(model.layers) if model is not None else tuple(sorted({name.layer for name in lora.tensors}))
    every = lora_keys(layers)
    return lora.stated.targeted(every) if lora.stated is not None else every


def _alpha(checkpoint: Checkpoint, lora: Lora, plan: LoraPlan | None) -> tuple[float | None, str | None]:
    """A LoRA's alpha, and where it is stated."""
    if plan is not None:
        return plan.alpha
    if lora.layout == "SAT":
        return _trainers_alpha(checkpoint)
    config = lora.stated.config if lora.stated is not None else None
    if config is None or config.alpha is None:
        return None, None
    return config.alpha, peft.CONFIG_NAME if lora.layout == PEFT.name else diffusers.ADAPTER_METADATA_KEY


def _trainers_alpha(checkpoint: Checkpoint) -> tuple[float | None, str | None]:
    path = find_training_config(checkpoint.path)
    if path is None:
        return DEFAULT_ALPHA, BY_DEFAULT
    try:
        alpha = read_training_config(path).alpha
    except CogtoolsError:
        return None, None
    return (DEFAULT_ALPHA, BY_DEFAULT) if alpha is None else (alpha, BY_CONFIG)


def _is_complete(checkpoint: Checkpoint, lora: Lora, missing: tuple[str, ...], ranks: list[int]) -> bool:
    if missing or lora.unplaced or not _is_one_rank(ranks, lora.stated):
        return False
    try:
        refuse_unexportable(checkpoint)
    except CogtoolsError:  # every layer is there, and of each a part only
        return False
    return True


def _is_one_rank(ranks: list[int], stated: Stated | None) -> bool:
    """Whether a LoRA has one rank, or says itself that it has several."""
    return len(ranks) == 1 or bool(stated is not None and stated.config is not None and stated.config.rank_pattern)


def hidden_size_of(lora: Lora) -> int | None:
    """The hidden size that a LoRA's shapes have; None if they do not agree."""
    sizes = {hidden_of(name.factor, entry.shape) for name, entry in lora.tensors.items() if len(entry.shape) == 2}
    return sizes.pop() if len(sizes) == 1 else None

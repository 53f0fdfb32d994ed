"""What can be said of the LoRA in a checkpoint, whatever layout it is in, without reading its weights."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cogtools.checkpoint.storage import SourceFile
from cogtools.errors import CogtoolsError
from cogtools.inspection.report import ExportOutlook, LoraReport
from cogtools.layouts import diffusers, sat
from cogtools.layouts.cogvideox import FACTORS, PROJECTIONS, LoraKey, lora_keys, rank_of
from cogtools.planning import DEFAULT_ALPHA, LoraPlan, fold_numbers, plan_lora_export
from cogtools.refusals import whole_tensor
from cogtools.training_config import find_training_config, read_training_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.storage import TensorEntry
    from cogtools.layouts.cogvideox import Transformer

MAX_ALPHA = 2**63
"""A larger one was never meant; and JSON has no infinity."""

PEFT_CONFIG = "adapter_config.json"
"""Where peft states rank and alpha, beside the weights."""

_MAX_CONFIG_BYTES = 1 << 20

_PEFT_PREFIX = "base_model.model."


def _parse_peft(key: str) -> LoraKey | None:
    rest = key.removeprefix(_PEFT_PREFIX)
    return None if rest == key else diffusers.parse_key(diffusers.PREFIX + rest)


_LAYOUTS: tuple[tuple[str, Callable[[str], LoraKey | None]], ...] = (
    ("SAT", sat.parse_lora_key),
    ("diffusers", diffusers.parse_key),
    ("PEFT", _parse_peft),
)


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
    layout, parse = next(
        ((layout, parse) for layout, parse in _LAYOUTS if any(map(parse, keys))), ("unknown", lambda _: None)
    )
    tensors: dict[LoraKey, TensorEntry] = {}
    unplaced = []
    for key in keys:
        name = parse(key)
        if name is None or name in tensors or key not in checkpoint.tensors:
            unplaced.append(key)
        else:
            tensors[name] = whole_tensor(checkpoint.tensors[key])
    return Lora(layout, tensors, tuple(unplaced))


def describe_lora(checkpoint: Checkpoint, lora: Lora, model: Transformer | None) -> LoraReport:
    """What can be said of a LoRA."""
    plan, outlook = _export_outlook(checkpoint) if lora.layout == "SAT" else (None, None)
    ranks = sorted({rank_of(name.factor, entry.shape) for name, entry in lora.tensors.items() if len(entry.shape) == 2})
    alpha, alpha_source = _alpha(checkpoint, lora, plan)
    missing = _missing(lora, _expected_layers(checkpoint, lora, model, plan))
    everything = [checkpoint.tensors[key] for key in sat.lora_keys_in(checkpoint.tensors)]
    return LoraReport(
        layout=lora.layout,
        tensors=len(everything),
        size_bytes=sum(entry.size_bytes for entry in everything),
        layers=tuple(sorted({name.layer for name in lora.tensors})),
        ranks=tuple(ranks),
        dtypes=tuple(sorted({entry.dtype.name for entry in everything})),
        complete=None if lora.layout == "unknown" else not (missing or lora.unplaced) and len(ranks) == 1,
        missing=missing,
        unplaced=lora.unplaced,
        alpha=alpha,
        alpha_source=alpha_source,
        scaling=alpha / ranks[0] if alpha is not None and len(ranks) == 1 and ranks[0] else None,
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


def _expected_layers(
    checkpoint: Checkpoint, lora: Lora, model: Transformer | None, plan: LoraPlan | None
) -> tuple[int, ...]:
    """The layers that a LoRA should have: those that it says, else those of the model, else those that it has."""
    if plan is not None:
        return plan.layers
    stated = _adapter_config(checkpoint, lora).get("target_modules") if lora.layout != "SAT" else None
    if isinstance(stated, list):
        keys = (diffusers.parse_key(f"{diffusers.PREFIX}{path}.lora_A.weight") for path in stated)
        layers = {key.layer for key in keys if key is not None}
        if layers:
            return tuple(sorted(layers))
    if model is not None:
        return tuple(range(model.layers))
    return tuple(sorted({name.layer for name in lora.tensors}))


def _missing(lora: Lora, layers: tuple[int, ...]) -> tuple[str, ...]:
    """What a LoRA of these layers would have and this has not, folded."""
    if lora.layout == "unknown":
        return ()
    parts_by_layer: dict[int, list[str]] = defaultdict(list)
    for name in lora_keys(layers):
        if name not in lora.tensors:
            parts_by_layer[name.layer].append(f"{name.projection} lora_{name.factor}")
    layers_by_parts: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for layer, parts in parts_by_layer.items():
        layers_by_parts[tuple(parts)].append(layer)
    whole = len(PROJECTIONS) * len(FACTORS)
    return tuple(
        f"layer{'s' * (len(numbers) > 1)} {fold_numbers(numbers)}"
        + (": " + ", ".join(parts) if len(parts) < whole else "")
        for parts, numbers in layers_by_parts.items()
    )


def _alpha(checkpoint: Checkpoint, lora: Lora, plan: LoraPlan | None) -> tuple[float | None, str | None]:
    """A LoRA's alpha, and where it is stated."""
    if plan is not None:
        return plan.alpha
    if lora.layout == "SAT":
        return _trainers_alpha(checkpoint)
    alpha = _adapter_config(checkpoint, lora).get("lora_alpha")
    if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < MAX_ALPHA:
        return alpha, PEFT_CONFIG if lora.layout == "PEFT" else diffusers.ADAPTER_METADATA_KEY
    return None, None


def _trainers_alpha(checkpoint: Checkpoint) -> tuple[float | None, str | None]:
    path = find_training_config(checkpoint.path)
    if path is None:
        return DEFAULT_ALPHA, "default"
    try:
        alpha = read_training_config(path).alpha
    except CogtoolsError:
        return None, None
    return (DEFAULT_ALPHA, "default") if alpha is None else (alpha, path.name)


def _adapter_config(checkpoint: Checkpoint, lora: Lora) -> dict[str, object]:
    """The configuration of peft, without diffusers' prefix; {} if there is none.

    diffusers has it in the header of the safetensors file, peft in a file of its own beside it.
    """
    try:
        if lora.layout == "PEFT":
            with SourceFile.open(checkpoint.path.with_name(PEFT_CONFIG)) as file:
                config = json.loads(file.read(0, min(file.size_bytes, _MAX_CONFIG_BYTES)))
        else:
            config = json.loads(checkpoint.metadata.get(diffusers.ADAPTER_METADATA_KEY, "{}"))
    except (ValueError, RecursionError, CogtoolsError):
        return {}
    if not isinstance(config, dict):
        return {}
    return {key.removeprefix(diffusers.PREFIX): value for key, value in config.items()}


def hidden_size_of(lora: Lora) -> int | None:
    """The hidden size that a LoRA's shapes have; None if they do not agree."""
    sizes = {
        entry.shape[1 if name.factor == "A" else 0] for name, entry in lora.tensors.items() if len(entry.shape) == 2
    }
    return sizes.pop() if len(sizes) == 1 else None

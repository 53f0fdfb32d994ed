"""What was trained besides the LoRA, as the file tells: then the LoRA alone does not give what was trained."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cogtools.formatting import fold_numbers, shown
from cogtools.layouts.family import LAYER_NUMBER
from cogtools.layouts.lora import is_lora_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.conversion.lora import Lora

SHOWN_KINDS = 4


def trained_beside(lora: Lora) -> list[str]:
    """The keys of the tensors that were trained besides the LoRA; [] if the file does not tell of any.

    DeepSpeed lists what was trained in `param_shapes`, where it lists what was not in `frozen_param_shapes`. PEFT
    saves base weights among the LoRA if they were trained.

    Source: DeepSpeed, runtime/engine.py (`_get_zero_param_shapes`, `_get_zero_frozen_param_attributes`).
    """
    return [*_in_param_shapes(lora.checkpoint), *lora.base_weights]


def _in_param_shapes(checkpoint: Checkpoint) -> list[str]:
    groups, frozen = (checkpoint.values.get(name) for name in ("param_shapes", "frozen_param_shapes"))
    if not isinstance(groups, list) or not isinstance(frozen, dict):
        return []
    shapes = [group for group in groups if isinstance(group, dict)]
    return [key for group in shapes for key in group if isinstance(key, str) and not is_lora_key(key)]


def trained_notices(lora: Lora) -> list[str]:
    """What to note of them."""
    keys = trained_beside(lora)
    if not keys:
        return []
    kinds = _kinds(keys)
    more = f" and {len(kinds) - SHOWN_KINDS} kinds more" if len(kinds) > SHOWN_KINDS else ""
    were, are = ("tensors were", "are") if len(keys) > 1 else ("tensor was", "is")
    which = ", ".join(map(shown, kinds[:SHOWN_KINDS])) + more
    return [
        f"{len(keys):,} other {were} trained too and {are} not in the LoRA, which alone does not give what was "
        f"trained: {which}."
    ]


_LAYER = re.compile(rf"(?<=\.){LAYER_NUMBER}(?=\.)", re.ASCII)


def _kinds(keys: Iterable[str]) -> list[str]:
    """Keys in few words: those that differ in the layer only in one."""
    alike: dict[tuple[str, str], list[int]] = {}
    alone: list[str] = []
    for key in keys:
        layer = _LAYER.search(key)
        if layer is None:
            alone.append(key)
        else:
            alike.setdefault((key[: layer.start()], key[layer.end() :]), []).append(int(layer[0]))
    return [*(f"{before}{fold_numbers(sorted(layers))}{after}" for (before, after), layers in alike.items()), *alone]

"""SAT's layout: the keys that CogVideo's trainer writes.

One transformer layer's LoRA, h being the hidden size and r the rank. The fused query_key_value projection has its
rows in the order q, k, v, and its LoRA in three parts in that order:

    transformer.layers.N.attention.query_key_value.matrix_A.{0,1,2}    (r, h)
    transformer.layers.N.attention.query_key_value.matrix_B.{0,1,2}    (h, r)
    transformer.layers.N.attention.dense.matrix_A.0                    (r, h)
    transformer.layers.N.attention.dense.matrix_B.0                    (h, r)

Source: SwissArmyTransformer, sat/model/finetune/lora2.py (`LoraMixin`, `HackParameterList`), and checkpoints of the
trainer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cogtools.layouts.cogvideox import LAYER_NUMBER, LoraKey, Transformer, recognise

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFIX = "model.diffusion_model."
"""What the trainer puts before every key of the transformer. Files that people save again may lack it, and wrappers
(DistributedDataParallel, DeepSpeed's ZeRO-3) put "module." before it."""

_LAYER = "transformer.layers."
_IN_LAYER = re.compile(rf"{re.escape(_LAYER)}{LAYER_NUMBER}\.", re.ASCII)

_LORA_SUFFIXES = {
    "attention.query_key_value.matrix_A.0": ("q", "A"),
    "attention.query_key_value.matrix_A.1": ("k", "A"),
    "attention.query_key_value.matrix_A.2": ("v", "A"),
    "attention.query_key_value.matrix_B.0": ("q", "B"),
    "attention.query_key_value.matrix_B.1": ("k", "B"),
    "attention.query_key_value.matrix_B.2": ("v", "B"),
    "attention.dense.matrix_A.0": ("out", "A"),
    "attention.dense.matrix_B.0": ("out", "B"),
}

_LORA_SEGMENTS = frozenset({"matrix_A", "matrix_B", "lora_A", "lora_B", "lora_down", "lora_up", "lora"})
"""A key with one of these segments belongs to a LoRA, whether or not it has a row above."""

_BASE_LAYER_SUFFIX = "mlp.dense_h_to_4h.weight"
"""Every layer has it, with or without a LoRA. Whoever strips a checkpoint of its base weights strips this one: it is
the largest."""

_PATCH_EMBED = "mixins.patch_embed.proj.weight"
"""Tells the models apart: its shape is in the table of models."""


def bare_key(key: str) -> str:
    """A key of the transformer without what the trainer and wrappers put before it."""
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key.removeprefix(PREFIX)


def sat_key(key: LoraKey) -> str:
    """SAT's key of a LoRA tensor, as the trainer writes it."""
    suffix = next(suffix for suffix, meaning in _LORA_SUFFIXES.items() if meaning == (key.projection, key.factor))
    return f"{PREFIX}{_LAYER}{key.layer}.{suffix}"


def parse_lora_key(key: str) -> LoraKey | None:
    """Which LoRA tensor a key names, matched as a whole; None if none."""
    layer, suffix = _split_layer(bare_key(key))
    meaning = _LORA_SUFFIXES.get(suffix)
    return None if layer is None or meaning is None else LoraKey(layer, *meaning)


def is_lora_key(key: str) -> bool:
    """Whether a key belongs to a LoRA of any kind, exportable or not."""
    return not _LORA_SEGMENTS.isdisjoint(key.split("."))


def recognise_transformer(shapes: Mapping[str, tuple[int, ...]], hidden: int) -> Transformer | None:
    """The transformer whose base weights are among these shapes, or which has this hidden size."""
    bare = {bare_key(key): shape for key, shape in shapes.items()}
    layers = {layer for layer, suffix in map(_split_layer, bare) if suffix == _BASE_LAYER_SUFFIX and layer is not None}
    return recognise(hidden, len(layers) or None, bare.get(_PATCH_EMBED))


def hidden_size(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The hidden size that the base weights among these shapes have; None if there are none."""
    for key, shape in shapes.items():
        if key.endswith(_BASE_LAYER_SUFFIX) and len(shape) == 2 and _split_layer(bare_key(key))[0] is not None:
            return shape[1]
    return None


def lora_keys_in(keys: Iterable[str]) -> list[str]:
    """Those of the keys that belong to a LoRA."""
    return [key for key in keys if is_lora_key(key)]


def _split_layer(bare: str) -> tuple[int | None, str]:
    """The layer that a key belongs to, and the rest of the key: (None, "") if it belongs to none."""
    match = _IN_LAYER.match(bare)
    return (int(match[1]), bare[match.end() :]) if match else (None, "")

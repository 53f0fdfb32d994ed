"""Tensors and modules of a LoRA in few words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.formatting import fold_numbers
from cogtools.layouts.diffusers import NAMES
from cogtools.layouts.family import ATTENTION, LINEARS, PARTS, LoraKey, Module

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

Kind = tuple[str, str]
"""Which module of a layer, and which part of its adapter."""

ATTENTION_KINDS = frozenset((name, factor) for name in ATTENTION for factor in "AB")

_WORDS = {"A": "lora_A", "B": "lora_B", "bias": "bias of lora_B", "magnitude": "magnitude vector", "alpha": "alpha"}


def fold_names(names: Iterable[LoraKey], every: Collection[Kind] = ATTENTION_KINDS) -> list[str]:
    """LoRA tensors in few words, layers with the same ones together: "layers 12-14: to_v lora_B".

    Args:
        names: the tensors.
        every: what a layer has if it has "all tensors".
    """
    return list(folded_names(names, every))


def folded_names(names: Iterable[LoraKey], every: Collection[Kind] = ATTENTION_KINDS) -> dict[str, list[LoraKey]]:
    """The same, and which tensors each of the texts stands for."""
    by_layer: dict[int | None, set[LoraKey]] = {}
    for name in names:
        by_layer.setdefault(name.layer, set()).add(name)
    alike: dict[frozenset[Kind], list[int]] = {}
    for layer in sorted(layer for layer in by_layer if layer is not None):
        alike.setdefault(frozenset((name.name, name.part) for name in by_layer[layer]), []).append(layer)
    folded = {
        f"{_layers(layers)}: {_fold_kinds(kinds, every)}": sorted(
            (name for layer in layers for name in by_layer[layer]), key=lambda name: name.order
        )
        for kinds, layers in alike.items()
    }
    if None in by_layer:
        beside = sorted(by_layer[None], key=lambda name: name.order)
        folded[_fold_kinds({(name.name, name.part) for name in beside}, ())] = beside
    return folded


def fold_modules(modules: Iterable[Module]) -> str:
    """Modules in few words, as `fold_names` does: "layers 3-5: v; layer 7: q, out; proj_out"."""
    by_layer: dict[int | None, set[str]] = {}
    for layer, name in modules:
        by_layer.setdefault(layer, set()).add(name)
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in sorted(layer for layer in by_layer if layer is not None):
        alike.setdefault(_in_order(by_layer[layer]), []).append(layer)
    texts = [f"{_layers(layers)}: {', '.join(names)}" for names, layers in alike.items()]
    return "; ".join([*texts, ", ".join(_in_order(by_layer[None]))] if None in by_layer else texts)


def short_name(name: str) -> str:
    """What messages call a module: its name in diffusers, without what all of the attention begin with."""
    return NAMES.rows[name].removeprefix("attn1.")


def _in_order(names: set[str]) -> tuple[str, ...]:
    return tuple(linear.name for linear in LINEARS if linear.name in names)


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {fold_numbers(layers)}"


def _fold_kinds(kinds: Collection[Kind], every: Collection[Kind]) -> str:
    if every and set(kinds) == set(every):
        return "all tensors"
    texts = []
    for linear in LINEARS:
        parts = [_WORDS[part] for part in PARTS if (linear.name, part) in kinds]
        if parts:
            texts.append(f"{short_name(linear.name)} {' and '.join(parts)}")
    return ", ".join(texts)

"""Tensors and modules of a LoRA in few words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.formatting import fold_numbers
from cogtools.layouts.diffusers import MODULES
from cogtools.layouts.family import FACTORS, PROJECTIONS, LoraKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def fold_names(names: Iterable[LoraKey]) -> list[str]:
    """LoRA tensors in few words: layers of which the same ones are meant, together ("layers 12-14: to_v lora_B")."""
    return list(folded_names(names))


def folded_names(names: Iterable[LoraKey]) -> dict[str, list[LoraKey]]:
    """The same, and which tensors each of the texts stands for."""
    by_layer: dict[int, set[LoraKey]] = {}
    for name in names:
        by_layer.setdefault(name.layer, set()).add(name)
    alike: dict[frozenset[tuple[str, str]], list[int]] = {}
    for layer in sorted(by_layer):
        alike.setdefault(frozenset((name.projection, name.factor) for name in by_layer[layer]), []).append(layer)
    return {
        f"{_layers(layers)}: {_fold_parts(meant)}": sorted(name for layer in layers for name in by_layer[layer])
        for meant, layers in alike.items()
    }


def fold_modules(modules: Iterable[tuple[int, str]]) -> str:
    """Modules by layer and projection in few words, as `fold_names` does: "layers 3-5: v; layer 7: q, out"."""
    projections: dict[int, set[str]] = {}
    for layer, projection in modules:
        projections.setdefault(layer, set()).add(projection)
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in sorted(projections):
        meant = tuple(name for name in PROJECTIONS if name in projections[layer])
        alike.setdefault(meant, []).append(layer)
    return "; ".join(f"{_layers(layers)}: {', '.join(meant)}" for meant, layers in alike.items())


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {fold_numbers(layers)}"


def _fold_parts(meant: frozenset[tuple[str, str]]) -> str:
    if len(meant) == len(PROJECTIONS) * len(FACTORS):
        return "all tensors"
    texts = []
    for projection in PROJECTIONS:
        factors = [f"lora_{factor}" for factor in FACTORS if (projection, factor) in meant]
        if factors:
            texts.append(f"{MODULES[projection].removeprefix('attn1.')} {' and '.join(factors)}")
    return ", ".join(texts)

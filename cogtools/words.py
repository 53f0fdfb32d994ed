"""Numbers, layers and tensors in few words: what messages and reports have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.layouts.cogvideox import FACTORS, PROJECTIONS, LoraKey
from cogtools.layouts.diffusers import MODULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BY_HAND, BY_CONFIG, BY_DEFAULT = "--alpha", "training_config.yaml", "default"

ALPHA_SOURCES = {
    BY_HAND: "given by --alpha",
    BY_CONFIG: "from training_config.yaml",
    BY_DEFAULT: "SAT's default",
    "lora_adapter_metadata": "stated in the header",
    "adapter_config.json": "from adapter_config.json",
}
"""Where a LoRA's alpha comes from, by the names that reports have for it."""


def number(value: float) -> str:
    """A number without needless digits: "1", "0.0078125"."""
    return f"{value:.10g}"


def counted(count: int, noun: str) -> str:
    """A number of things: "1 tensor", "24 tensors"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def fold_numbers(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges: "0-3, 7, 9-11"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


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

"""Which tensors a LoRA file should have: of the modules that it states, else of each kind of module in all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cogtools.conversion.lora import find_transformer
from cogtools.errors import OptionError
from cogtools.layouts import diffusers
from cogtools.layouts.family import MAX_LAYERS, MODELS, SLUGS, LoraKey, Transformer, recognise

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from cogtools.conversion.adapter_config import Stated
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import Module


@dataclass(frozen=True, slots=True)
class Expected:
    """What a file should hold.

    Attributes:
        transformer: the transformer that it belongs to; its hidden size is 0 if nothing tells it.
        known_by: what tells the number of layers; None if nothing does, and the file's own are taken.
        names: the tensors that it should have.
        partial: whether it states that it adapts fewer than all modules of these kinds.
        is_certain: false where the file says by a regular expression which of these it should have.
    """

    transformer: Transformer
    known_by: str | None
    names: frozenset[LoraKey]
    partial: bool
    is_certain: bool = True

    def as_loaded(self, modules: Collection[Module]) -> Expected:
        """The same, where the file says by an expression which modules it means and PEFT has loaded these."""
        if self.is_certain or not modules:
            return self
        names = frozenset(LoraKey(*module, factor) for module in modules for factor in "AB")
        return replace(self, names=names, partial=len(names) < len(self.names), is_certain=True)


def stated_of(lora: Lora) -> Stated | None:
    """What a file states of its scale and modules in the place where its program looks; None if it looks in none."""
    return lora.stated.get(lora.intended.scale)


def expect(lora: Lora, *, model: str | None, layers: int | None) -> Expected:
    """What a file should hold, by what the user states, what the file states, and what is known of the models.

    Raises:
        OptionError: if there is no such model, or no such number of layers.
    """
    transformer, known_by = _transformer(lora, model, layers)
    every = lora.expected(range(transformer.layers))
    stated = stated_of(lora)
    if stated is None or stated.config is None:
        return Expected(transformer, known_by, every, partial=False)
    targeted = [module for module in transformer.modules if stated.config.is_targeted(module)]
    names = _with_parts(targeted, every) or every
    is_certain = not stated.config.has_expression
    return Expected(transformer, known_by, names, len(names) < len(every), is_certain)


def _with_parts(modules: Iterable[Module], every: frozenset[LoraKey]) -> frozenset[LoraKey]:
    """The tensors of modules: both factors, and what else modules of their kind have."""
    parts: dict[str, set[str]] = {}
    for name in every:
        parts.setdefault(name.name, {"A", "B"}).add(name.part)
    return frozenset(LoraKey(*module, part) for module in modules for part in parts.get(module.name, ("A", "B")))


def _transformer(lora: Lora, model: str | None, layers: int | None) -> tuple[Transformer, str | None]:
    if model is not None and layers is not None:
        raise OptionError("--model and --layers both say how many layers there are", hint="leave one of them out")
    if model is not None:
        chosen = next((known for known in MODELS if known.slug == model), None)
        if chosen is None:
            raise OptionError("there is no such model", found=model, expected=", ".join(SLUGS))
        return Transformer(chosen.layers, chosen.hidden, (chosen,)), "--model"
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        raise OptionError("no transformer has so many layers", found=str(layers), expected=f"1 to {MAX_LAYERS}")
    hidden = lora.record.hidden_size or lora.most_common_hidden() or 0
    if layers is not None:
        return recognise(hidden, layers) or Transformer(layers, hidden, ()), "--layers"
    known = find_transformer(lora.checkpoint, lora)
    if known is not None:
        return known, "the exporter's record" if lora.record.transformer_layers else "its hidden size"
    stated = stated_of(lora)
    targets = stated.config.targets if stated is not None and stated.config is not None else None
    targeted = [module.layer for target in targets or () if (module := diffusers.parse_module(target)) is not None]
    in_layers = [layer for layer in targeted if layer is not None]
    if in_layers:
        return Transformer(max(in_layers) + 1, hidden, ()), "target_modules"
    return Transformer(max(lora.layers, default=-1) + 1, hidden, ()), None

"""Which tensors a LoRA file should have: those of all layers of its transformer, or of the modules that it states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cogtools.errors import OptionError
from cogtools.layouts import diffusers
from cogtools.layouts import family as cogvideox
from cogtools.layouts.family import MAX_LAYERS, MODELS, LoraKey, Transformer, recognise

if TYPE_CHECKING:
    from collections.abc import Collection

    from cogtools.verification.written import WrittenLora


@dataclass(frozen=True, slots=True)
class Expected:
    """What a file should hold.

    Attributes:
        transformer: the transformer that it belongs to; its hidden size is 0 if nothing tells it.
        known_by: what tells the number of layers; None if nothing does, and the file's own are taken.
        names: the tensors that it should have.
        partial: whether these are not all that a LoRA of that transformer could have.
        is_certain: false where the file says by a regular expression which of these it should have.
    """

    transformer: Transformer
    known_by: str | None
    names: frozenset[LoraKey]
    partial: bool
    is_certain: bool = True

    def as_loaded(self, modules: Collection[str]) -> Expected:
        """The same, where the file says by an expression which modules it means and PEFT has loaded these."""
        if self.is_certain or not modules:
            return self
        meant = {module for path in modules if (module := diffusers.parse_module(path)) is not None}
        every = cogvideox.lora_keys(range(self.transformer.layers))
        names = frozenset(name for name in every if (name.layer, name.projection) in meant)
        return replace(self, names=names, partial=len(names) < len(every), is_certain=True)


def expect(lora: WrittenLora, *, model: str | None, layers: int | None) -> Expected:
    """What a file should hold, by what the user says, what the file says, and what is known of the models.

    Raises:
        OptionError: if there is no such model, or no such number of layers.
    """
    transformer, known_by = _transformer(lora, model, layers)
    every = cogvideox.lora_keys(range(transformer.layers))
    meant = lora.stated.targeted(every)
    config = lora.stated.config
    is_certain = config is None or not config.has_expression
    return Expected(transformer, known_by, frozenset(meant), len(meant) < len(every), is_certain)


def _transformer(lora: WrittenLora, model: str | None, layers: int | None) -> tuple[Transformer, str | None]:
    if model is not None and layers is not None:
        raise OptionError("--model and --layers both say how many layers there are", hint="leave one of them out")
    if model is not None:
        chosen = next((known for known in MODELS if known.slug == model), None)
        if chosen is None:
            slugs = ", ".join(known.slug for known in MODELS)
            raise OptionError("there is no such model", found=model, expected=slugs)
        return Transformer(chosen.layers, chosen.hidden, (chosen,)), "--model"
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        raise OptionError("no transformer has so many layers", found=str(layers), expected=f"1 to {MAX_LAYERS}")
    recorded, hidden = lora.record.transformer_layers, lora.record.hidden_size or lora.most_common_hidden() or 0
    count = layers or recorded
    if count is not None:
        fitting = recognise(hidden, count, None) or Transformer(count, hidden, ())
        recorded_models = tuple(known for known in fitting.models if known.slug in lora.record.models)
        known_by = "--layers" if layers else "the exporter's record"
        return Transformer(count, hidden, recorded_models or fitting.models), known_by
    published = recognise(hidden, None, None)
    if published is not None:
        return published, "its hidden size"
    targets = lora.stated.config.targets if lora.stated.config is not None else None
    targeted = [module[0] for target in targets or () if (module := diffusers.parse_module(target))]
    if targeted:
        return Transformer(max(targeted) + 1, hidden, ()), "target_modules"
    return Transformer(max(lora.layers, default=-1) + 1, hidden, ()), None

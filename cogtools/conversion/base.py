"""Base weights beside a LoRA, for a program that loads whole models: SAT's transformer, copied as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.conversion.plan import Planned
from cogtools.errors import ExportError, command
from cogtools.layouts import diffusers, sat

if TYPE_CHECKING:
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.layouts.family import Transformer


def base_tensors(base: Checkpoint, transformer: Transformer) -> list[Planned]:
    """The base weights of the transformer in a checkpoint, under the keys that SAT's trainer gives them.

    Names that a LoRA training has given them (`query_key_value.original.weight`) stay: SAT reads both. The LoRA that
    may be among them is left out.

    Args:
        base: a checkpoint of SAT.
        transformer: the one that the LoRA belongs to.

    Raises:
        ExportError: if its transformer is not there, or another one.
    """
    shapes = {key: entry.shape for key, entry in base.tensors.items()}
    hidden = sat.hidden_size(shapes)
    if hidden is None:
        in_diffusers = diffusers.recognise_transformer(shapes)
        raise ExportError(
            "there are no base weights of SAT's transformer in this checkpoint",
            file=base.path,
            found="a transformer in diffusers' layout" if in_diffusers is not None else None,
            expected="keys such as model.diffusion_model.transformer.layers.0.mlp.dense_h_to_4h.weight",
            hint=command("inspect", base.path),
        )
    found = sat.recognise_transformer(shapes, hidden)
    if found is not None and transformer.layers and (found.layers, found.hidden) != transformer[:2]:
        raise ExportError(
            "the base weights are of another model than the LoRA",
            file=base.path,
            found=f"{found.name}: {found.layers} layers, hidden size {found.hidden}",
            expected=f"{transformer.layers} layers, hidden size {transformer.hidden}",
        )
    return [
        Planned(sat.PREFIX + sat.bare_key(key), entry.dtype, entry.shape, (entry,), source=key)
        for key, entry in base.tensors.items()
        if sat.is_transformer_key(key) and not sat.is_lora_key(key)
    ]

"""Base weights beside a LoRA, for a program that loads whole models: the transformer as SAT has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.conversion.model import find_parts
from cogtools.conversion.model_plan import plan_for_sat
from cogtools.conversion.model_reading import read_transformer
from cogtools.errors import ExportError, Hint, command
from cogtools.layouts.family import HEAD_SIZE
from cogtools.layouts.pipeline import TRANSFORMER

if TYPE_CHECKING:
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.conversion.plan import Planned
    from cogtools.layouts.family import Transformer


class Base(NamedTuple):
    """The base weights of a transformer, as SAT has them.

    Attributes:
        tensors: what they become.
        notices: what the user should know of them.
    """

    tensors: tuple[Planned, ...] = ()
    notices: tuple[str, ...] = ()


def base_weights(checkpoint: Checkpoint, transformer: Transformer) -> Base:
    """Plan the base weights of the transformer in a checkpoint for SAT. A LoRA that lies among them is left out.

    Args:
        checkpoint: a checkpoint of SAT, or a model of diffusers.
        transformer: the one that the LoRA belongs to.

    Raises:
        ExportError: if no whole transformer is there, or another one.
        CheckpointError: if the configuration beside it cannot be read.
    """
    part = find_parts(checkpoint).get(TRANSFORMER)
    if part is None:
        raise ExportError(
            "there are no base weights of a transformer in this checkpoint",
            file=checkpoint.path,
            expected="a checkpoint of SAT, or the transformer or pipeline of diffusers",
            hint=command("inspect", checkpoint.path),
        )
    asked = transformer.models[0] if len(transformer.models) == 1 else None
    try:
        reading = read_transformer(part, asked)
    except ExportError as error:
        if (
            not error.problems
        ):  # export-lora has no option for it, but a configuration beside the weights tells the model
            error.hint = Hint("give the folder with its config.json or training_config.yaml")
        raise
    layers, heads = reading.config["num_layers"], reading.config["num_attention_heads"]
    hidden = heads * HEAD_SIZE if isinstance(heads, int) else None
    if (layers, hidden) != (transformer.layers, transformer.hidden):
        raise ExportError(
            "the base weights are of another model than the LoRA",
            file=checkpoint.path,
            found=f"{layers} layers, hidden size {hidden}",
            expected=f"{transformer.layers} layers, hidden size {transformer.hidden}, as the LoRA has",
        )
    return Base(plan_for_sat(reading).tensors, reading.notices)

"""The CogVideoX family: its models, and what a LoRA of one consists of.

A LoRA of the SAT trainer adapts four projections in every attention layer: query, key, value, and the output
projection. Each has two factors, lora_A of shape (rank, hidden) and lora_B of shape (hidden, rank), so that a layer
has eight tensors and CogVideoX-2B, with 30 layers, has 240.

Sources: CogVideo's sat/configs/*.yaml and sat/dit_video_concat.py for the models, sat/model/finetune/lora2.py
(SwissArmyTransformer) for the LoRA.
"""

from __future__ import annotations

from typing import NamedTuple

PROJECTIONS = ("q", "k", "v", "out")
FACTORS = ("A", "B")

MAX_LAYERS = 1000
"""More layers than this no transformer has; a name or a record that says so is not believed. The largest has 42."""

LAYER_NUMBER = r"(0|[1-9]\d{0,2})"
"""A layer's number in a key, as a regular expression: below `MAX_LAYERS`, without leading zeros."""


class LoraKey(NamedTuple):
    """Which tensor of a LoRA: of which layer, which projection, which factor."""

    layer: int
    projection: str
    factor: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.projection} lora_{self.factor}"


class Model(NamedTuple):
    """One model of the family.

    Attributes:
        slug: its short name on the command line.
        name: its full name.
        layers: transformer layers.
        hidden: hidden size.
        patch_embed: shape of the patch embedding's weight, which differs where layers and hidden size do not.
        dtype: what it was trained in.
        ofs_embed: whether it has an embedding of the frame rate's offset.
    """

    slug: str
    name: str
    layers: int
    hidden: int
    patch_embed: tuple[int, ...]
    dtype: str
    ofs_embed: bool = False


MODELS = (
    Model("2b", "CogVideoX-2B", 30, 1920, (1920, 16, 2, 2), "float16"),
    Model("5b", "CogVideoX-5B", 42, 3072, (3072, 16, 2, 2), "bfloat16"),
    Model("5b-i2v", "CogVideoX-5B-I2V", 42, 3072, (3072, 32, 2, 2), "bfloat16"),
    Model("1.5-5b", "CogVideoX1.5-5B", 42, 3072, (3072, 128), "bfloat16"),
    Model("1.5-5b-i2v", "CogVideoX1.5-5B-I2V", 42, 3072, (3072, 256), "bfloat16", ofs_embed=True),
)


class Transformer(NamedTuple):
    """What is known of the transformer that a LoRA belongs to.

    Attributes:
        layers: how many it has.
        hidden: its hidden size.
        models: the models that fit; more than one if the base weights that would tell are not there, none if it is
            no published model.
    """

    layers: int
    hidden: int
    models: tuple[Model, ...]

    @property
    def name(self) -> str:
        """Its name, or what can be said of it."""
        if len(self.models) == 1:
            return self.models[0].name
        if self.models:
            return "CogVideoX 5B family (" + ", ".join(model.slug for model in self.models) + ")"
        return f"CogVideoX of no published size: {self.layers} layers, hidden size {self.hidden}"


def recognise(
    hidden: int, layers: int | None, patch_embed: tuple[int, ...] | None, *, ofs_embed: bool = False
) -> Transformer | None:
    """The transformer of this hidden size.

    Args:
        hidden: its hidden size.
        layers: how many layers its base weights have; None if there are no base weights.
        patch_embed: shape of its patch embedding's weight; None if that is not there.
        ofs_embed: whether its base weights have that; where only some of them are there, it may be missing.

    Returns:
        None if the number of layers cannot be told: no base weights, and no published model of that hidden size.
    """
    fitting = [model for model in MODELS if model.hidden == hidden and layers in (None, model.layers)]
    if patch_embed is not None:
        fitting = [model for model in fitting if model.patch_embed == patch_embed]
    if ofs_embed:
        fitting = [model for model in fitting if model.ofs_embed]
    count = layers if layers is not None else next((model.layers for model in fitting), None)
    return None if count is None else Transformer(count, hidden, tuple(fitting))


def lora_keys(layers: range | tuple[int, ...]) -> list[LoraKey]:
    """Every tensor that a LoRA of these layers has."""
    return [LoraKey(layer, name, factor) for layer in layers for name in PROJECTIONS for factor in FACTORS]


def lora_shape(factor: str, rank: int, hidden: int) -> tuple[int, int]:
    """The shape of lora_A or lora_B."""
    return (rank, hidden) if factor == "A" else (hidden, rank)


def hidden_of(factor: str, shape: tuple[int, ...]) -> int:
    """The hidden size that a factor of this shape has: columns of lora_A, rows of lora_B."""
    return shape[1] if factor == "A" else shape[0]


def rank_of(factor: str, shape: tuple[int, ...]) -> int:
    """The rank that a factor of this shape has: rows of lora_A, columns of lora_B."""
    return shape[0] if factor == "A" else shape[1]

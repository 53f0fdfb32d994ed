"""A model, whatever file it is in: its parts, and the tensors of each.

A training's checkpoint has the transformer, the text encoder and the VAE in one file, a pipeline of diffusers has a
folder for each; and each may be a file of its own, with or without what the trainer puts before its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from cogtools.checkpoint.tensors import whole_tensor
from cogtools.conversion.refusals import other_rank_of, refuse_cut
from cogtools.errors import ExportError, Hint, command
from cogtools.formatting import counted
from cogtools.layouts import sat, text_encoder, vae
from cogtools.layouts.lora import is_lora_key, lora_keys
from cogtools.layouts.pipeline import PARTS, TRANSFORMER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import TensorEntry

ModelLayout = Literal["sat", "diffusers"]
"""Whose names a model's tensors have: SAT's, or those of diffusers and transformers."""


@dataclass(frozen=True)
class ModelPart:
    """A part of a model, in a checkpoint.

    Attributes:
        name: "transformer", "vae" or "text_encoder".
        layout: whose names it has.
        checkpoint: where it is.
        tensors: its tensors, by their keys there.
    """

    name: str
    layout: ModelLayout
    checkpoint: Checkpoint
    tensors: dict[str, TensorEntry]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each."""
        return {key: entry.shape for key, entry in self.tensors.items()}

    @cached_property
    def lora_keys(self) -> list[str]:
        """Those among them that belong to a LoRA."""
        return lora_keys(self.tensors)


class _Kind(NamedTuple):
    """How the keys of a part begin, where nothing stands before them.

    Attributes:
        name: of the part.
        layout: whose names these are.
        starts: how some of its keys begin, and no other kind's after it in the table.
    """

    name: str
    layout: ModelLayout
    starts: tuple[str, ...]


_PREFIXES = {text_encoder.PREFIX: "text_encoder", vae.PREFIX: "vae"}
"""What the trainer puts before the keys of the other parts."""

_KINDS = (
    _Kind(TRANSFORMER, "sat", ("transformer.layers.", "mixins.", "transformer.final_layernorm.", "time_embed.")),
    _Kind(TRANSFORMER, "diffusers", ("transformer_blocks.", "patch_embed.", "time_embedding.", "norm_out.")),
    _Kind("text_encoder", "sat", ("encoder.block.", "shared.weight", "encoder.embed_tokens.")),
    _Kind(
        "vae", "diffusers", ("encoder.down_blocks.", "encoder.mid_block.", "decoder.up_blocks.", "decoder.mid_block.")
    ),
    _Kind("vae", "sat", ("encoder.", "decoder.", "loss.")),
)


def find_parts(checkpoint: Checkpoint) -> dict[str, ModelPart]:
    """The parts of a model that a checkpoint holds, by their names; {} if none is known.

    Raises:
        ExportError: if it is one of several parts that a distributed training has cut a model into.
    """
    if not checkpoint.tensors:
        return {}
    if set(checkpoint.parts) & set(PARTS):
        inside = (_part_alone(part) for name, part in checkpoint.parts.items() if name in PARTS)
        found = {part.name: part for part in inside if part is not None}
    else:
        found = _parts_in_one(checkpoint)
    if found:
        _refuse_other_ranks(checkpoint)
        for part in found.values():
            refuse_cut(part.tensors, part.checkpoint.path)
    return found


def _parts_in_one(checkpoint: Checkpoint) -> dict[str, ModelPart]:
    """The parts that are in one file."""
    tensors: dict[str, dict[str, TensorEntry]] = {}
    rest: dict[str, TensorEntry] = {}
    for key, entry in checkpoint.tensors.items():
        name = next((name for prefix, name in _PREFIXES.items() if sat.unwrapped_key(key).startswith(prefix)), None)
        (rest if name is None else tensors.setdefault(name, {}))[key] = whole_tensor(entry)
    kind = _kind_of(rest)
    parts = {name: ModelPart(name, "sat", checkpoint, found) for name, found in tensors.items()}
    if kind is not None and kind.name not in parts:
        parts[kind.name] = ModelPart(kind.name, kind.layout, checkpoint, rest)
    return {name: parts[name] for name in PARTS if name in parts}


def _part_alone(checkpoint: Checkpoint) -> ModelPart | None:
    """The part of a pipeline that is in a folder of its own."""
    kind = _kind_of(checkpoint.tensors)
    if kind is None:
        return None
    tensors = {key: whole_tensor(entry) for key, entry in checkpoint.tensors.items()}
    return ModelPart(kind.name, kind.layout, checkpoint, tensors)


def _kind_of(keys: Iterable[str]) -> _Kind | None:
    bare = [sat.bare_key(key) for key in keys if not is_lora_key(key)]
    for kind in _KINDS:
        if any(key.startswith(kind.starts) for key in bare):
            return kind
    return None


def _refuse_other_ranks(checkpoint: Checkpoint) -> None:
    found = other_rank_of(checkpoint)
    if found is not None:
        raise ExportError(
            "this is one part of a tensor-parallel training: the other ranks have the rest of most weights",
            file=checkpoint.path,
            found=found,
            expected="a training with model_parallel_size 1",
            hint="let SAT put the ranks together and save the model as one, or train with model_parallel_size 1",
        )


def no_model(checkpoint: Checkpoint) -> ExportError:
    """The error for a checkpoint without any part of a model."""
    keys = list(checkpoint.tensors)
    loras = sum(map(is_lora_key, keys))
    if loras:
        return ExportError(
            "there is no model in this checkpoint, only a LoRA",
            file=checkpoint.path,
            found=counted(loras, "LoRA tensor"),
            expected="base weights, such as transformer.layers.0.mlp.dense_h_to_4h.weight",
            hint=command("export-lora", checkpoint.path, "OUT_DIR", advice="to export the LoRA"),
        )
    return ExportError(
        "there is no CogVideoX model in this checkpoint",
        file=checkpoint.path,
        found=f"{counted(len(keys), 'tensor')}: {keys[0]} …" if keys else "no tensors",
        expected="a transformer, a VAE or a text encoder, by SAT's or diffusers' names",
        hint=command("inspect", checkpoint.path) if keys else Hint("give the file that has the weights"),
    )

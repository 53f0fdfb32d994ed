"""Checkpoints of which no right LoRA can be made, and why.

Each is recognised by what is in the file and answered with what it is and what to do instead.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from cogtools.checkpoint.names import TRAINER_FILES, rank_of
from cogtools.checkpoint.places import is_file
from cogtools.checkpoint.tensors import true_shape
from cogtools.conversion.lora import find_other_adapter
from cogtools.errors import ExportError, Hint, command
from cogtools.formatting import counted
from cogtools.layouts import diffusers, sat
from cogtools.layouts.lora import is_lora_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.tensors import TensorEntry

_FIRST_RANK, *_ = TRAINER_FILES
_SECOND_RANK = "mp_rank_01_model_states.pt"


def refuse_unexportable(checkpoint: Checkpoint) -> None:
    """Raise an `ExportError` for a checkpoint that holds a LoRA which cannot be exported right."""
    _refuse_tensor_parallel(checkpoint)
    refuse_cut({key: entry for key, entry in checkpoint.tensors.items() if is_lora_key(key)}, checkpoint.path)


def _refuse_tensor_parallel(checkpoint: Checkpoint) -> None:
    found = other_rank_of(checkpoint)
    if found is not None:
        raise tensor_parallel(checkpoint, found)


def other_rank_of(checkpoint: Checkpoint) -> str | None:
    """What tells that a checkpoint is one rank of a tensor-parallel training; None if nothing does."""
    ranks = checkpoint.values.get("mp_world_size")
    if isinstance(ranks, int) and ranks > 1:
        return f"mp_world_size {ranks} in the checkpoint"
    paths = dict.fromkeys((checkpoint.path, checkpoint.path.resolve()))
    return next((found for path in paths if (found := _other_rank(path)) is not None), None)


def _other_rank(path: AnyPath) -> str | None:
    """What a file's name, or the file beside it, says of another tensor-parallel rank."""
    rank = rank_of(path.name)
    if rank is None:
        return None
    if rank > 0:
        return f"{path.name}, the file of rank {rank}"
    return f"{_SECOND_RANK} beside it" if is_file(path.with_name(_SECOND_RANK)) else None


def tensor_parallel(checkpoint: Checkpoint, found: str) -> ExportError:
    """The error for one rank of a tensor-parallel training; `found` is what tells that it is one."""
    return ExportError(
        "this is one part of a tensor-parallel training, whose LoRA cannot be put together",
        file=checkpoint.path,
        found=found,
        expected="a training with model_parallel_size 1",
        hint="train again with model_parallel_size 1: SAT never adds up the ranks' shares of attention.dense's LoRA, "
        "so they have drifted apart and no merge gives back what was trained",
    )


def refuse_cut(tensors: Mapping[str, TensorEntry], file: AnyPath) -> None:
    """Refuse a ZeRO-3 file of one rank of several: the rest of every tensor is in files that were not kept."""
    for key, entry in tensors.items():
        shape = true_shape(entry)
        if shape is not None and entry.numel != prod(shape):
            raise ExportError(
                "this is one part of a ZeRO-3 training: the rest of every tensor is missing",
                file=file,
                found=f"{entry.numel:,} elements of {key}",
                expected=f"{prod(shape):,} elements, for its shape {tuple(shape)}",
                hint="train with ZeRO stage 2, or with one data-parallel rank: SAT keeps one rank's file only",
            )


def no_lora(checkpoint: Checkpoint) -> ExportError:
    """The error for a checkpoint without a LoRA: what it holds instead, and what to do with that."""
    found, hint = what_it_holds(checkpoint)
    return ExportError(
        "there is no LoRA in this checkpoint",
        file=checkpoint.path,
        found=found,
        expected="keys such as …layers.0.attention.query_key_value.matrix_A.0, or those of another trainer's LoRA",
        hint=hint,
    )


def what_it_holds(checkpoint: Checkpoint) -> tuple[str, Hint]:
    """What a checkpoint holds that has no LoRA, and what to do about it."""
    keys = [*checkpoint.tensors, *checkpoint.not_tensors]
    look = command("inspect", checkpoint.path)
    export = command("export-model", checkpoint.path, "OUT_DIR", advice="to convert it for diffusers")
    adapter = find_other_adapter(checkpoint)
    if adapter is not None:
        return adapter.name, Hint(f"load it with {adapter.readers}: cogtools does not convert these")
    unknown = next(filter(is_lora_key, keys), None)
    if unknown is not None:
        return f"a LoRA whose keys are no known program's: {unknown} …", look
    if "optimizer_state_dict" in checkpoint.values or "optimizer_state_dict" in keys:
        return _optimizer(checkpoint.path)
    count = counted(len(checkpoint.tensors), "tensor")
    bare = [sat.bare_key(key) for key in keys]
    if any(key.startswith("transformer.layers.") for key in bare):
        return f"a base model without a LoRA ({count})", export
    model = diffusers.recognise_transformer({key: entry.shape for key, entry in checkpoint.tensors.items()})
    if model is not None or _starts(keys, "transformer_blocks.", "transformer.transformer_blocks."):
        name = f"{model.name}, " if model is not None else ""
        return f"a base model in diffusers' layout, without a LoRA ({name}{count})", look
    if _starts(keys, "encoder.block.", "conditioner."):
        return f"a text encoder ({count})", export
    if _starts(keys, "first_stage_model.", "encoder.", "decoder."):
        return f"a VAE ({count})", export
    return count + (f": {next(iter(checkpoint.tensors))} …" if checkpoint.tensors else ""), look


def _optimizer(path: AnyPath) -> tuple[str, Hint]:
    found = "an optimizer's state (a zero_pp_rank file of DeepSpeed)"
    weights = path.with_name(_FIRST_RANK)
    if is_file(weights):
        return found, Hint(f"give the weights: {weights}")
    return found, Hint(f"give the weights: the trainer saves them as {_FIRST_RANK}, which is not in this folder")


def _starts(keys: Iterable[str], *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in keys)

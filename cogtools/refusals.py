"""Checkpoints of which no right LoRA can be made, and why.

Each is recognised by what is in the file and answered with what it is and what to do instead.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, TypeGuard

from cogtools.checkpoint.storage import TensorEntry, contiguous_strides, is_file
from cogtools.checkpoint.torch_pickle import MAX_DIMENSIONS, MAX_SIZE
from cogtools.errors import ExportError
from cogtools.layouts import diffusers, sat

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.index import Checkpoint


def refuse_unexportable(checkpoint: Checkpoint) -> None:
    """Raise an `ExportError` for a checkpoint that holds a LoRA which cannot be exported right."""
    _refuse_tensor_parallel(checkpoint)
    _refuse_parts(checkpoint)


def _refuse_tensor_parallel(checkpoint: Checkpoint) -> None:
    ranks = checkpoint.values.get("mp_world_size")
    other = checkpoint.path.with_name("mp_rank_01_model_states.pt")
    if isinstance(ranks, int) and ranks > 1:
        found = f"mp_world_size {ranks} in the checkpoint"
    elif is_file(other) and checkpoint.path.name.startswith("mp_rank_"):
        found = f"{other.name} beside it"
    else:
        return
    raise ExportError(
        "this is one part of a tensor-parallel training, whose LoRA cannot be put together",
        file=checkpoint.path,
        found=found,
        expected="a training with model_parallel_size 1",
        hint="train again with model_parallel_size 1: SAT never adds up the ranks' shares of attention.dense's LoRA, "
        "so they have drifted apart and no merge gives back what was trained",
    )


def _refuse_parts(checkpoint: Checkpoint) -> None:
    """Refuse a ZeRO-3 file of one rank of several: the rest of every tensor is in files that were not kept."""
    for key, entry in checkpoint.tensors.items():
        shape = entry.attributes.get("ds_shape")
        if _is_shape(shape) and sat.is_lora_key(key) and entry.numel != prod(shape):
            raise ExportError(
                "this is one part of a ZeRO-3 training: the rest of every tensor is missing",
                file=checkpoint.path,
                found=f"{entry.numel:,} elements of {key}",
                expected=f"{prod(shape):,} elements, for its shape {tuple(shape)}",
                hint="train with ZeRO stage 2, or with one data-parallel rank: SAT keeps one rank's file only",
            )


def whole_tensor(entry: TensorEntry) -> TensorEntry:
    """The tensor in its true shape: ZeRO-3 saves it flat, with the shape in an attribute."""
    shape = entry.attributes.get("ds_shape")
    if not _is_shape(shape) or len(entry.shape) != 1 or entry.numel != prod(shape) or not entry.is_contiguous:
        return entry
    return TensorEntry(entry.dtype, shape, contiguous_strides(shape), entry.storage, entry.storage_offset)


def _is_shape(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether this can be the shape of a tensor: sizes as large as PyTorch's, and no more than it has."""
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < MAX_SIZE for item in value)


def no_lora(checkpoint: Checkpoint) -> ExportError:
    """The error for a checkpoint without a SAT LoRA: what it holds instead, and what to do with that."""
    keys = [*checkpoint.tensors, *checkpoint.not_tensors]
    found, hint = _what_it_holds(checkpoint, keys)
    return ExportError(
        "there is no LoRA of the SAT trainer in this checkpoint",
        file=checkpoint.path,
        found=found,
        expected="keys such as …layers.0.attention.query_key_value.matrix_A.0",
        hint=hint,
    )


def _what_it_holds(checkpoint: Checkpoint, keys: list[str]) -> tuple[str, str]:
    look = f"cogtools inspect {checkpoint.path}"
    if any(diffusers.parse_key(key) for key in keys):
        return "a LoRA in diffusers' layout already", f"cogtools verify {checkpoint.path}"
    if any(sat.is_lora_key(key) for key in keys):
        return f"a LoRA in another layout: {next(filter(sat.is_lora_key, keys))} …", look
    if "optimizer_state_dict" in checkpoint.values or "optimizer_state_dict" in keys:
        return (
            "an optimizer's state (a zero_pp_rank file of DeepSpeed)",
            "give the mp_rank_00_model_states.pt of the same folder",
        )
    bare = [sat.bare_key(key) for key in keys]
    if any(key.startswith("transformer.layers.") for key in bare):
        return f"a base model without a LoRA ({len(keys):,} tensors)", look
    if _starts(keys, "encoder.block.", "conditioner."):
        return f"a text encoder ({len(keys):,} tensors)", look
    if _starts(keys, "first_stage_model.", "encoder.", "decoder."):
        return f"a VAE ({len(keys):,} tensors)", look
    return f"{len(keys):,} tensors" + (f": {keys[0]} …" if keys else ""), look


def _starts(keys: Iterable[str], *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in keys)

"""Tensors of DeepSpeed's ZeRO-3: flat, their true shape beside them in an attribute `ds_shape`.

With one data-parallel rank a tensor is whole; with several, each rank's file has a part of it only.

Source: DeepSpeed, runtime/zero/partition_parameters.py, and checkpoints that SAT's training loop wrote under ZeRO-3.
"""

from __future__ import annotations

from math import prod

from cogtools.checkpoint.shapes import can_be_shape
from cogtools.checkpoint.storage import TensorEntry, contiguous_strides


def true_shape(entry: TensorEntry) -> tuple[int, ...] | None:
    """The shape that ZeRO-3 states for a tensor; None if it states none that a tensor can have."""
    shape = entry.attributes.get("ds_shape")
    return shape if can_be_shape(shape, entry.dtype.itemsize) else None


def whole_tensor(entry: TensorEntry) -> TensorEntry:
    """The tensor in its true shape, if all of it is there; else as it is."""
    shape = true_shape(entry)
    if shape is None or len(entry.shape) != 1 or entry.numel != prod(shape) or not entry.is_contiguous:
        return entry
    return TensorEntry(entry.dtype, shape, contiguous_strides(shape), entry.storage, entry.storage_offset)

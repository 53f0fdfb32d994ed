"""Checkpoints of tensors that have shapes and no bytes: for plans at real size."""

from collections.abc import Mapping
from pathlib import Path

from cogtools.checkpoint.dtypes import DTYPES
from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.index import Checkpoint
from cogtools.checkpoint.tensors import Storage, TensorEntry, contiguous_strides


def checkpoint_of_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "float16") -> Checkpoint:
    """An opened checkpoint of an empty file, whose index names these tensors."""
    path.write_bytes(b"")
    file = SourceFile.open(path)
    storage = Storage.at("0", FileRange(file, 0, 0))
    tensors = {
        key: TensorEntry(DTYPES[dtype], shape, contiguous_strides(shape), storage) for key, shape in shapes.items()
    }
    return Checkpoint(path=path, format="none", files=[file], tensors=tensors)

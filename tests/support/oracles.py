"""What torch.load says a checkpoint's tensors are, in the words of cogtools' index."""

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.tensors import TensorEntry


class Described(NamedTuple):
    """A tensor: `crc32` is that of its bytes, row-major and little-endian; `view` is how it lies in its storage."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int
    view: tuple[tuple[int, ...], int] | None


def described_by_torch(tensors: Mapping[str, torch.Tensor], *, views: bool = True) -> list[tuple[str, Described]]:
    """Every key in order, and its tensor. `views` are not the same where another format wrote them."""
    return [(key, _torch_described(tensor, views)) for key, tensor in tensors.items()]


def _torch_described(tensor: torch.Tensor, views: bool) -> Described:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    view = (tensor.stride(), int(tensor.storage_offset())) if views else None
    return Described(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), zlib.crc32(content), view)


def described_by_cogtools(
    tensors: Mapping[str, TensorEntry], *, views: bool = True, chunk_bytes: int = 1 << 20
) -> list[tuple[str, Described]]:
    """The same from an index."""
    return [(key, _entry_described(entry, views, chunk_bytes)) for key, entry in tensors.items()]


def _entry_described(entry: TensorEntry, views: bool, chunk_bytes: int) -> Described:
    content = b"".join(tensor_chunks(entry, chunk_bytes))
    view = (entry.stride, entry.storage_offset) if views else None
    return Described(entry.dtype.name, entry.shape, zlib.crc32(content), view)


def torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def tied(pairs: Iterable[tuple[str, object]]) -> set[frozenset[str]]:
    """The sets of keys that share a storage, given each key and what identifies its storage."""
    groups: dict[object, set[str]] = {}
    for key, identity in pairs:
        groups.setdefault(identity, set()).add(key)
    return {frozenset(keys) for keys in groups.values() if len(keys) > 1}

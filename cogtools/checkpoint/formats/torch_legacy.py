"""Files of `torch.save` before PyTorch 1.6, and of `_use_new_zipfile_serialization=False`: pickles, then storages.

    pickle   a magic number
    pickle   the protocol version, 1001
    pickle   facts of the machine that wrote it, of no use here
    pickle   the object; a tensor's storage is a persistent id ('storage', class, key, location, elements, view)
    pickle   the keys of all storages, in the order in which they follow
    per key  8 bytes: the number of elements; then the storage's bytes, little-endian

No CRC-32 is recorded. `torch.load(mmap=True)` refuses these files; here they are an index like any other.

Source: torch/serialization.py (`_legacy_save`, `_legacy_load`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.index import Checkpoint, index_pickle
from cogtools.checkpoint.limits import MAX_PICKLE_BYTES, SHORT_INSTRUCTIONS
from cogtools.checkpoint.pickle.machine import MalformedPickleError, Pickle, all_foreign, read_pickle
from cogtools.checkpoint.pickle.plain_calls import PLAIN_ONLY
from cogtools.checkpoint.pickle.torch_calls import OpenStorage, malformed, torch_vocabulary
from cogtools.checkpoint.tensors import Storage
from cogtools.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.dtypes import DType

FORMAT = "torch.save (legacy)"
PROTOCOL_VERSION = 1001

_FIRST_WINDOW_BYTES = 1 << 20
_COUNT_BYTES = 8


def open_torch_legacy(file: SourceFile) -> Checkpoint:
    """Index a legacy file of `torch.save`.

    Raises:
        CheckpointError: if it is damaged.
    """
    window_bytes = min(_FIRST_WINDOW_BYTES, file.size_bytes)
    while True:
        try:
            return _index(file, file.read(0, window_bytes))
        except MalformedPickleError as error:
            # Nothing tells how long the pickles are: if they do not fit into the window, it was too small.
            if window_bytes >= min(file.size_bytes, MAX_PICKLE_BYTES):
                raise malformed(file.path, error) from error
        window_bytes = min(window_bytes * 4, file.size_bytes, MAX_PICKLE_BYTES)


def _index(file: SourceFile, data: bytes) -> Checkpoint:
    storages: dict[str, Storage] = {}
    itemsizes: dict[str, int] = {}

    def open_storage(key: str, dtype: DType | None, numel: int) -> Storage:
        itemsize = dtype.itemsize if dtype else 1
        if key not in storages:
            storages[key] = Storage(key, numel * itemsize, None, _not_there(key))
            itemsizes[key] = itemsize
        if storages[key].size_bytes != numel * itemsize:
            raise MalformedPickleError(f"it gives storage {shown(key)} two sizes")
        return storages[key]

    pickle, keys, position = _pickles(data, open_storage)
    if set(keys) != set(storages) or len(keys) != len(storages):
        raise MalformedPickleError("it lists other storages than its tensors have")
    for key in keys:
        storage = storages[key]
        storage.locate = _locator(file, storage, position, itemsizes[key])
        position += _COUNT_BYTES + storage.size_bytes
    if position > file.size_bytes:
        raise file.cut_short(0, position)
    return index_pickle(pickle, file, FORMAT)


def _pickles(data: bytes, open_storage: OpenStorage) -> tuple[Pickle, list[str], int]:
    """The object, the keys of the storages, and the offset in bytes at which they begin."""
    magic = read_pickle(data, PLAIN_ONLY, instructions=SHORT_INSTRUCTIONS)
    version = read_pickle(data, PLAIN_ONLY, magic.end, instructions=SHORT_INSTRUCTIONS)
    if version.value != PROTOCOL_VERSION:
        found = shown(version.value) if type(version.value) is int else f"<{type(version.value).__name__}>"
        raise MalformedPickleError(f"it is of version {found}, and {PROTOCOL_VERSION} is known")
    machine = read_pickle(data, PLAIN_ONLY, version.end, instructions=SHORT_INSTRUCTIONS)
    pickle = read_pickle(data, torch_vocabulary(open_storage), machine.end)
    keys = read_pickle(data, PLAIN_ONLY, pickle.end)
    if not isinstance(keys.value, list) or not all(isinstance(key, str) for key in keys.value):
        raise MalformedPickleError("it does not list its storages")
    return pickle._replace(foreign=all_foreign((magic, version, machine, pickle, keys))), keys.value, keys.end


def _not_there(key: str) -> Callable[[], FileRange]:
    def locate() -> FileRange:
        raise MalformedPickleError(f"storage {shown(key)} is not in the file")

    return locate


def _locator(file: SourceFile, storage: Storage, position: int, itemsize: int) -> Callable[[], FileRange]:
    def locate() -> FileRange:
        count = int.from_bytes(file.read(position, _COUNT_BYTES), "little")
        if count * itemsize != storage.size_bytes:
            error = MalformedPickleError(
                f"storage {shown(storage.key)} has {count:,} elements, and not as many as it says"
            )
            raise malformed(file.path, error)
        return FileRange(file, position + _COUNT_BYTES, storage.size_bytes)

    return locate

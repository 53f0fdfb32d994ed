"""Files of `torch.save` before PyTorch 0.1.10: a tar archive of three parts.

    storages   pickle: how many; per storage a pickle (key, location, class), 8 bytes: the number of elements, and
               the bytes, little-endian; then a pickle of views [(key, root key, offset, elements), …]
    tensors    pickle: how many; per tensor a pickle (key, storage key, class), then little-endian numbers: 4 bytes
               dimensions, 4 bytes nothing, 8 bytes each for shape, strides and storage offset
    pickle     the object; a tensor is a persistent id: its key

No CRC-32 is recorded.

Source: torch/serialization.py (`_legacy_load`, inner function `legacy_load`).
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.dtypes import BY_STORAGE_CLASS, DType
from cogtools.checkpoint.index import Checkpoint, index_pickle
from cogtools.checkpoint.limits import MAX_DIMENSIONS, MAX_PICKLE_BYTES, MAX_RECORDS, SHORT_INSTRUCTIONS
from cogtools.checkpoint.plain_calls import PLAIN_CALLS
from cogtools.checkpoint.storage import FileRange, SourceFile, Storage
from cogtools.checkpoint.torch_pickle import ORDINARY_NAMES, StorageReference, malformed, tensor_entry
from cogtools.checkpoint.unpickler import (
    Global,
    MalformedPickleError,
    Vocabulary,
    read_pickle,
)
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from cogtools.checkpoint.storage import TensorEntry

FORMAT = "torch.save (tar)"

_BLOCK_BYTES = 512
_MAGIC_AT = 257
_PARTS = {"storages", "tensors", "pickle"}
_SHOWN_PARTS = 5
_REGULAR = (b"0", b"\0")
_MAX_RECORD_BYTES = 4096
"""The longest pickle of one storage or one tensor: three short values."""


_PLAIN = Vocabulary(
    PLAIN_CALLS, ORDINARY_NAMES | {Global("torch", name.replace("Storage", "Tensor")) for name in BY_STORAGE_CLASS}
)
"""Plain data, and the names of the classes of storages and tensors."""


class _Part(NamedTuple):
    """Where a member of the archive lies."""

    offset_bytes: int
    size_bytes: int


def looks_like_tar(start: bytes) -> bool:
    """Whether a file begins as a tar archive."""
    return start[_MAGIC_AT : _MAGIC_AT + 5] == b"ustar"


def open_torch_tar(file: SourceFile) -> Checkpoint:
    """Index a tar file of `torch.save`.

    Raises:
        CheckpointError: if it is damaged, or another kind of archive.
    """
    parts = _parts(file)
    if not parts.keys() >= _PARTS:
        raise CheckpointError(
            "this tar archive is no file of torch.save",
            file=file.path,
            found=", ".join(sorted(parts)[:_SHOWN_PARTS]) or "nothing in it",
            expected="the parts storages, tensors and pickle",
            hint="if the checkpoint was packed into this archive, unpack it first: tar xf",
        )
    try:
        foreign: Counter[Global] = Counter()
        storages = _read_storages(file, parts["storages"], foreign)
        tensors = _read_tensors(file, parts["tensors"], storages, foreign)
        data = _read_part(file, parts["pickle"])
        pickle = read_pickle(data, _PLAIN._replace(persistent=lambda identifier: _persistent(identifier, tensors)))
        foreign.update(pickle.foreign)
        return index_pickle(pickle._replace(foreign=dict(foreign)), file, FORMAT)
    except MalformedPickleError as error:
        raise malformed(file.path, error) from error


def _parts(file: SourceFile) -> dict[str, _Part]:
    """The regular members, by name: those that are needed, and a few more to tell what it is."""
    parts: dict[str, _Part] = {}
    position = 0
    while position + _BLOCK_BYTES <= file.size_bytes:
        header = file.read(position, _BLOCK_BYTES)
        if not header.strip(b"\0"):
            break
        name = header[:100].rstrip(b"\0").decode("utf-8", "backslashreplace")
        try:
            size_bytes = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            size_bytes = -1
        if size_bytes < 0 or position + _BLOCK_BYTES + size_bytes > file.size_bytes:
            raise CheckpointError(
                "this tar archive is damaged",
                file=file.path,
                found=f"a member at {position:,} that does not fit into the file",
                hint="copy or download it again",
            )
        if header[156:157] in _REGULAR and (name.removeprefix("./") in _PARTS or len(parts) < _SHOWN_PARTS):
            parts[name.removeprefix("./")] = _Part(position + _BLOCK_BYTES, size_bytes)
        position += _BLOCK_BYTES + size_bytes + -size_bytes % _BLOCK_BYTES
    return parts


def _read_part(file: SourceFile, part: _Part) -> bytes:
    if part.size_bytes > MAX_PICKLE_BYTES:
        raise MalformedPickleError(f"it has {part.size_bytes:,} bytes, more than {MAX_PICKLE_BYTES:,}")
    return file.read(*part)


def _storage_dtype(name: object) -> DType:
    dtype = BY_STORAGE_CLASS.get(name.name) if isinstance(name, Global) and name.module == "torch" else None
    if dtype is None:
        raise MalformedPickleError("it names a storage that PyTorch does not have")
    return dtype


def _read_storages(file: SourceFile, part: _Part, foreign: Counter[Global]) -> dict[str, StorageReference]:
    """The storages by key, as text: a dict of numbers that a file chooses can be made slow without bound.

    Their bytes lie between the pickles, and are skipped. `foreign` is added to.
    """
    end = part.offset_bytes + part.size_bytes
    position = part.offset_bytes

    def next_value() -> object:
        nonlocal position
        start = position
        data = file.read(start, min(_MAX_RECORD_BYTES, end - start))
        pickle = read_pickle(data, _PLAIN, instructions=SHORT_INSTRUCTIONS)
        foreign.update(pickle.foreign)
        position += pickle.end
        return pickle.value

    storages: dict[str, StorageReference] = {}
    for _ in range(_count(next_value())):
        match next_value():
            case (str() | int() as key, str(), Global() as name):
                dtype = _storage_dtype(name)
            case _:
                raise MalformedPickleError("it describes a storage in a way that PyTorch does not")
        size_bytes = int.from_bytes(file.read(position, 8), "little") * dtype.itemsize
        position += 8
        if position + size_bytes > end:
            raise file.cut_short(position, size_bytes)
        storages[str(key)] = StorageReference(Storage.at(str(key), FileRange(file, position, size_bytes)), dtype)
        position += size_bytes
    data = file.read(position, min(MAX_PICKLE_BYTES, end - position))
    views = read_pickle(data, _PLAIN)
    foreign.update(views.foreign)
    for view in views.value if isinstance(views.value, list) else [None]:
        view_key, reference = _view(view, storages)
        storages[view_key] = reference
    return storages


def _view(view: object, storages: dict[str, StorageReference]) -> tuple[str, StorageReference]:
    """A storage that is a part of another: (key, root key, offset, elements)."""
    match view:
        case (str() | int() as key, str() | int() as root_key, int(offset), int(numel)) if (
            str(root_key) in storages and offset >= 0 and numel >= 0
        ):
            root, dtype = storages[str(root_key)]
            if dtype is not None and (offset + numel) * dtype.itemsize <= root.size_bytes:
                file, start, _ = root.range()
                part = FileRange(file, start + offset * dtype.itemsize, numel * dtype.itemsize)
                return str(key), StorageReference(Storage.at(str(key), part), dtype)
    raise MalformedPickleError("it describes a view of a storage in a way that PyTorch does not")


def _read_tensors(
    file: SourceFile, part: _Part, storages: dict[str, StorageReference], foreign: Counter[Global]
) -> dict[str, TensorEntry]:
    data = _read_part(file, part)
    pickle = read_pickle(data, _PLAIN, instructions=SHORT_INSTRUCTIONS)
    foreign.update(pickle.foreign)
    tensors: dict[str, TensorEntry] = {}
    try:
        for _ in range(_count(pickle.value)):
            pickle = read_pickle(data, _PLAIN, pickle.end, instructions=SHORT_INSTRUCTIONS)
            foreign.update(pickle.foreign)
            position = pickle.end
            (dimensions,) = struct.unpack_from("<i", data, position)
            if not 0 <= dimensions <= MAX_DIMENSIONS:
                raise MalformedPickleError(f"it has a tensor of {dimensions} dimensions")
            numbers = struct.unpack_from(f"<{2 * dimensions + 1}q", data, position + 8)
            match pickle.value:
                case (str() | int() as key, str() | int() as storage_key, *_) if str(storage_key) in storages:
                    reference = storages[str(storage_key)]
                case _:
                    raise MalformedPickleError("it describes a tensor in a way that PyTorch does not")
            layout = (numbers[-1], numbers[:dimensions], numbers[dimensions:-1])
            tensors[str(key)] = tensor_entry(reference, reference.dtype, layout)
            pickle = pickle._replace(end=position + 8 + 8 * len(numbers))
    except struct.error as error:
        raise MalformedPickleError("its list of tensors ends too early") from error
    return tensors


def _count(value: object) -> int:
    if not isinstance(value, int):
        raise MalformedPickleError("it does not say how many there are")
    if value > MAX_RECORDS:
        raise MalformedPickleError(f"it has more than {MAX_RECORDS:,} storages or tensors")
    return value


def _persistent(identifier: object, tensors: dict[str, TensorEntry]) -> object:
    match identifier:
        case str(key) if key in tensors:
            return tensors[key]
        case (Global() as name, *_):
            return name  # the class of a module, saved with its source
        case _:
            raise MalformedPickleError("it refers to a tensor that is not there")

"""Files of `torch.save` since PyTorch 1.6: a zip archive with a pickle and one entry per storage.

    <root>/data.pkl       the pickle: names, dtypes, shapes, and which storage holds each tensor
    <root>/data/<key>     the raw bytes of a storage
    <root>/byteorder      "little" or "big"; absent in files of PyTorch before 2.1, which are little-endian
    <root>/version …      not needed here

PyTorch writes the entries stored, not deflated; an archive that was packed again may have them deflated, and is read
too.

Not supported: TorchScript.

Format: PyTorch's writer, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.checkpoint.formats.zip_archive import (
    ZipArchive,
    damaged,
    packed_range,
    read_directory,
    read_small,
    unpacked_range,
)
from cogtools.checkpoint.index import Checkpoint, index_pickle
from cogtools.checkpoint.limits import MAX_PICKLE_BYTES
from cogtools.checkpoint.pickle.machine import MalformedPickleError, MismatchError, read_pickle
from cogtools.checkpoint.pickle.torch_calls import malformed, torch_vocabulary
from cogtools.checkpoint.tensors import Storage
from cogtools.errors import CheckpointError
from cogtools.formatting import MAX_SHOWN_CHARS, shown

if TYPE_CHECKING:
    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.files import SourceFile

FORMAT = "torch.save (zip)"


def open_torch_zip(file: SourceFile) -> Checkpoint:
    """Index a zip file of `torch.save`.

    Raises:
        CheckpointError: if it is damaged, or is another kind of archive.
    """
    archive = read_directory(file)
    root = _root_folder(archive)
    big_endian = _is_big_endian(archive, root)
    storages: dict[str, Storage] = {}

    def open_storage(key: str, dtype: DType | None, numel: int) -> Storage:
        size_bytes = numel * (dtype.itemsize if dtype else 1)
        storage = storages.get(key)  # first: to spell a long entry's name for each tensor that views it takes time
        if storage is None:
            entry = archive.entries.get(f"{root}/data/{key}")
            if entry is None:
                raise lacking(key, size_bytes, "is not in the archive")
            crc32 = entry.crc32 if archive.has_crc32 else None
            storage = Storage(
                key,
                entry.size_bytes,
                crc32,
                lambda: unpacked_range(archive, entry),
                big_endian,
                span=archive.span(entry),
            )
            storages[key] = storage
        if storage.size_bytes != size_bytes:
            raise lacking(key, size_bytes, f"has {storage.size_bytes:,}")
        return storage

    def lacking(key: str, size_bytes: int, found: str) -> MismatchError:
        return MismatchError(f"storage {shown(key)} should have {size_bytes:,} bytes and {found}")

    data = read_small(archive, f"{root}/data.pkl", MAX_PICKLE_BYTES)
    try:
        pickle = read_pickle(data, torch_vocabulary(open_storage))
    except MalformedPickleError as error:
        raise malformed(file.path, error, intact=archive.has_crc32) from error
    return index_pickle(pickle, file, FORMAT)


def _root_folder(archive: ZipArchive) -> str:
    """The one folder that holds data.pkl."""
    roots = [name.removesuffix("/data.pkl") for name in archive.entries if name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") for name in archive.entries):
        raise CheckpointError(
            "this is a TorchScript archive: a program, not a checkpoint",
            file=archive.file.path,
            expected="a file of torch.save",
            hint="save the model's state_dict() with torch.save",
        )
    if len(roots) != 1 or "/" in roots[0]:
        names = ", ".join(name[:MAX_SHOWN_CHARS] for name in sorted(archive.entries)[:3]) or "nothing"
        raise CheckpointError(
            "this zip archive is no file of torch.save",
            file=archive.file.path,
            found=f"{len(archive.entries)} entries: {names} …",
            expected="one folder with data.pkl in it",
            hint="if the checkpoint was packed into this archive, unpack it first",
        )
    return roots[0]


def _is_big_endian(archive: ZipArchive, root: str) -> bool:
    name = f"{root}/byteorder"
    if name not in archive.entries:
        # Not one of the others may be the missing one under a damaged name: the directory has no CRC-32.
        for entry in archive.entries.values():
            if not entry.name.startswith(f"{root}/data/"):
                packed_range(archive, entry)
        return False
    order = read_small(archive, name, 16)
    if order not in (b"little", b"big"):
        raise damaged(archive.file, found=f"the byte order {order!r}", expected="'little' or 'big'")
    return order == b"big"

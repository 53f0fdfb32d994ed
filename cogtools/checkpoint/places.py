"""What is at a path, be it on this machine or where a URL leads: files, folders, and what is in them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.checkpoint.files import FolderEntry, SourceFile, quietly, read_whole, reason
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import AnyPath, RemotePath
    from cogtools.checkpoint.remote.store import Store


def open_file(path: AnyPath) -> SourceFile:
    """Open a file.

    Raises:
        CheckpointError: if it is missing, not readable, or not a regular file.
    """
    if isinstance(path, Path):
        return SourceFile.open(path)
    from cogtools.checkpoint.remote.file import RemoteFile

    return RemoteFile(path, store_of(path))


def read_small_file(path: AnyPath, limit_bytes: int, what: str = "the file is too long to be read") -> bytes:
    """As `read_whole`, of a file that is opened for it."""
    with open_file(path) as file:
        return read_whole(file, limit_bytes, what)


def list_folder(folder: AnyPath) -> list[FolderEntry]:
    """What is in a folder, by name. On a plain server, which lists nothing: what is found of what could be there.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if not isinstance(folder, Path):
        return store_of(folder).list(folder)
    try:
        with os.scandir(folder) as entries:
            found = [
                FolderEntry(folder / entry.name, quietly(entry.is_file), quietly(entry.is_dir)) for entry in entries
            ]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the folder cannot be read: {reason(error)}", file=folder) from error
    return sorted(found)


def is_file(path: AnyPath) -> bool:
    """Whether a path is that of a file; false also where it may not be looked at, or no file can have that name."""
    return quietly(path.is_file if isinstance(path, Path) else partial(store_of(path).is_file, path))


def is_folder(path: AnyPath) -> bool:
    """Whether a path is that of a folder; false also where `is_file` says it may be."""
    return quietly(path.is_dir if isinstance(path, Path) else partial(store_of(path).is_folder, path))


def is_there(path: AnyPath) -> bool:
    """Whether there is something of this name, be it a link that leads nowhere."""
    return os.path.lexists(path) if isinstance(path, Path) else is_file(path) or is_folder(path)


def size_of(path: AnyPath) -> int | None:
    """How many bytes a file has; None if it cannot be found out."""
    if not isinstance(path, Path):
        found = store_of(path).look(path)
        return None if found is None else found.size_bytes
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def store_of(path: RemotePath) -> Store:
    """What answers for a path. What it is made of is imported here only: many files are on this machine.

    Raises:
        OptionError: if nothing installed does.
    """
    from cogtools.checkpoint.remote import stores

    return stores.store_of(path)

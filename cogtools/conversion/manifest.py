"""The list of files that cogtools puts into a folder that it writes: whether it wrote the folder can be told later.

    cogtools.json    {"files": {name: size in bytes}, "record": how it was made, "version": of cogtools}

The record is there where no file of the folder has a header for it.

A folder that has other files, or files of other sizes, than its list says was changed by somebody else, and is never
replaced.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.checkpoint.places import read_small_file, size_of
from cogtools.errors import CheckpointError
from cogtools.version import __version__

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath

NAME = "cogtools.json"

_MAX_BYTES = 1 << 20


def listing(sizes: Mapping[str, int], record: Mapping[str, object] | None = None) -> bytes:
    """The list of a folder's files, by their sizes in bytes, with a record of how they were made."""
    content: dict[str, object] = {"files": sizes, "version": __version__}
    if record is not None:
        content["record"] = record
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def record_beside(checkpoint: Checkpoint) -> object:
    """The record in the list of files beside a checkpoint, or in the folder above its own; None if there is none."""
    try:
        file = checkpoint.read_beside(NAME, _MAX_BYTES, above=True)
        content = {} if file is None else json.loads(file.content)
    except (CheckpointError, ValueError, RecursionError):
        return None
    return content.get("record") if isinstance(content, dict) else None


def is_whole(folder: AnyPath) -> bool:
    """Whether a folder has all that its list of files says."""
    listed = _listed(folder)
    return listed is not None and all(size_of(folder / name) == size for name, size in listed.items())


def is_cut_off(folder: AnyPath, names: Collection[str]) -> bool:
    """Whether a folder has a list of these files, and not all of them: putting them into a store was cut off."""
    listed = _listed(folder)
    return listed is not None and {*listed, NAME} == set(names) and not is_whole(folder)


def _listed(folder: AnyPath) -> dict[str, object] | None:
    """The size of each file, as a folder's list of files has it; None if it has no such list."""
    try:
        listed = json.loads(read_small_file(folder / NAME, _MAX_BYTES))["files"]
    except (CheckpointError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return listed if isinstance(listed, dict) else None


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what its list of files says, and nothing else."""
    listed = _listed(folder)
    try:
        return listed is not None and _sizes(folder) == listed
    except OSError:
        return False


def _sizes(folder: Path) -> dict[str, int]:
    """The size of every file and link in a folder and the folders in it, but for the list itself."""
    sizes: dict[str, int] = {}
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*files, *links):
            path = Path(place, name)
            sizes[path.relative_to(folder).as_posix()] = path.lstat().st_size
    sizes.pop(NAME)
    return sizes

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

from cogtools.conversion.carry_out import PlannedFile
from cogtools.errors import CheckpointError
from cogtools.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cogtools.checkpoint.index import Checkpoint

NAME = "cogtools.json"

_MAX_BYTES = 1 << 20


def with_manifest(files: Sequence[PlannedFile], record: Mapping[str, object] | None = None) -> tuple[PlannedFile, ...]:
    """Files of a folder, and the list of them, with a record of how they were made."""
    content: dict[str, object] = {"files": {file.path: file.size_bytes for file in files}, "version": __version__}
    if record is not None:
        content["record"] = record
    return (*files, PlannedFile(NAME, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()))


def record_beside(checkpoint: Checkpoint) -> object:
    """The record in the list of files beside a checkpoint, or in the folder above its own; None if there is none."""
    try:
        file = checkpoint.read_beside(NAME, _MAX_BYTES, above=True)
        content = {} if file is None else json.loads(file.content)
    except (CheckpointError, ValueError, RecursionError):
        return None
    return content.get("record") if isinstance(content, dict) else None


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what its list of files says, and nothing else."""
    try:
        with (folder / NAME).open("rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
        listed = content["files"]
        return isinstance(listed, dict) and _sizes(folder) == listed
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
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

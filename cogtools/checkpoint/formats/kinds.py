"""What a file is, told from how it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.files import SourceFile
from cogtools.checkpoint.formats import safetensors, torch_legacy, torch_zip, zip_archive
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cogtools.checkpoint.index import Checkpoint

START_BYTES = 512
"""How much of a file is looked at."""


class FileFormat(NamedTuple):
    """A format of checkpoints: how to tell it from a file's first bytes, and how to open it."""

    fits: Callable[[bytes], bool]
    open: Callable[[SourceFile], Checkpoint]


FORMATS = (
    FileFormat(lambda start: start.startswith(zip_archive.MAGIC), torch_zip.open_torch_zip),
    FileFormat(safetensors.looks_like_safetensors, safetensors.open_safetensors),
    FileFormat(torch_legacy.looks_legacy, torch_legacy.open_torch_legacy),
)


def read_start(file: SourceFile) -> bytes:
    """The first bytes of a file."""
    return file.read(0, min(START_BYTES, file.size_bytes))


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a file begins as a checkpoint does; a zip archive as torch.save makes it, not any."""
    try:
        with SourceFile.open(path) as file:
            start = read_start(file)
    except CheckpointError:
        return False
    if start.startswith(zip_archive.MAGIC):
        return b"data.pkl" in start
    return any(file_format.fits(start) for file_format in FORMATS)

"""How files begin: what a checkpoint is, and what people give in place of one. Only the first bytes are looked at."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from cogtools.checkpoint.files import SourceFile
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import AnyPath

FormatName: TypeAlias = Literal["zip", "safetensors", "legacy"]

START_BYTES = 512
"""How much of a file is looked at."""

ZIP_MAGIC = b"PK\x03\x04"

MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads. A file with a longer one is not a safetensors file."""

LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""What a legacy file of `torch.save` begins with, in a pickle of its own (torch/serialization.py, `MAGIC_NUMBER`)."""

_PICKLE = rb"\x80[\x02-\x05]"  # PROTO, and the protocols that have it
_FRAME = rb"(?:\x95.{8})?"  # from protocol 4 on
_LONG1 = rb"\x8a\x0a" + re.escape(LEGACY_MAGIC_NUMBER.to_bytes(10, "little"))
_LEGACY = re.compile(_PICKLE + _FRAME + _LONG1 + rb"\.", re.DOTALL)
_ANY_PICKLE = re.compile(_PICKLE)


class OtherFile(NamedTuple):
    """A file that is given in place of a checkpoint: how it begins, what it is, what to do."""

    signature: bytes
    name: str
    hint: str


OTHER_FILES = (
    OtherFile(b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    OtherFile(b"<!DOCTYPE", "a web page", "download the file itself, not the page that shows it"),
    OtherFile(b"<html", "a web page", "download the file itself, not the page that shows it"),
    OtherFile(b"GGUF", "a GGUF file", "give the checkpoint that it was made from"),
    OtherFile(b"\x89HDF", "an HDF5 file", "give a checkpoint of PyTorch or safetensors"),
    OtherFile(b"\x93NUMPY", "a NumPy array", "give a checkpoint of PyTorch or safetensors"),
    OtherFile(b"\x1f\x8b", "a gzip archive", "unpack it first: gunzip or tar xzf"),
    OtherFile(b"PK\x05\x06", "an empty zip archive", "copy or download it again"),
    OtherFile(b"Rar!", "a RAR archive", "unpack it first"),
    OtherFile(b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
)


def read_start(file: SourceFile) -> bytes:
    """The first bytes of a file."""
    return file.read(0, min(START_BYTES, file.size_bytes))


def format_of(start: bytes) -> FormatName | None:
    """The format of a checkpoint that begins with these bytes, be it whole or not; None if it is none that is read."""
    if start.startswith(ZIP_MAGIC):
        return "zip"
    if looks_like_safetensors(start):
        return "safetensors"
    return "legacy" if _LEGACY.match(start) else None


def looks_like_safetensors(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a safetensors file."""
    length = int.from_bytes(start[:8], "little")
    return len(start) > 8 and start[8:9] == b"{" and length <= MAX_SAFETENSORS_HEADER_BYTES


def looks_like_checkpoint(path: AnyPath) -> bool:
    """Whether a file begins as a checkpoint does; a zip archive as torch.save makes it, not any."""
    try:
        with SourceFile.open(path) as file:
            start = read_start(file)
    except CheckpointError:
        return False
    found = format_of(start)
    return b"data.pkl" in start if found == "zip" else found is not None


def what_it_is(start: bytes) -> tuple[str, str | None]:
    """What a file is that is not a checkpoint, and what to do."""
    for other in OTHER_FILES:
        if start.startswith(other.signature):
            return other.name, other.hint
    if not start:
        return "nothing: the file is empty", "copy or download it again"
    if not start.strip(b"\0"):
        return "zeros: its content is missing", "copy or download it again"
    if _ANY_PICKLE.match(start):
        return (
            "a pickle that torch.save did not write",
            "where it was made, load it with pickle (that runs what is in it) and save the weights with torch.save",
        )
    try:
        # Where the file goes on, its start may end in the middle of a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < START_BYTES)
    except UnicodeDecodeError:
        return f"a file that begins with {start[:8].hex(' ')}", None
    return f"a text file that begins with {text.splitlines()[0][:60]!r}", None

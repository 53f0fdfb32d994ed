"""Long headers of safetensors files, read in the memory of a few copies of them.

The safetensors library reads headers of up to 100 MB. A real one gets long by its metadata: trainers put every caption
or tag of their data there. As JSON it may take 25 times its size in memory, so it is cut out before the rest is read.
Those of its entries are kept that fit into `MAX_HEADER_BYTES`, in the order of the file.
"""

from __future__ import annotations

import codecs
import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined] # not documented; json.loads reads strings with it
from typing import NamedTuple

from cogtools.checkpoint.limits import MAX_HEADER_BYTES

METADATA_KEY = "__metadata__"

_CHECKED_BYTES = 1 << 20
_MAX_DESCRIPTION_CHARS = 1 << 14  # of one tensor: 32 dimensions of 20 digits take 700
_PUNCTUATION_CHARS = 6  # "":"",
_MAX_LEFT_OUT = 100

_SPACE = re.compile(r"[ \t\n\r]*")
_read_value = json.JSONDecoder().raw_decode


class CutHeader(NamedTuple):
    """A header without its metadata.

    Attributes:
        text: the JSON, with `{}` for the metadata.
        metadata: those entries of it that are kept.
        left_out: the lengths of those that are not, in characters: of the first hundred.
    """

    text: bytes
    metadata: dict[str, str]
    left_out: dict[str, int]


def cut_metadata(header: bytes) -> CutHeader:
    """Cut the metadata out of a header.

    Raises:
        ValueError: if it is not UTF-8, or not JSON as the format has it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(header), _CHECKED_BYTES):
        decoder.decode(header[start : start + _CHECKED_BYTES])
    decoder.decode(b"", final=True)
    # One character a byte: decoded, a single character outside of the basic plane would make it four times as long.
    text = header.decode("latin-1")
    position = _after("{", text, 0)
    while True:
        key, position = _skip_string(text, position)
        position = _after(":", text, position)
        if key == METADATA_KEY:
            metadata, left_out, end = _read_metadata(text, position)
            return CutHeader((text[:position] + "{}" + text[end:]).encode("latin-1"), metadata, left_out)
        _, length = _read_value(text[position : position + _MAX_DESCRIPTION_CHARS])
        position = _space(text, position + length)
        if text[position : position + 1] != ",":
            return CutHeader(header, {}, {})
        position = _after(",", text, position)


def _read_metadata(text: str, position: int) -> tuple[dict[str, str], dict[str, int], int]:
    """The entries that are kept, the lengths of the others, and where the metadata ends."""
    kept: dict[str, str] = {}
    left_out: dict[str, int] = {}
    if text.startswith("null", position):
        return kept, left_out, position + len("null")
    position = _after("{", text, position)
    characters = 0
    is_first = True
    while text[position : position + 1] != "}":
        position = position if is_first else _after(",", text, position)
        is_first = False
        key_start = position
        _, key_end = _skip_string(text, position)
        value_start = _after(":", text, key_end)
        _, value_end = _skip_string(text, value_start)
        position = _space(text, value_end)
        length = value_end - key_start + _PUNCTUATION_CHARS
        if characters + length <= MAX_HEADER_BYTES:
            kept[_string(text[key_start:key_end])] = _string(text[value_start:value_end])
            characters += length
        elif len(left_out) < _MAX_LEFT_OUT:
            left_out[_string(text[key_start:key_end])] = value_end - value_start - 2
    return kept, left_out, position + 1


def _skip_string(text: str, position: int) -> tuple[str, int]:
    """A string of bytes that were taken for characters, and where it ends."""
    if text[position : position + 1] != '"':
        raise ValueError(f"a string is missing at character {position:,}")
    value: str
    value, end = scanstring(text, position + 1, True)
    if text.find("\\u", position, end) >= 0:
        value.encode()  # refuse half a surrogate pair, as the safetensors library does
    return value, end


def _string(literal: str) -> str:
    value: str = json.loads(literal.encode("latin-1"))
    return value


def _after(character: str, text: str, position: int) -> int:
    position = _space(text, position)
    if text[position : position + 1] != character:
        raise ValueError(f"{character!r} is missing at character {position:,}")
    return _space(text, position + 1)


def _space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position

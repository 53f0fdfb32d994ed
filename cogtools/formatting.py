"""Numbers, counts, lists and text from files in few words: what messages and reports have in common."""

from __future__ import annotations

import json
from reprlib import Repr
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence


def number(value: float) -> str:
    """A number without needless digits: "1", "0.0078125"."""
    return f"{value:.10g}"


def percent(share: float) -> str:
    """A share in percent, with two digits that count: "94 %", "0.031 %"."""
    return f"{100 * share:.2g} %"


def counted(count: int, noun: str) -> str:
    """A number of things: "1 tensor", "24 tensors"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_of(items: Sequence[str], count: int) -> list[str]:
    """The first ones of many, and how many more there are."""
    more = len(items) - count
    return [*items[:count], f"… and {more:,} more (--json lists all)"] if more > 0 else list(items)


_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size(size_bytes: int) -> str:
    """A number of bytes with its unit: "118.0 MB", in powers of 1000 as disks and `ls -h --si` count."""
    value, unit = float(size_bytes), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{size_bytes} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def fold_numbers(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges: "0-3, 7, 9-11"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


MAX_SHOWN_CHARS = 100

_REPR = Repr()
_REPR.maxstring = MAX_SHOWN_CHARS
_REPR.maxlevel = 3


def shown(value: object) -> str:
    """Text or JSON of a file in quotes, and as much of it as a line holds."""
    return _REPR.repr(value)


def truncate(
    text: str, length: int = MAX_SHOWN_CHARS, *, keep: Literal["start", "end", "both"] = "start", mark: str = "…"
) -> str:
    """A text of at most `length` characters: what is too much is cut out, and `mark` put in its place.

    Args:
        text: the text.
        length: how many characters the result may have, with the mark.
        keep: the part that stays. Of both ends, the last one gets two thirds of the room.
        mark: shown in place of what was cut out.
    """
    if len(text) <= length:
        return text
    room = max(length - len(mark), 0)
    tail = {"start": 0, "end": room, "both": min(2 * length // 3, room)}[keep]
    return text[: room - tail] + mark + text[len(text) - tail :]


def python_literal(text: str) -> str:
    """A text as a string in Python code: JSON's strings are valid there."""
    return json.dumps(text, ensure_ascii=False)

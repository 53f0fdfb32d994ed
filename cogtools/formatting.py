"""Numbers, counts and text from files in few words: what messages and reports have in common."""

from __future__ import annotations

from reprlib import Repr
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def number(value: float) -> str:
    """A number without needless digits: "1", "0.0078125"."""
    return f"{value:.10g}"


def counted(count: int, noun: str) -> str:
    """A number of things: "1 tensor", "24 tensors"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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

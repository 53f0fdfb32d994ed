"""What a file says, as an error shows it.

A file's text has no end that an error could wait for, and what holds itself, or is nested deeply, cannot be printed
at all.
"""

from __future__ import annotations

from reprlib import Repr

MAX_SHOWN_CHARS = 100

_REPR = Repr()
_REPR.maxstring = MAX_SHOWN_CHARS
_REPR.maxlevel = 3


def shown(value: object) -> str:
    """Text or JSON of a file in quotes, and as much of it as a line holds."""
    return _REPR.repr(value)

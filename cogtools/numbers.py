"""Numbers that come from files: which of them can be meant."""

from __future__ import annotations

from typing import TypeGuard

MAX_NUMBER = 2**63
"""A larger number was never meant, and may be too long to be printed or too large for a float."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, not too large to be one that is meant; NaN is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def is_positive(value: object) -> TypeGuard[float]:
    """Whether a value is a number above 0, neither so large nor so small that dividing by it could overflow."""
    return is_number(value) and value > 1 / MAX_NUMBER

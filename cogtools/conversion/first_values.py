"""What the first values of a LoRA's tensors show, without NumPy and at no cost that can be measured.

A training that diverged, or never began, shows at the beginning of its tensors: all of them are NaN, zero or one value.
`verify` looks at every value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.dtypes import FLOAT_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cogtools.checkpoint.dtypes import FloatFormat
    from cogtools.conversion.plan import LoraPlan
    from cogtools.layouts.family import LoraKey

FIRST_BYTES = 4 << 10
"""How much of each tensor is looked at: a thousand values or more."""


class First(NamedTuple):
    """The beginning of a tensor.

    Attributes:
        part: which part of a module's adapter it is.
        data: its first bytes, of whole little-endian elements.
        size: bytes of an element.
        form: the format of its numbers.
    """

    part: str
    data: bytes
    size: int
    form: FloatFormat

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or an infinity."""
        mask = self.form.exponent >> 8 * (self.size - 1)
        suspects = self.data[self.size - 1 :: self.size].translate(bytes(byte & mask == mask for byte in range(256)))
        index = suspects.find(1)
        while index >= 0:  # the rest of the exponent is in the byte before
            number = int.from_bytes(self.data[index * self.size : (index + 1) * self.size], "little")
            if number & self.form.exponent == self.form.exponent:
                return False
            index = suspects.find(1, index + 1)
        return True

    @property
    def is_zero(self) -> bool:
        """Whether all values are zero, of either sign."""
        *lower, highest = (self.data[place :: self.size] for place in range(self.size))
        return not highest.strip(b"\0\x80") and not any(part.strip(b"\0") for part in lower)

    @property
    def is_constant(self) -> bool:
        """Whether all values are one, and there are several."""
        count = len(self.data) // self.size
        return count > 1 and self.data == self.data[: self.size] * count


def value_notices(plan: LoraPlan) -> list[str]:
    """What to note of the first values of the tensors that a plan copies, by number of tensors."""
    firsts = [first for name in plan.names if (first := _first(plan, name)) is not None]
    factors = {part: [first for first in firsts if first.part == part] for part in "AB"}
    not_finite = _count(firsts, lambda first: not first.is_finite)
    zero = _count(factors["B"], lambda first: first.is_zero)
    constant = _count(factors["A"], lambda first: first.is_constant and first.is_finite)
    notices = []
    if not_finite:
        notices.append(
            f"{_of(not_finite, len(firsts), 'tensors')} begin with NaN or infinity: the training diverged. An earlier "
            "iteration may be usable."
        )
    if zero:
        what = "this LoRA does nothing, as before training" if zero == len(factors["B"]) else "their modules do nothing"
        notices.append(f"{_of(zero, len(factors['B']), 'lora_B')} begin with zeros: if the rest is zero too, {what}.")
    if constant:
        notices.append(
            f"{_of(constant, len(factors['A']), 'lora_A')} begin with one value repeated: they look untrained."
        )
    return notices


def _first(plan: LoraPlan, name: LoraKey) -> First | None:
    """The beginning of a tensor.

    None for one whose bytes would have to be rearranged or fetched, or that is not of floats.
    """
    entry = plan.entry(name)
    form = FLOAT_FORMATS.get(entry.dtype.name)
    if form is None or not entry.numel or not entry.storage.is_located:
        return None
    source = entry.range()
    data = None if source is None else source.file.peek(source.offset_bytes, min(source.size_bytes, FIRST_BYTES))
    return None if data is None else First(name.part, data, entry.dtype.itemsize, form)


def _count(firsts: Iterable[First], shows: Callable[[First], bool]) -> int:
    return sum(map(shows, firsts))


def _of(count: int, every: int, what: str) -> str:
    return f"All {every:,} {what}" if count == every else f"{count:,} of {every:,} {what}"

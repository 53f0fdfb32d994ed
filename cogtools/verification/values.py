"""The values of tensors, looked at with NumPy in pieces. Importing torch would take longer than all of it.

Floating-point numbers are told to be finite by their bits: infinities and NaNs are those whose exponent is all ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogtools.checkpoint.decoding import can_decode, doubles, raw_code
from cogtools.checkpoint.dtypes import FLOAT_FORMATS
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.errors import Problem
from cogtools.formatting import counted
from cogtools.verification.report import Check, judged

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.decoding import Array
    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import LoraKey

SCAN_BYTES = 2 << 20
"""What is looked at at once: small enough for the processor's cache, large enough that Python does not count."""


def place(index: int, shape: tuple[int, ...]) -> str:
    """Where an element is: its indices, from its position in row-major order."""
    return str([int(axis) for axis in np.unravel_index(index, shape)]) if shape else "[]"


class Bits(NamedTuple):
    """What bit patterns of a dtype stand for.

    Attributes:
        code: NumPy's code of unsigned integers of that size.
        not_finite: which of some patterns are NaN or an infinity.
        zero: which are zero, of either sign.
    """

    code: str
    not_finite: Callable[[Array], Array]
    zero: Callable[[Array], Array]


def bits_of(dtype: DType) -> Bits | None:
    """What its bit patterns stand for; None if there is not a number for each element."""
    code = raw_code(dtype, big_endian=False).replace("f", "u").replace("i", "u")
    form = FLOAT_FORMATS.get(dtype.name)
    if form is not None:
        magnitude = (1 << (8 * dtype.itemsize - 1)) - 1
        return Bits(code, lambda bits: (bits & form.exponent) == form.exponent, lambda bits: (bits & magnitude) == 0)
    if not can_decode(dtype):
        return None
    if dtype.itemsize > 1 or not dtype.name.startswith("float"):  # whole numbers
        return Bits(code, lambda bits: np.zeros(bits.shape, bool), lambda bits: bits == 0)
    numbers = doubles(bytes(range(256)), dtype)
    not_finite, zero = ~np.isfinite(numbers), numbers == 0
    return Bits(code, lambda bits: not_finite[bits], lambda bits: zero[bits])


@dataclass(slots=True)
class _Scan:
    """What the values of all tensors show.

    Attributes:
        read: how many tensors were looked at.
        not_finite: tensors with a NaN or an infinity.
        zero: each lora_B of zeros only.
        constant: each lora_A of one value only.
    """

    read: int = 0
    not_finite: list[Problem] = field(default_factory=list)
    zero: list[LoraKey] = field(default_factory=list)
    constant: list[Problem] = field(default_factory=list)


def value_checks(lora: Lora, advance: Callable[[int], None]) -> list[Check]:
    """Scan all values once: are they finite, was every lora_B trained, is no lora_A constant.

    Args:
        lora: the file.
        advance: told the bytes that were read, as they are.
    """
    scan = _Scan()
    in_file_order = sorted(lora.tensors.items(), key=lambda item: item[1].entry.storage.range().offset_bytes)
    for name, tensor in in_file_order:
        bits = bits_of(tensor.entry.dtype)
        if bits is not None and tensor.entry.numel:
            scan.read += 1
            _scan(scan, name, tensor.key, tensor.entry, bits, advance)
    if not scan.read:
        return [Check(name, "skipped", _why_nothing(lora)) for name in ("finite", "untrained", "constant")]
    trained = sum(name.part == "B" for name in lora.tensors)
    untrained = lora.problems("zero", scan.zero)
    everything = "every lora_B is zero: this LoRA does nothing, as before training"
    some = f"{len(scan.zero)} of {trained} lora_B are zero: their modules do nothing"
    return [
        judged("finite", scan.not_finite, f"all values of {counted(scan.read, 'tensor')}", "NaN or infinity"),
        judged(
            "untrained",
            untrained,
            "no lora_B is zero",
            everything if len(scan.zero) == trained else some,
            status="warn",
        ),
        judged("constant", scan.constant, "no lora_A is constant", f"{len(scan.constant)} lora_A of one value"),
    ]


def _why_nothing(lora: Lora) -> str:
    """Why there are no values to look at."""
    dtypes = sorted({tensor.entry.dtype.name for tensor in lora.tensors.values() if tensor.entry.numel})
    if dtypes:
        return f"numbers of {' and '.join(dtypes)} are not looked at"
    return "its tensors are empty" if lora.tensors else "no tensors"


def _scan(scan: _Scan, name: LoraKey, key: str, entry: TensorEntry, form: Bits, advance: Callable[[int], None]) -> None:
    is_zero, is_constant, bad, first_bad, position = True, True, 0, "", 0
    first_value = None
    for chunk in tensor_chunks(entry, SCAN_BYTES):
        bits = np.frombuffer(chunk, form.code)
        wrong = np.flatnonzero(form.not_finite(bits))
        if len(wrong):
            if not bad:
                value = doubles(chunk[wrong[0] * entry.dtype.itemsize :][: entry.dtype.itemsize], entry.dtype)[0]
                first_bad = f"{value} at {place(position + int(wrong[0]), entry.shape)}"
            bad += len(wrong)
        if name.part == "A" and is_constant:
            first_value = bits[0] if first_value is None else first_value
            is_constant = _are_all(first_value, bits[:64], form) and _are_all(first_value, bits, form)
        if name.part == "B" and is_zero:
            is_zero = bool(form.zero(bits[:64]).all() and form.zero(bits).all())
        position += len(bits)
        advance(len(chunk))
    if bad:
        scan.not_finite.append(Problem("not_finite", key, f"{first_bad} ({bad:,} of {entry.numel:,} values)"))
    if name.part == "B" and is_zero:
        scan.zero.append(name)
    if name.part == "A" and is_constant and first_value is not None:
        value = doubles(first_value.tobytes(), entry.dtype)[0]
        scan.constant.append(Problem("constant", key, f"{value:.6g} throughout"))


def _are_all(value: np.generic, bits: Array, form: Bits) -> bool:
    """Whether all numbers of some bits are one value; 0 and -0 are."""
    return bool((bits == value).all() or (form.zero(np.asarray(value)).all() and form.zero(bits).all()))

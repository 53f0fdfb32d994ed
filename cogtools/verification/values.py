"""The values of tensors, looked at with NumPy in pieces. Importing torch would take longer than all of it.

Floating-point numbers are told to be finite by their bits: infinities and NaNs are those whose exponent is all ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cogtools.checkpoint.decoding import doubles
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.errors import Problem
from cogtools.formatting import counted
from cogtools.verification.report import Check, judged

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import LoraKey

SCAN_BYTES = 2 << 20
"""What is looked at at once: small enough for the processor's cache, large enough that Python does not count."""


class Float(NamedTuple):
    """A floating-point format.

    Attributes:
        bits: the unsigned integer of its size.
        exponent: the bits of its exponent.
        precision: the bits of its fraction.
        least: the exponent of its smallest normal number.
    """

    bits: str
    exponent: int
    precision: int
    least: int


FLOAT_FORMATS = {
    "float16": Float("<u2", 0x7C00, 10, -14),
    "bfloat16": Float("<u2", 0x7F80, 7, -126),
    "float32": Float("<u4", 0x7F80_0000, 23, -126),
    "float64": Float("<u8", 0x7FF0_0000_0000_0000, 52, -1022),
}


def place(index: int, shape: tuple[int, ...]) -> str:
    """Where an element is: its indices, from its position in row-major order."""
    return str([int(axis) for axis in np.unravel_index(index, shape)]) if shape else "[]"


@dataclass(slots=True)
class _Scan:
    """What the values of all tensors show.

    Attributes:
        not_finite: tensors with a NaN or an infinity.
        zero: each lora_B of zeros only.
        constant: each lora_A of one value only.
        unread: tensors of dtypes that are not looked at.
    """

    not_finite: list[Problem] = field(default_factory=list)
    zero: list[LoraKey] = field(default_factory=list)
    constant: list[Problem] = field(default_factory=list)
    unread: int = 0


def value_checks(lora: Lora, advance: Callable[[int], None]) -> list[Check]:
    """Scan all values once: are they finite, was every lora_B trained, is no lora_A constant.

    Args:
        lora: the file.
        advance: told the bytes that were read, as they are.
    """
    scan = _Scan()
    in_file_order = sorted(lora.tensors.items(), key=lambda item: item[1].entry.storage.range().offset_bytes)
    for name, tensor in in_file_order:
        if tensor.entry.dtype.name in FLOAT_FORMATS and tensor.entry.numel:
            _scan(scan, name, tensor.key, tensor.entry, advance)
        else:
            scan.unread += 1
    count = len(lora.tensors) - scan.unread
    if not count:
        return [Check(name, "skipped", "no values") for name in ("finite", "untrained", "constant")]
    trained = sum(name.part == "B" for name in lora.tensors)
    untrained = lora.problems("zero", scan.zero)
    everything = "every lora_B is zero: this LoRA does nothing, as before training"
    some = f"{len(scan.zero)} of {trained} lora_B are zero: their modules do nothing"
    return [
        judged("finite", scan.not_finite, f"all values of {counted(count, 'tensor')}", "NaN or infinity"),
        judged(
            "untrained",
            untrained,
            "no lora_B is zero",
            everything if len(scan.zero) == trained else some,
            status="warn",
        ),
        judged("constant", scan.constant, "no lora_A is constant", f"{len(scan.constant)} lora_A of one value"),
    ]


def _scan(scan: _Scan, name: LoraKey, key: str, entry: TensorEntry, advance: Callable[[int], None]) -> None:
    form = FLOAT_FORMATS[entry.dtype.name]
    sign = 1 << (8 * entry.dtype.itemsize - 1)
    is_zero, is_constant, bad, first_bad, position = True, True, 0, "", 0
    first_value = None
    for chunk in tensor_chunks(entry, SCAN_BYTES):
        bits = np.frombuffer(chunk, form.bits)
        if (bits & form.exponent).max() == form.exponent:
            wrong = np.flatnonzero((bits & form.exponent) == form.exponent)
            if not bad:
                value = doubles(chunk[wrong[0] * entry.dtype.itemsize :][: entry.dtype.itemsize], entry.dtype)[0]
                first_bad = f"{value} at {place(position + int(wrong[0]), entry.shape)}"
            bad += len(wrong)
        if name.part == "A" and is_constant:
            first_value = bits[0] if first_value is None else first_value
            is_constant = _are_all(first_value, bits[:64], sign) and _are_all(first_value, bits, sign)
        if name.part == "B" and is_zero:
            is_zero = not (bits & (sign - 1)).any()
        position += len(bits)
        advance(len(chunk))
    if bad:
        scan.not_finite.append(Problem("not_finite", key, f"{first_bad} ({bad:,} of {entry.numel:,} values)"))
    if name.part == "B" and is_zero:
        scan.zero.append(name)
    if name.part == "A" and is_constant and first_value is not None:
        value = doubles(first_value.tobytes(), entry.dtype)[0]
        scan.constant.append(Problem("constant", key, f"{value:.6g} throughout"))


def _are_all(value: np.generic, bits: NDArray[Any], sign: int) -> bool:
    """Whether all numbers of some bits are one value; 0 and -0 are."""
    return bool((bits == value).all()) or not ((bits | value) & (sign - 1)).any()

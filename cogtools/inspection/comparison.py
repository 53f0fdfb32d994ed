"""What changed from one LoRA to another, in numbers: of each module the two updates scaling * lora_B @ lora_A.

No update is ever formed. With the factors of both, inner products are sums over small matrices:

    <B A, D C> = sum((B^T D) * (A C^T))

Where both have one rank, the difference is (B - D) A + D (A - C): of two neighbouring iterations its norm comes out
as exactly as it is small. Where they differ, it is worked out from the norms and the inner product, and is not known
better than to a hundred-millionth of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogtools.checkpoint.decoding import tensor_doubles
from cogtools.conversion.lora import scale_of
from cogtools.inspection.report import LoraComparison, ModuleChange
from cogtools.inspection.updates import NOT_FINITE, NotComputedError, checked_factors
from cogtools.layouts.family import LoraKey

if TYPE_CHECKING:
    from cogtools.checkpoint.decoding import Array
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import Module


class _Squares(NamedTuple):
    """Squares of Frobenius norms, and an inner product: they add up over modules."""

    first: float = 0.0
    second: float = 0.0
    difference: float = 0.0
    inner: float = 0.0

    def __add__(self, other: object) -> _Squares:
        if not isinstance(other, _Squares):
            return NotImplemented
        return _Squares(*(one + more for one, more in zip(self, other, strict=True)))

    @property
    def relative(self) -> float | None:
        """The norm of the difference over that of the first; None if that is 0."""
        return math.sqrt(self.difference / self.first) if self.first > 0 else None

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between the two; None if one of them is 0."""
        product = math.sqrt(self.first) * math.sqrt(self.second)
        return max(-1.0, min(1.0, self.inner / product)) if product > 0 else None


@dataclass(frozen=True, slots=True)
class _Update:
    """The update of one module: scaling * b @ a."""

    a: Array
    b: Array

    @classmethod
    def read(cls, lora: Lora, module: Module, scaling: float | None) -> _Update | None:
        """The update of a module; None if the LoRA does not adapt it.

        Raises:
            NotComputedError: if it cannot be computed with.
        """
        found = (lora.tensors.get(LoraKey(*module, factor)) for factor in "AB")
        a, b = (None if tensor is None else tensor.entry for tensor in found)
        if a is None and b is None:
            return None
        a, b = checked_factors(a, b)
        update = cls(tensor_doubles(a), tensor_doubles(b) * (1.0 if scaling is None else scaling))
        if not (np.isfinite(update.a).all() and np.isfinite(update.b).all()):
            raise NotComputedError(NOT_FINITE)
        return update

    def inner(self, other: _Update) -> float:
        """The inner product with another update."""
        return float(np.sum((self.b.T @ other.b) * (self.a @ other.a.T)))

    def square(self) -> float:
        """The square of the Frobenius norm."""
        return max(self.inner(self), 0.0)

    def minus(self, other: _Update, inner: float) -> float:
        """The square of the norm of the difference to another update."""
        if self.a.shape != other.a.shape or self.b.shape != other.b.shape:
            return max(self.square() + other.square() - 2 * inner, 0.0)
        by_b, by_a = _Update(self.a, self.b - other.b), _Update(self.a - other.a, other.b)
        return max(by_b.square() + by_a.square() + 2 * by_b.inner(by_a), 0.0)


def compare_loras(first: Lora, second: Lora) -> LoraComparison:
    """Compare two LoRAs, module by module, whatever layouts they are in.

    A module that only one of them adapts counts as a change from or to nothing.

    Args:
        first: the LoRA before.
        second: the LoRA after.
    """
    scales = [scale_of(lora) for lora in (first, second)]
    scalings = [{} if scale is None else scale.scalings for scale in scales]
    modules = sorted({*first.modules, *second.modules}, key=lambda module: module.order)
    changes, total = [], _Squares()
    for module in modules:
        squares, reason = _Squares(), None
        try:
            squares = _squares(*(_Update.read(lora, module, found.get(module))
                                 for lora, found in zip((first, second), scalings, strict=True)))  # fmt: skip
        except NotComputedError as error:
            reason = str(error)
        total += squares
        changes.append(_change(module, squares, reason))
    return LoraComparison(
        modules=tuple(changes),
        first_norm=math.sqrt(total.first),
        second_norm=math.sqrt(total.second),
        difference=total.relative,
        cosine=total.cosine,
        only_first=sum(module not in set(second.modules) for module in first.modules),
        only_second=sum(module not in set(first.modules) for module in second.modules),
    )


def _squares(first: _Update | None, second: _Update | None) -> _Squares:
    """What adds up of a module.

    Raises:
        NotComputedError: if the two do not fit each other.
    """
    if first is None or second is None:
        one, other = (0.0 if update is None else update.square() for update in (first, second))
        return _Squares(one, other, one + other, 0.0)
    if first.a.shape[1] != second.a.shape[1] or first.b.shape[0] != second.b.shape[0]:
        raise NotComputedError("sizes of different models")
    inner = first.inner(second)
    squares = _Squares(first.square(), second.square(), first.minus(second, inner), inner)
    if not all(map(math.isfinite, squares)):
        raise NotComputedError("updates too large for double precision")
    return squares


def _change(module: Module, squares: _Squares, reason: str | None) -> ModuleChange:
    if reason is not None:
        return ModuleChange(*module, not_computed=reason)
    norms = math.sqrt(squares.first), math.sqrt(squares.second)
    return ModuleChange(*module, *norms, squares.relative, squares.cosine)

"""How much of a LoRA a computation loses: where its update is cut to a lower rank, or rounded when it is merged.

The loss of a module is |result - update| / |update| in Frobenius norms; that of all modules together is the same of
their updates as one vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogtools.layouts.family import Module

if TYPE_CHECKING:
    from collections.abc import Mapping

NOTABLE = 0.1
"""A loss above this is worth a warning."""


@dataclass(slots=True)
class Loss:
    """What is lost of one thing, or of several: squared norms, so that they add up.

    Attributes:
        error: the squared norm of what is lost.
        norm: the squared norm of what there was.
    """

    error: float = 0.0
    norm: float = 0.0

    def add(self, error: float, norm: float) -> None:
        """Count the squared norms of a further part."""
        self.error += error
        self.norm += norm

    @property
    def ratio(self) -> float:
        """The norm of what is lost over the norm of what there was; 0 of nothing."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


@dataclass(frozen=True, slots=True)
class ModuleLoss:
    """How much of a module's update is lost.

    Attributes:
        layer: of the module; None if it lies beside the layers.
        name: cogtools' name of it.
        lost: |result - update| / |update|.
    """

    layer: int | None
    name: str
    lost: float

    @property
    def module(self) -> Module:
        """The module."""
        return Module(self.layer, self.name)


@dataclass(frozen=True, slots=True)
class LossReport:
    """How much of a LoRA is lost.

    Attributes:
        lost: of all modules together: |result - update| / |update|.
        modules: the same of every module.
    """

    lost: float
    modules: tuple[ModuleLoss, ...]

    @property
    def worst(self) -> ModuleLoss:
        """The module that loses most."""
        return max(self.modules, key=lambda module: module.lost)


def loss_report(losses: Mapping[Module, Loss]) -> LossReport | None:
    """What was lost of every module and of all together; None if nothing was counted."""
    if not losses:
        return None
    total = Loss()
    for loss in losses.values():
        total.add(loss.error, loss.norm)
    ordered = sorted(losses.items(), key=lambda item: item[0].order)
    return LossReport(total.ratio, tuple(ModuleLoss(*module, loss.ratio) for module, loss in ordered))

"""A trainer's save folder: its iterations, and which of them is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Iteration(NamedTuple):
    """The folder of one iteration in a trainer's save folder."""

    number: int
    ema: bool
    folder: Path

    def __str__(self) -> str:
        return self.folder.name


@dataclass(frozen=True, slots=True)
class Run:
    """A trainer's save folder, and which of its iterations was taken.

    Attributes:
        folder: the save folder.
        iterations: all there are, by number, those with EMA weights after those without.
        latest: what its file `latest` says; None if there is none.
        chosen: the one that was taken.
    """

    folder: Path
    iterations: tuple[Iteration, ...]
    latest: str | None
    chosen: Iteration

    @property
    def twin(self) -> Iteration | None:
        """The same iteration with EMA weights, if the chosen one is without, and the other way round."""
        return next(
            (item for item in self.iterations if item.number == self.chosen.number and item.ema != self.chosen.ema),
            None,
        )

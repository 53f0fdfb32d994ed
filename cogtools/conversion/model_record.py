"""What a written model's files say, in a header entry of their own, of how they were made; `verify` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogtools.conversion.record import MergedRecord


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """How a part of a model was made.

    Attributes:
        version: of cogtools.
        source: the name of the checkpoint's file.
        part: the part's name.
        model: the short name of the model; None for a text encoder.
        iteration: of the training.
        ema: whether its EMA weights were taken.
        merged: the LoRAs that were merged into it; None if none were.
    """

    version: str
    source: str
    part: str
    model: str | None = None
    iteration: int | None = None
    ema: bool | None = None
    merged: tuple[MergedRecord, ...] | None = None

    def text(self) -> str:
        """The record as it stands in the header: what is not known is left out."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, sort_keys=True)

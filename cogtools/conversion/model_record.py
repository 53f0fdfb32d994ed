"""What a written model's files say, in a header entry of their own, of how they were made; `verify` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


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
    """

    version: str
    source: str
    part: str
    model: str | None = None
    iteration: int | None = None
    ema: bool | None = None

    def text(self) -> str:
        """The record as it stands in the header."""
        return json.dumps(asdict(self), sort_keys=True)

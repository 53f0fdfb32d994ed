"""What a written model's files say, in a header entry of their own, of how they were made; `verify` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cogtools.conversion.record import RECORD_KEY, MergedRecord, read_merged

if TYPE_CHECKING:
    from cogtools.checkpoint.index import Checkpoint


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """How a part of a model was made. A field is None where the file does not say.

    Attributes:
        version: of cogtools.
        source: the name of the checkpoint's file.
        part: the part's name.
        model: the short name of the model; None for a text encoder.
        iteration: of the training.
        ema: whether its EMA weights were taken.
        merged: the LoRAs that were merged into it; None if none were.
    """

    version: str | None = None
    source: str | None = None
    part: str | None = None
    model: str | None = None
    iteration: int | None = None
    ema: bool | None = None
    merged: tuple[MergedRecord, ...] | None = None

    def text(self) -> str:
        """The record as it stands in the header: what is not known is left out."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, sort_keys=True)


def read_model_record(checkpoint: Checkpoint) -> ModelRecord:
    """The record in a file, or in the first of several. It may come from anyone: other types count as not there."""
    parts = [checkpoint, *checkpoint.parts.values()]
    text = next((part.metadata[RECORD_KEY] for part in parts if RECORD_KEY in part.metadata), "{}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = {}
    fields = content if isinstance(content, dict) else {}

    def word(name: str) -> str | None:
        value = fields.get(name)
        return value if isinstance(value, str) else None

    iteration, ema = fields.get("iteration"), fields.get("ema")
    return ModelRecord(
        version=word("version"),
        source=word("source"),
        part=word("part"),
        model=word("model"),
        iteration=iteration if type(iteration) is int else None,
        ema=ema if isinstance(ema, bool) else None,
        merged=read_merged(fields.get("merged")),
    )

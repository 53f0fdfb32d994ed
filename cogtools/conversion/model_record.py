"""What a written model's files say, in a header entry of their own, of how they were made; `verify` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cogtools.conversion.manifest import record_beside
from cogtools.conversion.record import RECORD_KEY, MergedRecord, RecordFields, read_merged

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
        dtype: what all tensors were cast to; None if they were not.
        merged: the LoRAs that were merged into it; None if none were.
    """

    version: str | None = None
    source: str | None = None
    part: str | None = None
    model: str | None = None
    iteration: int | None = None
    ema: bool | None = None
    dtype: str | None = None
    merged: tuple[MergedRecord, ...] | None = None

    @property
    def fields(self) -> dict[str, object]:
        """What is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def text(self) -> str:
        """The record as it stands in the header: what is not known is left out."""
        return json.dumps(self.fields, sort_keys=True)


def read_model_record(checkpoint: Checkpoint) -> ModelRecord:
    """The record in a file, in the first of several, or beside one that has no header for it.

    It may come from anyone: other types count as not there.
    """
    parts = [checkpoint, *checkpoint.parts.values()]
    text = next((part.metadata[RECORD_KEY] for part in parts if RECORD_KEY in part.metadata), None)
    try:
        content = record_beside(checkpoint) if text is None else json.loads(text)
    except (ValueError, RecursionError):
        content = {}
    fields = RecordFields(content if isinstance(content, dict) else {})
    return ModelRecord(
        version=fields.text("version"),
        source=fields.text("source"),
        part=fields.text("part"),
        model=fields.text("model"),
        iteration=fields.count("iteration"),
        ema=fields.truth("ema"),
        dtype=fields.dtype("dtype"),
        merged=read_merged(fields.values.get("merged")),
    )

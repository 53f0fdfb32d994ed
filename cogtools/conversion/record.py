"""What an exported file says, in a header entry of its own, of how it was made; `verify` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cogtools.checkpoint.dtypes import DTYPES
from cogtools.checkpoint.plausible import is_positive
from cogtools.conversion.options import BY_HAND, BY_SCALING
from cogtools.layouts.family import MAX_LAYERS

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORD_KEY = "cogtools"
"""The header entry."""

MAX_HIDDEN = 1 << 20
"""A larger hidden size is not believed."""

MAX_MERGED = 100
"""How many LoRAs of a merge are read at most."""


@dataclass(frozen=True, slots=True)
class MergedRecord:
    """A LoRA that went into a merge. A field is None where the file does not say.

    Attributes:
        source: the name of its file.
        iteration: of the training.
        ema: whether its EMA weights were taken.
        weight: what its updates were multiplied by, beside their own scaling.
        scaling: that scaling, of every module; None if they differ.
        alpha: of every module; None if they differ.
        alpha_source: where that comes from, as `Scale.source`.
    """

    source: str | None = None
    iteration: int | None = None
    ema: bool | None = None
    weight: float | None = None
    scaling: float | None = None
    alpha: float | None = None
    alpha_source: str | None = None


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """How an exported file was made. A field is None where the file does not say.

    Attributes:
        version: of cogtools.
        source: the name of the checkpoint's file.
        iteration: of the training.
        ema: whether its EMA weights were taken.
        models: short names of the models that fit.
        transformer_layers: layers of the transformer, adapted or not.
        hidden_size: of the transformer.
        rank: of every module of the file; None if they differ.
        cut_to: the rank that modules of a higher one were cut down to.
        base: the name of the file whose base weights were written beside the LoRA.
        alpha: the training's, of every module; None if they differ.
        scaling: what the training multiplied every update by; None if modules have different ones.
        alpha_source: where these come from, a key of `ALPHA_SOURCES`.
        format: the layout of the file.
        scale: how the file carries the scale: "metadata", "fold" or "none".
        source_dtype: of the checkpoint's tensors.
        dtype: of the file's.
        merged: the LoRAs that were merged.
    """

    version: str | None = None
    source: str | None = None
    iteration: int | None = None
    ema: bool | None = None
    models: tuple[str, ...] = ()
    transformer_layers: int | None = None
    hidden_size: int | None = None
    rank: int | None = None
    cut_to: int | None = None
    base: str | None = None
    alpha: float | None = None
    scaling: float | None = None
    alpha_source: str | None = None
    format: str | None = None
    scale: str | None = None
    source_dtype: str | None = None
    dtype: str | None = None
    merged: tuple[MergedRecord, ...] | None = None

    @property
    def alpha_by_hand(self) -> float | None:
        """Alpha, if it was given by --alpha."""
        return self.alpha if self.alpha_source == BY_HAND else None

    @property
    def scaling_by_hand(self) -> float | None:
        """The scaling, if it was given by --scaling."""
        return self.scaling if self.alpha_source == BY_SCALING else None

    def scaling_of(self, rank: int) -> float | None:
        """What the training multiplied the update of a module of this rank by; None if it is not recorded."""
        if self.scaling is not None:  # not always alpha / rank: rank-stabilised LoRAs have alpha / sqrt(rank)
            return self.scaling
        return self.alpha / rank if self.alpha is not None and rank else None

    def text(self) -> str:
        """The record as it stands in the header: what is not known is left out."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(known, sort_keys=True)


def read_record(metadata: Mapping[str, str]) -> ExportRecord:
    """The record in the metadata of a file. It may come from anyone: what is not of its type counts as not there."""
    content = RecordFields(_parsed(metadata))
    models = content.values.get("models")
    return ExportRecord(
        version=content.text("version"),
        source=content.text("source"),
        iteration=content.count("iteration"),
        ema=content.truth("ema"),
        models=tuple(filter(lambda model: isinstance(model, str), models)) if isinstance(models, list) else (),
        transformer_layers=content.count("transformer_layers", MAX_LAYERS),
        hidden_size=content.count("hidden_size", MAX_HIDDEN),
        rank=content.count("rank"),
        cut_to=content.count("cut_to"),
        base=content.text("base"),
        alpha=content.positive("alpha"),
        scaling=content.positive("scaling"),
        alpha_source=content.text("alpha_source"),
        format=content.text("format"),
        scale=content.text("scale"),
        source_dtype=content.dtype("source_dtype"),
        dtype=content.dtype("dtype"),
        merged=read_merged(content.values.get("merged")),
    )


def read_merged(value: object) -> tuple[MergedRecord, ...] | None:
    """The LoRAs of a merge, as a record lists them; None if it lists none."""
    return tuple(map(_read_merged, value[:MAX_MERGED])) if isinstance(value, list) else None


def _read_merged(value: object) -> MergedRecord:
    content = RecordFields(value if isinstance(value, dict) else {})
    return MergedRecord(
        source=content.text("source"),
        iteration=content.count("iteration"),
        ema=content.truth("ema"),
        weight=content.number("weight"),
        scaling=content.positive("scaling"),
        alpha=content.positive("alpha"),
        alpha_source=content.text("alpha_source"),
    )


class RecordFields:
    """The fields of a JSON object, each as what it should be, or None."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        return value if isinstance(value, str) else None

    def dtype(self, name: str) -> str | None:
        value = self.text(name)
        return value if value in DTYPES else None

    def count(self, name: str, most: int = 2**31) -> int | None:
        value = self.values.get(name)
        return value if type(value) is int and 0 < value <= most else None

    def truth(self, name: str) -> bool | None:
        value = self.values.get(name)
        return value if isinstance(value, bool) else None

    def positive(self, name: str) -> float | None:
        value = self.values.get(name)
        return value if is_positive(value) else None

    def number(self, name: str) -> float | None:
        """A number other than 0."""
        value = self.values.get(name)
        return value if isinstance(value, (int, float)) and is_positive(abs(value)) else None


def _parsed(metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        content = json.loads(metadata.get(RECORD_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

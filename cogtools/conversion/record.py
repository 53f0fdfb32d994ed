"""What an exported file says, in a header entry of its own, of how it was made; `verify` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cogtools.checkpoint.dtypes import DTYPES
from cogtools.checkpoint.plausible import is_positive
from cogtools.conversion.scale import BY_HAND, BY_SCALING
from cogtools.layouts.family import MAX_LAYERS

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORD_KEY = "cogtools"
"""The header entry."""

MAX_HIDDEN = 1 << 20
"""A larger hidden size is not believed."""


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
        rank: of every module; None if they differ.
        alpha: the training's, of every module; None if they differ.
        scaling: what the training multiplied every update by; None if modules have different ones.
        alpha_source: where these come from, a key of `ALPHA_SOURCES`.
        format: the layout of the file.
        scale: how the file carries the scale: "metadata", "fold" or "none".
        source_dtype: of the checkpoint's tensors.
        dtype: of the file's.
    """

    version: str | None = None
    source: str | None = None
    iteration: int | None = None
    ema: bool | None = None
    models: tuple[str, ...] = ()
    transformer_layers: int | None = None
    hidden_size: int | None = None
    rank: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    alpha_source: str | None = None
    format: str | None = None
    scale: str | None = None
    source_dtype: str | None = None
    dtype: str | None = None

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
        if self.alpha is not None and self.alpha_source != BY_SCALING and rank:
            return self.alpha / rank
        return self.scaling

    def text(self) -> str:
        """The record as it stands in the header."""
        return json.dumps(asdict(self), sort_keys=True)


def read_record(metadata: Mapping[str, str]) -> ExportRecord:
    """The record in the metadata of a file. It may come from anyone: what is not of its type counts as not there."""
    content = _content(metadata)

    def text(name: str) -> str | None:
        value = content.get(name)
        return value if isinstance(value, str) else None

    def dtype(name: str) -> str | None:
        value = text(name)
        return value if value in DTYPES else None

    def count(name: str, most: int = 2**31) -> int | None:
        value = content.get(name)
        return value if type(value) is int and 0 < value <= most else None

    def positive(name: str) -> float | None:
        value = content.get(name)
        return value if is_positive(value) else None

    models, ema = content.get("models"), content.get("ema")
    return ExportRecord(
        version=text("version"),
        source=text("source"),
        iteration=count("iteration"),
        ema=ema if isinstance(ema, bool) else None,
        models=tuple(filter(lambda model: isinstance(model, str), models)) if isinstance(models, list) else (),
        transformer_layers=count("transformer_layers", MAX_LAYERS),
        hidden_size=count("hidden_size", MAX_HIDDEN),
        rank=count("rank"),
        alpha=positive("alpha"),
        scaling=positive("scaling"),
        alpha_source=text("alpha_source"),
        format=text("format"),
        scale=text("scale"),
        source_dtype=dtype("source_dtype"),
        dtype=dtype("dtype"),
    )


def _content(metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        content = json.loads(metadata.get(RECORD_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

"""The checkpoint that a written model is held against, opened with what was merged into it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.model import find_parts, no_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.model import ModelPart


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The checkpoint that a model is held against.

    Attributes:
        checkpoint: it.
        parts: its parts.
        loras: the LoRAs that are given beside it, open.
    """

    checkpoint: Checkpoint
    parts: Mapping[str, ModelPart]
    loras: tuple[Checkpoint, ...] = ()

    @property
    def size_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(entry.size_bytes for part in self.parts.values() for entry in part.tensors.values())


@contextmanager
def open_model_source(paths: Sequence[AnyPath], *, iteration: int | None, ema: bool) -> Iterator[ModelSource]:
    """Open the checkpoint that a model is held against, and the LoRAs that were merged into it.

    Raises:
        CogtoolsError: if there is none, or it holds no model.
    """
    path, *others = paths
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(path, iteration=iteration, ema=ema))
        parts = find_parts(checkpoint)
        if not parts:
            raise no_model(checkpoint)
        yield ModelSource(checkpoint, parts, tuple(opened.enter_context(open_checkpoint(other)) for other in others))

"""What a verification of a whole model finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.verification.model_written import Kind
    from cogtools.verification.report import Check, Verdict


@dataclass(frozen=True, slots=True)
class ModelVerifyReport:
    """What a verification of a model found.

    Attributes:
        path: what was verified.
        kind: what that holds: "pipeline", "parts", "part", "file" or "sat".
        model: the name of the model, or what can be said of it; None for a text encoder.
        parts: the parts that were looked at.
        tensors: how many tensors they have.
        dtype: of these, each once.
        size_bytes: of all tensors.
        against: the checkpoint that it was held against.
        libraries: the versions of those that loaded it.
        strict: whether warnings are failures.
        checks: all that was looked at.
        notices: what the user should know beside that.
        verdict: that of the worst check.
    """

    path: AnyPath
    kind: Kind
    model: str | None
    parts: tuple[str, ...]
    tensors: int
    dtype: tuple[str, ...]
    size_bytes: int
    against: AnyPath | None
    libraries: dict[str, str]
    strict: bool
    checks: tuple[Check, ...]
    notices: tuple[str, ...]
    verdict: Verdict

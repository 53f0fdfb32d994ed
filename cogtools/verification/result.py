"""What a verification finds: checks, each with a status, what was seen, and every single thing that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from cogtools.errors import Problem

Status = Literal["pass", "warn", "fail", "skipped"]
Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the check.
        status: "pass", "warn", "fail", or "skipped" where there was nothing to look at.
        seen: what was seen, in a few words.
        problems: everything that is wrong, where that can be listed.
    """

    name: str
    status: Status
    seen: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        path: the LoRA file.
        naming: whose names its tensors should have: "diffusers" or "PEFT".
        model: the transformer that it belongs to, or what can be said of it.
        layers: the layers that it adapts.
        tensors: how many tensors it has.
        rank: of its modules, each once; more than one if the file states so.
        dtype: of its tensors, each once.
        scaling: what its modules' lora_B @ lora_A are multiplied by, as its reader reads it, each once.
        size_bytes: the size of the file.
        against: the checkpoint that it was held against.
        libraries: the versions of those that loaded it.
        strict: whether warnings are failures.
        checks: all that was looked at.
        verdict: that of the worst check.
    """

    path: Path
    naming: str
    model: str
    layers: tuple[int, ...]
    tensors: int
    rank: tuple[int, ...]
    dtype: tuple[str, ...]
    scaling: tuple[float, ...]
    size_bytes: int
    against: Path | None
    libraries: dict[str, str]
    strict: bool
    checks: tuple[Check, ...]
    verdict: Verdict


def judged(name: str, problems: Sequence[Problem], good: str, bad: str, *, status: Status = "fail") -> Check:
    """A check that passes without problems, and has another status with some."""
    return Check(name, status, bad, tuple(problems)) if problems else Check(name, "pass", good)


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """The worst status of all; a check that was skipped says nothing."""
    statuses = {check.status for check in checks}
    return "fail" if "fail" in statuses else "warn" if "warn" in statuses else "pass"

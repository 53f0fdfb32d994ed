"""What a verification finds: checks, each with a status, what was seen, and every single thing that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cogtools.layouts.cogvideox import FACTORS, PROJECTIONS, LoraKey
from cogtools.layouts.diffusers import MODULES
from cogtools.planning import fold_numbers

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


def fold_names(names: Iterable[LoraKey]) -> list[str]:
    """LoRA tensors in few words: layers of which the same ones are meant, together ("layers 12-14: to_v lora_B")."""
    parts: dict[int, set[tuple[str, str]]] = {}
    for name in names:
        parts.setdefault(name.layer, set()).add((name.projection, name.factor))
    alike: dict[frozenset[tuple[str, str]], list[int]] = {}
    for layer in sorted(parts):
        alike.setdefault(frozenset(parts[layer]), []).append(layer)
    return [
        f"layer{'s' if len(layers) > 1 else ''} {fold_numbers(layers)}: {_fold_parts(meant)}"
        for meant, layers in alike.items()
    ]


def _fold_parts(meant: frozenset[tuple[str, str]]) -> str:
    if len(meant) == len(PROJECTIONS) * len(FACTORS):
        return "all tensors"
    texts = []
    for projection in PROJECTIONS:
        factors = [f"lora_{factor}" for factor in FACTORS if (projection, factor) in meant]
        if factors:
            texts.append(f"{MODULES[projection].removeprefix('attn1.')} {' and '.join(factors)}")
    return ", ".join(texts)


def counted(count: int, noun: str) -> str:
    """A number of things: "1 tensor", "24 tensors"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

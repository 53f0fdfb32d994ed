"""What a verification finds: checks, each with a status, what was seen, and every single thing that is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cogtools.errors import Hint, Problem
from cogtools.layouts.folded import folded_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.readers import Reader
    from cogtools.errors import Hint, ProblemKind
    from cogtools.layouts.family import LoraKey

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
        hint: what to do about it, where there is something to do.
    """

    name: str
    status: Status
    seen: str
    problems: tuple[Problem, ...] = ()
    hint: Hint | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        path: the LoRA file.
        layout: that of the program that it is held against: "diffusers", "peft" …
        reader: that program.
        model: the transformer that it belongs to, or what can be said of it.
        layers: the layers that it adapts.
        tensors: how many tensors it has.
        rank: of its modules, each once; more than one if the file states so.
        dtype: of its tensors, each once.
        scaling: what its modules' lora_B @ lora_A are multiplied by, as its reader reads it, each once.
        size_bytes: the size of the file.
        readers: what every program that is known does with the file.
        against: the checkpoint that it was held against.
        libraries: the versions of those that loaded it.
        strict: whether warnings are failures.
        checks: all that was looked at.
        notices: what the user should know beside that.
        verdict: that of the worst check.
    """

    path: AnyPath
    layout: str
    reader: str
    model: str
    layers: tuple[int, ...]
    tensors: int
    rank: tuple[int, ...]
    dtype: tuple[str, ...]
    scaling: tuple[float, ...]
    size_bytes: int
    readers: tuple[Reader, ...]
    against: AnyPath | None
    libraries: dict[str, str]
    strict: bool
    checks: tuple[Check, ...]
    notices: tuple[str, ...]
    verdict: Verdict


def judged(
    name: str, problems: Sequence[Problem], good: str, bad: str, *, status: Status = "fail", hint: Hint | None = None
) -> Check:
    """A check that passes without problems, and has another status with some."""
    return Check(name, status, bad, tuple(problems), hint) if problems else Check(name, "pass", good)


def folded(problems: Iterable[tuple[LoraKey, Problem]]) -> list[Problem]:
    """Problems of single tensors, those that are alike made one that names all their keys."""
    alike: dict[tuple[ProblemKind, str | None, str | None], dict[LoraKey, str]] = {}
    for name, problem in problems:
        alike.setdefault((problem.kind, problem.found, problem.expected), {})[name] = problem.subject
    return [
        problem for (kind, found, expected), keys in alike.items() for problem in _as_one(kind, found, expected, keys)
    ]


def _as_one(kind: ProblemKind, found: str | None, expected: str | None, keys: dict[LoraKey, str]) -> Iterator[Problem]:
    for text, names in folded_names(keys).items():
        alone = len(keys) == 1
        yield Problem(kind, keys[names[0]] if alone else text, found, expected, tuple(keys[name] for name in names))


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """The worst status of all; a check that was skipped says nothing."""
    statuses = {check.status for check in checks}
    return "fail" if "fail" in statuses else "warn" if "warn" in statuses else "pass"


def strictly(checks: Iterable[Check]) -> list[Check]:
    """The checks, with warnings taken for failures."""
    return [replace(check, status="fail") if check.status == "warn" else check for check in checks]

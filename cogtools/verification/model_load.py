"""Really loading a model with diffusers and transformers, each part with `from_pretrained`.

That runs in a process of its own (`model_load_child`), as loading a LoRA does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from cogtools.errors import Problem
from cogtools.layouts.pipeline import PARTS
from cogtools.verification import child
from cogtools.verification.report import Check

if TYPE_CHECKING:
    from cogtools.errors import ProblemKind
    from cogtools.verification.model_written import WrittenModel

_CHILD = "cogtools.verification.model_load_child"


class LoadedModel(NamedTuple):
    """What came of loading a model.

    Attributes:
        check: the check.
        libraries: the versions of the libraries.
    """

    check: Check
    libraries: dict[str, str]


def load_model(written: WrittenModel) -> LoadedModel:
    """Load every part of a model as its users do, in the dtype that it has: one part after the other.

    Raises:
        KilledError: if the process that loads it gives no answer.
        LibraryError: if the libraries cannot be imported.
    """
    question: dict[str, object] = {
        "kind": written.kind,
        "folders": {name: str(folder.absolute()) for name, folder in written.folders.items() if name in PARTS},
        "files": sorted({str(part.part.checkpoint.path.absolute()) for part in written.parts.values() if part.part}),
        "dtypes": {name: dtype for name in written.parts if (dtype := _dtype(written, name)) is not None},
    }
    answer = child.ask(_CHILD, question, "loading the model with diffusers and transformers")
    found = cast("list[list[str]]", answer["problems"])
    problems = tuple(Problem(cast("ProblemKind", kind), subject, text) for kind, subject, text in found)
    check = Check("load", "fail" if problems else "pass", str(answer["seen"]), problems)
    return LoadedModel(check, cast("dict[str, str]", answer["libraries"]))


def _dtype(written: WrittenModel, name: str) -> str | None:
    """The dtype of a part's tensors, where they have one."""
    part = written.parts[name].part
    found = set() if part is None else {entry.dtype.name for entry in part.tensors.values()}
    return found.pop() if len(found) == 1 else None

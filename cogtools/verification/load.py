"""Really loading a LoRA with the libraries that people load it with.

That runs in a process of its own (`load_child`), which this module starts: what a file states can make the libraries
run without end, take all memory or crash. What would make them import modules by names that the file gives, or match
an expression for an exponential time, is not handed on to them at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from cogtools.checkpoint.paths import RemotePath
from cogtools.errors import CheckpointError, Problem
from cogtools.layouts.family import HEAD_SIZE, Module
from cogtools.verification import child
from cogtools.verification.expected import stated_of
from cogtools.verification.report import Check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.lora import Lora
    from cogtools.verification.expected import Expected
    from cogtools.verification.report import Status

_CHILD = "cogtools.verification.load_child"


class Loaded(NamedTuple):
    """What came of loading a file.

    Attributes:
        check: the check.
        libraries: the versions of the libraries.
        modules: the scaling of every module that was adapted; {} unless the file was loaded rightly.
    """

    check: Check
    libraries: dict[str, str]
    modules: dict[Module, float]


def load_lora(lora: Lora, expected: Expected, *, model: str | None, layers: int | None) -> Loaded:
    """Load a file with diffusers or PEFT, run every module that it adapts, and compare both with what it holds.

    Args:
        lora: the file.
        expected: what it should hold.
        model: the short name of its model, if the user stated it.
        layers: the number of its layers, if the user stated it.

    Raises:
        KilledError: if the process that loads it gives no answer.
        LibraryError: if the libraries cannot be imported.
        CheckpointError: if they cannot open a file at this path.
    """
    layout = lora.intended
    if layout.library is None:
        return Loaded(Check("load", "skipped", f"{layout.reader} is not run here: diffusers and PEFT are"), {}, {})
    reason = _cannot(lora, expected)
    if reason is not None:
        return Loaded(Check("load", "fail", reason), {}, {})
    refused = _not_handed_on(lora)
    if refused:
        seen = "not loaded: what the file states is not handed on to the libraries"
        return Loaded(Check("load", "fail", seen, tuple(refused)), {}, {})
    _refuse_path(lora.checkpoint.path)
    asked = None if lora.asked is None else lora.asked.name
    question = {"path": str(lora.checkpoint.path), "format": asked, "model": model, "layers": layers}
    return _read(child.ask(_CHILD, question, "loading the file with diffusers and PEFT"))


def _cannot(lora: Lora, expected: Expected) -> str | None:
    """Why there is nothing to load the file into, or nothing that should read it; None if all is well."""
    transformer = expected.transformer
    if not lora.tensors:
        return "the file has no LoRA tensors, so there is nothing to load"
    if not transformer.hidden or not transformer.layers:
        return "nothing tells which model the file belongs to: state it with --model"
    if transformer.hidden % HEAD_SIZE:
        return f"no CogVideoX transformer has hidden size {transformer.hidden}: its heads have {HEAD_SIZE} each"
    if lora.checkpoint.path.suffix != ".safetensors":
        # diffusers would unpickle it.
        return f"diffusers reads safetensors only from a file named .safetensors, not {lora.checkpoint.path.name}"
    return None


def _not_handed_on(lora: Lora) -> list[Problem]:
    stated = stated_of(lora)
    return [] if stated is None else list(stated.not_handed_on)


def _refuse_path(path: AnyPath) -> None:
    """Refuse a path that the libraries cannot open: safetensors takes UTF-8 only, and none takes a URL."""
    if isinstance(path, RemotePath):
        raise CheckpointError(
            "--load takes a file of this machine: that is what the libraries load",
            file=path,
            hint="download the file, and verify the copy",
        )
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            "a file at this path cannot be loaded with diffusers: the path is not UTF-8",
            file=path,
            hint="copy the file to a path in UTF-8, or verify it without --load",
        ) from error


def answer_of(loaded: Loaded) -> dict[str, object]:
    """What came of loading a file as a JSON object, for the process that asked."""
    check = loaded.check
    return {
        "status": check.status,
        "seen": check.seen,
        "problems": [[p.kind, p.subject, p.found, p.expected, p.keys] for p in check.problems],
        "libraries": loaded.libraries,
        "modules": [[*module, scaling] for module, scaling in loaded.modules.items()],
    }


def _read(answer: Mapping[str, object]) -> Loaded:
    problems = (
        Problem(kind, subject, found, expected, tuple(keys))
        for kind, subject, found, expected, keys in cast("list[list[Any]]", answer["problems"])
    )
    modules = cast("list[tuple[int | None, str, float]]", answer["modules"])
    return Loaded(
        Check("load", cast("Status", answer["status"]), cast("str", answer["seen"]), tuple(problems)),
        cast("dict[str, str]", answer["libraries"]),
        {Module(layer, name): scaling for layer, name, scaling in modules},
    )

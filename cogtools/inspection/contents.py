"""What a checkpoint consists of besides its tensors: files, iterations, what the trainer wrote, names in its pickle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cogtools.checkpoint.pickle.dangers import danger_of
from cogtools.checkpoint.pickle.machine import Global, Record
from cogtools.checkpoint.plausible import is_number
from cogtools.checkpoint.tensors import OtherTensor, TensorEntry
from cogtools.inspection.report import EntryReport, FileReport, GlobalReport, IterationReport

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.run import Run

TRAINER_FACTS = (
    "iteration",
    "global_steps",
    "global_samples",
    "skipped_steps",
    "ds_version",
    "dp_world_size",
    "mp_world_size",
)
"""What DeepSpeed and SAT write beside the weights, and people ask for."""

MAX_FACT_CHARS = 100
"""The longest text that is taken for a fact."""

MAX_KIND_CHARS = 200
"""How much is shown of the name of a call or class that stands in place of a tensor."""

_DANGERS = ("dangerous", "unknown", "harmless")


def files_of(checkpoint: Checkpoint) -> Iterator[FileReport]:
    """The files of a checkpoint that has several."""
    for part in checkpoint.parts.values():
        if part.parts:
            yield from files_of(part)
        else:
            yield FileReport(part.path, part.format, part.size_bytes, len(part.tensors))


def iterations_of(run: Run | None) -> tuple[IterationReport, ...]:
    """The iterations of the save folder that a checkpoint lies in."""
    if run is None:
        return ()
    return tuple(
        IterationReport(item.folder.name, item.ema, item.folder.name == run.latest, item == run.chosen)
        for item in run.iterations
    )


def trainer_facts(values: Mapping[str, object]) -> dict[str, int | float | str]:
    """What the trainer wrote beside the weights, as far as it is short."""
    facts: dict[str, int | float | str] = {}
    for name in TRAINER_FACTS:
        value = values.get(name)
        if (isinstance(value, str) and len(value) <= MAX_FACT_CHARS) or is_number(value):
            facts[name] = value
    return facts


def kinds_of(values: Mapping[str, object]) -> tuple[EntryReport, ...]:
    """What the entries are that are no tensors."""
    return tuple(
        EntryReport(name, kind_of(value)) for name, value in values.items() if not isinstance(value, TensorEntry)
    )


def kind_of(value: object) -> str:
    """What something from a pickle is, in a few words. Containers are counted, never printed: they have no end."""
    match value:
        case None | bool():
            return str(value)
        case int() | float():
            return str(value) if is_number(value) else f"a number of type {type(value).__name__}"
        case str():
            return (
                json.dumps(value, ensure_ascii=False) if len(value) <= MAX_FACT_CHARS else f"{len(value):,} characters"
            )
        case bytes():
            return f"{len(value):,} bytes"
        case Global():
            return f"the name {str(value)[:MAX_KIND_CHARS]}"
        case Record():
            function = value.function if isinstance(value.function, Global) else "something that is no name"
            return f"a call of {str(function)[:MAX_KIND_CHARS]}, not made"
        case OtherTensor():
            return str(value)
        case dict() | list() | tuple() | set() | frozenset():
            return f"{type(value).__name__} of {len(value):,}"
        case _:
            return type(value).__name__


def judged(foreign: Mapping[Global, int]) -> tuple[GlobalReport, ...]:
    """The names in a pickle that are not ordinary, the dangerous first, then the unknown."""
    reports = [GlobalReport(str(name), count, danger_of(*name)) for name, count in foreign.items()]
    return tuple(sorted(reports, key=lambda report: (_DANGERS.index(report.danger), report.name)))

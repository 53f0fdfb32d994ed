"""Finding out what a checkpoint holds from its index: no weights are read, and what is found is plain data."""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, get_args

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.storage import TensorEntry
from cogtools.checkpoint.unpickler import Global, Record
from cogtools.checkpoint.zero3 import whole_tensor
from cogtools.dangers import danger_of
from cogtools.errors import OptionError
from cogtools.inspection.lora import Lora, describe_lora, find_lora, hidden_size_of
from cogtools.inspection.report import (
    CheckpointReport,
    DTypeReport,
    EntryReport,
    FileReport,
    GlobalReport,
    IterationReport,
    LoraReport,
    ModelReport,
    SecondCopy,
    SectionReport,
    TensorReport,
)
from cogtools.inspection.sections import SECTIONS, section_of
from cogtools.layouts import diffusers, sat
from cogtools.numbers import is_number
from cogtools.options import Sort

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from cogtools.checkpoint.folder import Run
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.storage import Storage
    from cogtools.layouts.cogvideox import Transformer

TRAINER_FACTS = (
    *("iteration", "global_steps", "global_samples", "skipped_steps"),
    *("ds_version", "dp_world_size", "mp_world_size"),
)
"""What DeepSpeed and SAT write beside the weights, and people ask for."""

MAX_FACT_CHARS = 100
"""The longest text that is taken for a fact."""

MAX_KIND_CHARS = 200
"""The longest name of a call or class that is told of an entry that is no tensor."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors to list, and how.

    Attributes:
        keys: globs, or plain parts of a key; a tensor is listed if one fits. () lists all.
        lora: list the LoRA only.
        section: list this section only.
        sort: by key (sections in their order, layers by number), by size or offset in the file.
        limit: how many at most.
        offsets: tell where in the file each begins, which takes a read for each storage.
        statistics: read them all and compute what their elements are like.
    """

    keys: tuple[str, ...] = ()
    lora: bool = False
    section: str | None = None
    sort: Sort = "key"
    limit: int | None = None
    offsets: bool = False
    statistics: bool = False


def inspect_checkpoint(
    path: str | os.PathLike[str],
    selection: Selection | None = None,
    *,
    iteration: int | None = None,
    ema: bool = False,
    updates: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointReport:
    """Find out what a checkpoint holds.

    Args:
        path: the checkpoint.
        selection: which tensors to list; None lists all.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        updates: compute how strongly a LoRA changes each module. Its weights are read.
        progress: called with the bytes read so far and the bytes in all, where weights are read.

    Raises:
        CheckpointError: if it cannot be read.
        OptionError: if the selection makes no sense.
    """
    selection = selection or Selection()
    _check(selection)
    with open_checkpoint(path, iteration=iteration, ema=ema) as checkpoint:
        return describe(checkpoint, selection, updates=updates, progress=progress)


def describe(
    checkpoint: Checkpoint,
    selection: Selection,
    *,
    updates: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointReport:
    """What an open checkpoint holds; arguments as for `inspect_checkpoint`."""
    tensors = _list_tensors(checkpoint)
    selected = _sorted([tensor for tensor in tensors if _fits(tensor.report, selection)], selection.sort)
    listed = selected[: selection.limit]
    if selection.offsets:
        for tensor in listed:
            tensor.report.file, tensor.report.offset_bytes = _place(tensor.entry)
    if selection.statistics:
        _add_statistics(listed, progress)
    lora = find_lora(checkpoint)
    model = _model(checkpoint, lora)
    dtypes = _dtypes(checkpoint.tensors.values())
    return CheckpointReport(
        checkpoint=checkpoint.path,
        format=checkpoint.format,
        size_bytes=checkpoint.size_bytes,
        files=tuple(_files(checkpoint)),
        iterations=_iterations(checkpoint.run),
        wrapper=".".join(checkpoint.wrapper),
        state_dict_tensors=len(checkpoint.tensors),
        beside_tensors=len(checkpoint.beside),
        parameters=sum(dtype.parameters for dtype in dtypes),
        stored_bytes=sum(storage.size_bytes for storage in _distinct_storages(tensors)),
        dtypes=dtypes,
        sections=_sections(tensors),
        second_copy=_second_copy(checkpoint),
        trainer=_trainer_facts({**checkpoint.not_tensors, **checkpoint.values}),
        entries=_kinds(checkpoint.values),
        not_tensors=_kinds(checkpoint.not_tensors),
        globals=_judged(checkpoint.foreign),
        metadata=checkpoint.metadata,
        model=None if model is None else _model_report(model),
        lora=None if lora is None else _lora_report(checkpoint, lora, model, updates=updates, progress=progress),
        tensors=tuple(tensor.report for tensor in listed),
        selected=len(selected),
    )


# The tensors


class _Listed(NamedTuple):
    """A tensor of the checkpoint, and what is told of it."""

    entry: TensorEntry
    report: TensorReport


def _list_tensors(checkpoint: Checkpoint) -> list[_Listed]:
    """Every tensor, in the order of the file: those of the state dict, then those beside it."""
    numbers: dict[int, int] = {}
    listed = []
    for tensors in (checkpoint.tensors, checkpoint.beside):
        for key, entry in tensors.items():
            report = TensorReport(
                key=key,
                section=section_of(key),
                dtype=entry.dtype.name,
                shape=entry.shape,
                stride=entry.stride,
                size_bytes=entry.size_bytes,
                storage=numbers.setdefault(id(entry.storage), len(numbers)),
                storage_offset=entry.storage_offset,
                in_state_dict=tensors is checkpoint.tensors,
            )
            listed.append(_Listed(entry, report))
    return listed


def _judged(foreign: Mapping[Global, int]) -> tuple[GlobalReport, ...]:
    """Every name that is not ordinary, the dangerous first, then the unknown."""
    order = ("dangerous", "unknown", "harmless")
    reports = [GlobalReport(str(name), count, danger_of(*name)) for name, count in foreign.items()]
    return tuple(sorted(reports, key=lambda report: (order.index(report.danger), report.name)))


def _check(selection: Selection) -> None:
    if selection.sort not in get_args(Sort):
        raise OptionError(
            "there is no such order", found=f"--sort {selection.sort}", expected=", ".join(get_args(Sort))
        )
    if selection.section is not None and selection.section not in SECTIONS:
        raise OptionError(
            "there is no such section", found=f"--section {selection.section}", expected=", ".join(SECTIONS)
        )
    if selection.limit is not None and selection.limit < 0:
        raise OptionError("--limit is a number of tensors", found=str(selection.limit), expected="0 or more")


def _fits(tensor: TensorReport, selection: Selection) -> bool:
    if selection.section not in (None, tensor.section) or (selection.lora and tensor.section != "lora"):
        return False
    return not selection.keys or any(matches(tensor.key, pattern) for pattern in selection.keys)


def matches(key: str, pattern: str) -> bool:
    """Whether a key fits a glob (*, ?, [...]), as a whole, or has a pattern that is no glob in it."""
    if _GLOB.isdisjoint(pattern):
        return pattern in key
    return fnmatch.fnmatchcase(key, pattern)


_GLOB = frozenset("*?[")


def _sorted(tensors: list[_Listed], sort: Sort) -> list[_Listed]:
    if sort == "size":
        return sorted(tensors, key=lambda tensor: -tensor.report.size_bytes)
    if sort == "offset":
        return sorted(tensors, key=lambda tensor: _place(tensor.entry))
    return sorted(tensors, key=lambda tensor: (SECTIONS.index(tensor.report.section), natural(tensor.report.key)))


def natural(key: str) -> list[str | int]:
    """A sort key by which layers.2 comes before layers.10."""
    parts: list[str | int] = list(_DIGITS.split(key))
    parts[1::2] = [int(part) for part in parts[1::2] if isinstance(part, str)]
    return parts


_DIGITS = re.compile(r"([0-9]{1,18})")


def _place(entry: TensorEntry) -> tuple[Path, int]:
    """The file in which a tensor's first element lies, and where in it or, if it is deflated, in its unpacked copy."""
    file, start, _ = entry.storage.range()
    return file.path, start + entry.offset_bytes


def _add_statistics(listed: list[_Listed], progress: Callable[[int, int], None] | None) -> None:
    from cogtools.inspection.statistics import tensor_statistics

    done, in_all = 0, sum(tensor.report.size_bytes for tensor in listed)
    for tensor in listed:
        tensor.report.statistics = tensor_statistics(tensor.entry)
        done += tensor.report.size_bytes
        if progress is not None:
            progress(done, in_all)


# What they add up to


def _distinct_storages(tensors: list[_Listed]) -> list[Storage]:
    return list({id(tensor.entry.storage): tensor.entry.storage for tensor in tensors}.values())


def _distinct_views(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Tensors without those that are the same view of the same storage again, as tied weights are."""
    views = {(id(entry.storage), entry.storage_offset, entry.shape, entry.stride): entry for entry in entries}
    return list(views.values())


def _dtypes(entries: Collection[TensorEntry]) -> tuple[DTypeReport, ...]:
    counts = Counter(entry.dtype.name for entry in entries)
    parameters: Counter[str] = Counter()
    size_bytes: Counter[str] = Counter()
    for entry in _distinct_views(entries):
        parameters[entry.dtype.name] += entry.numel
        size_bytes[entry.dtype.name] += entry.size_bytes
    reports = [DTypeReport(name, count, parameters[name], size_bytes[name]) for name, count in counts.items()]
    return tuple(sorted(reports, key=lambda report: -report.size_bytes))


def _sections(tensors: list[_Listed]) -> tuple[SectionReport, ...]:
    """The sections that are there. A storage that several sections share counts in the first of them."""
    by_section: dict[str, list[_Listed]] = defaultdict(list)
    for tensor in tensors:
        by_section[tensor.report.section].append(tensor)
    seen: set[int] = set()
    reports = []
    for section in filter(by_section.__contains__, SECTIONS):
        members = by_section[section]
        views = _distinct_views(tensor.entry for tensor in members)
        own = [storage for storage in _distinct_storages(members) if id(storage) not in seen]
        seen.update(map(id, own))
        reports.append(
            SectionReport(
                section=section,
                tensors=len(members),
                parameters=sum(view.numel for view in views),
                size_bytes=sum(view.size_bytes for view in views),
                stored_bytes=sum(storage.size_bytes for storage in own),
            )
        )
    return tuple(reports)


def _second_copy(checkpoint: Checkpoint) -> SecondCopy | None:
    """What lies beside the state dict under a key of it, alike, and in a storage of its own.

    Where the file records CRC-32s, only storages with the same one are copies.
    """
    known = {id(entry.storage) for entry in checkpoint.tensors.values()}
    copies: dict[int, Storage] = {}
    tensors = 0
    for path, entry in checkpoint.beside.items():
        _, _, key = path.partition(".")
        first = checkpoint.tensors.get(key)
        if first is None or id(entry.storage) in known:
            continue
        if _alike(first, entry):
            tensors += 1
            copies[id(entry.storage)] = entry.storage
    if not copies:
        return None
    checked = all(storage.crc32 is not None for storage in copies.values())
    return SecondCopy(tensors, sum(storage.size_bytes for storage in copies.values()), checked)


def _alike(first: TensorEntry, second: TensorEntry) -> bool:
    same_view = (first.dtype, first.shape, first.stride, first.storage_offset) == (
        *(second.dtype, second.shape, second.stride, second.storage_offset),
    )
    return same_view and (first.storage.size_bytes, first.storage.crc32) == (
        *(second.storage.size_bytes, second.storage.crc32),
    )


# What it is


def _files(checkpoint: Checkpoint) -> Iterator[FileReport]:
    for part in checkpoint.parts.values():
        if part.parts:
            yield from _files(part)
        else:
            yield FileReport(part.path, part.format, part.size_bytes, len(part.tensors))


def _iterations(run: Run | None) -> tuple[IterationReport, ...]:
    if run is None:
        return ()
    return tuple(
        IterationReport(item.folder.name, item.ema, item.folder.name == run.latest, item == run.chosen)
        for item in run.iterations
    )


def _trainer_facts(values: Mapping[str, object]) -> dict[str, int | float | str]:
    facts: dict[str, int | float | str] = {}
    for name in TRAINER_FACTS:
        value = values.get(name)
        if (isinstance(value, str) and len(value) <= MAX_FACT_CHARS) or is_number(value):
            facts[name] = value
    return facts


def _kinds(values: Mapping[str, object]) -> tuple[EntryReport, ...]:
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
        case dict() | list() | tuple() | set() | frozenset():
            return f"{type(value).__name__} of {len(value):,}"
        case _:
            return type(value).__name__


def _model(checkpoint: Checkpoint, lora: Lora | None) -> Transformer | None:
    """The transformer that the base weights are, else the one that the LoRA fits."""
    shapes = {key: whole_tensor(entry).shape for key, entry in checkpoint.tensors.items()}
    known = diffusers.recognise_transformer(shapes)
    hidden = sat.hidden_size(shapes) or (hidden_size_of(lora) if lora is not None else None)
    return known or (sat.recognise_transformer(shapes, hidden) if hidden else None)


def _model_report(model: Transformer) -> ModelReport:
    return ModelReport(model.name, tuple(one.slug for one in model.models), model.layers, model.hidden)


def _lora_report(
    checkpoint: Checkpoint,
    lora: Lora,
    model: Transformer | None,
    *,
    updates: bool,
    progress: Callable[[int, int], None] | None,
) -> LoraReport:
    report = describe_lora(checkpoint, lora, model)
    if not updates:
        return report
    from cogtools.inspection.updates import lora_updates

    return replace(report, updates=lora_updates(lora.tensors, report.scaling or 1.0, progress))

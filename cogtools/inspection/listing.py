"""The tensors of a checkpoint as `inspect` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.inspection.report import TensorReport
from cogtools.inspection.sections import OTHER, SECTIONS, section_beside, section_of
from cogtools.inspection.selection import Selection, natural
from cogtools.layouts.lora import lora_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.tensors import TensorEntry


class Listed(NamedTuple):
    """A tensor of the checkpoint, and what is reported of it."""

    entry: TensorEntry
    report: TensorReport


def list_tensors(checkpoint: Checkpoint) -> list[Listed]:
    """Every tensor, in the order of the file: those of the state dict, then those beside it."""
    numbers: dict[int, int] = {}
    listed = []
    of_loras = set(lora_keys(checkpoint.tensors))
    for tensors in (checkpoint.tensors, checkpoint.beside):
        for key, entry in tensors.items():
            place = checkpoint.places.get(key) if tensors is checkpoint.beside else None
            section = section_of(key) if place is None else section_beside(*place)
            report = TensorReport(
                key=key,
                section="lora" if section == OTHER and key in of_loras else section,
                dtype=entry.dtype.name,
                shape=entry.shape,
                stride=entry.stride,
                size_bytes=entry.size_bytes,
                storage=numbers.setdefault(id(entry.storage), len(numbers)),
                storage_offset=entry.storage_offset,
                in_state_dict=tensors is checkpoint.tensors,
                container="" if place is None else place.container,
            )
            listed.append(Listed(entry, report))
    return listed


def select(tensors: list[Listed], selection: Selection) -> list[Listed]:
    """Those of the tensors that are asked for, in the order that is asked for; the limit is not applied."""
    selected = [tensor for tensor in tensors if selection.includes(tensor.report)]
    if selection.sort == "size":
        return sorted(selected, key=lambda tensor: -tensor.report.size_bytes)
    if selection.sort == "offset":
        return sorted(selected, key=lambda tensor: _place_in_file(tensor.entry))
    return sorted(selected, key=lambda tensor: (SECTIONS.index(tensor.report.section), natural(tensor.report.key)))


def add_offsets(tensors: list[Listed]) -> None:
    """Say of each tensor where in the file it begins."""
    for tensor in tensors:
        tensor.report.file, tensor.report.offset_bytes = _place_in_file(tensor.entry)


def add_statistics(tensors: list[Listed], progress: Callable[[int, int], None] | None) -> None:
    """Read the tensors, and say of each what its elements are like."""
    from cogtools.inspection.statistics import tensor_statistics

    done, in_all = 0, sum(tensor.report.size_bytes for tensor in tensors)
    for tensor in tensors:
        tensor.report.statistics = tensor_statistics(tensor.entry)
        done += tensor.report.size_bytes
        if progress is not None:
            progress(done, in_all)


def _place_in_file(entry: TensorEntry) -> tuple[AnyPath, int]:
    """The file in which a tensor's first element lies, and where in it or, if it is deflated, in its unpacked copy."""
    file, start, _ = entry.storage.range()
    return file.path, start + entry.offset_bytes

"""What the tensors of a checkpoint add up to: by dtype, by section, by storage, and what is stored twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from cogtools.inspection.report import DTypeReport, SecondCopy, SectionReport
from cogtools.inspection.sections import SECTIONS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import Storage, TensorEntry
    from cogtools.inspection.listing import Listed


def stored_bytes(entries: Iterable[TensorEntry]) -> int:
    """The bytes of the storages that tensors view."""
    return sum(storage.size_bytes for storage in _distinct_storages(entries))


def unviewed_bytes(entries: Iterable[TensorEntry]) -> int:
    """The bytes of these storages that lie outside of every tensor, from its first element to its last."""
    views: dict[int, list[TensorEntry]] = defaultdict(list)
    for entry in entries:
        views[id(entry.storage)].append(entry)
    return sum(members[0].storage.size_bytes - _viewed_bytes(members) for members in views.values())


def _viewed_bytes(entries: list[TensorEntry]) -> int:
    """How many bytes of their one storage tensors view, each byte counted once."""
    viewed = reached = 0
    for start, end in sorted((entry.offset_bytes, entry.offset_bytes + entry.span_bytes) for entry in entries):
        viewed += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return viewed


def _distinct_storages(entries: Iterable[TensorEntry]) -> list[Storage]:
    return list({id(entry.storage): entry.storage for entry in entries}.values())


def _distinct_views(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Tensors without those that are the same view of the same storage again, as tied weights are."""
    views = {(id(entry.storage), entry.storage_offset, entry.shape, entry.stride): entry for entry in entries}
    return list(views.values())


def dtype_totals(entries: Collection[TensorEntry]) -> tuple[DTypeReport, ...]:
    """The tensors by dtype, the largest first."""
    counts = Counter(entry.dtype.name for entry in entries)
    parameters: Counter[str] = Counter()
    size_bytes: Counter[str] = Counter()
    for entry in _distinct_views(entries):
        parameters[entry.dtype.name] += entry.numel
        size_bytes[entry.dtype.name] += entry.size_bytes
    reports = [DTypeReport(name, count, parameters[name], size_bytes[name]) for name, count in counts.items()]
    return tuple(sorted(reports, key=lambda report: -report.size_bytes))


def section_totals(tensors: Sequence[Listed]) -> tuple[SectionReport, ...]:
    """The sections that are there. A storage that several sections share counts in the first of them."""
    by_section: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry, report in tensors:
        by_section[report.section].append(entry)
    seen: set[int] = set()
    reports = []
    for section in filter(by_section.__contains__, SECTIONS):
        members = by_section[section]
        views = _distinct_views(members)
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


def second_copy(checkpoint: Checkpoint) -> SecondCopy | None:
    """What lies beside the state dict under a key of it, with its dtype and shape, in a storage of its own.

    Where the file records CRC-32s and both storages are laid out alike, only equal ones are copies. One that the
    state dict views in parts and the copy as a whole, as clones of the trainer's flat LoRA storage are, cannot be
    compared without reading it.
    """
    known = {id(entry.storage) for entry in checkpoint.tensors.values()}
    copies = []
    checked = 0
    for path, place in checkpoint.places.items():
        first, entry = checkpoint.tensors.get(place.key), checkpoint.beside[path]
        if first is None or id(entry.storage) in known or (first.dtype, first.shape) != (entry.dtype, entry.shape):
            continue
        has_same_bytes = _has_same_bytes(first, entry)
        if has_same_bytes is not False:
            copies.append(entry)
            checked += has_same_bytes is True
    return SecondCopy(len(copies), stored_bytes(copies), checked) if copies else None


def _has_same_bytes(first: TensorEntry, second: TensorEntry) -> bool | None:
    """Whether the storages of two tensors hold the same, by their CRC-32s; None if that cannot be known."""
    layouts = [(entry.stride, entry.storage_offset, entry.storage.size_bytes) for entry in (first, second)]
    checksums = [entry.storage.crc32 for entry in (first, second)]
    return None if layouts[0] != layouts[1] or None in checksums else checksums[0] == checksums[1]

"""Who loads a LoRA file, and how strong, in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.formatting import number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cogtools.conversion.readers import Reader


def reader_lines(readers: Sequence[Reader]) -> Iterator[tuple[str, str]]:
    """A label and a text: a line for each program that loads the file, one for those that do not for the same reason.

    What a program is known to do wrong with a file stands behind its line.
    """
    label = "loaded by"
    for reader in readers:
        if reader.loads != "no":
            yield label, f"{reader.program}: {'; '.join([reader.why, _strength(reader), *reader.notes])}"
            label = ""
    label = "not by"
    alike: dict[str, list[str]] = {}
    for reader in readers:
        if reader.loads == "no":
            notes = f" ({'; '.join(reader.notes)})" if reader.notes else ""
            alike.setdefault(reader.why, []).append(f"{reader.program}{notes}")
    for why, programs in alike.items():
        yield label, f"{', '.join(programs)}: {why}"
        label = ""


def _strength(reader: Reader) -> str:
    """How strong the LoRA is in a program, and how strong that is beside the training."""
    scaling = ", ".join(map(number, reader.scalings)) or "unknown"
    if reader.ratio is None:
        return f"scaling {scaling}"
    if reader.ratio == 1.0:
        return f"scaling {scaling}, as trained"
    if reader.ratio > 1.0:
        return f"scaling {scaling}, {number(reader.ratio)} times as strong as trained"
    return f"scaling {scaling}, {number(1 / reader.ratio)} times as weak as trained"

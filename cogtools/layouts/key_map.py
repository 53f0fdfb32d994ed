"""What a map of keys says: for each key of the target's layout, which rows of which source make it up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Run(NamedTuple):
    """Rows of a source: run `number`, from 0 on, of `of` runs of the same length."""

    key: str
    number: int = 0
    of: int = 1


class Mapped(NamedTuple):
    """What keys become in the other layout.

    Attributes:
        targets: for each key of the other layout, in its order, the runs of rows that make it up.
        dropped: the keys that are left out, and why.
        unknown: the keys that the map does not have.
        incomplete: the keys that would be made, were all that they are made of there: the names that are missing.
        twice: keys of which another one is there already, for the same tensor.
    """

    targets: dict[str, tuple[Run, ...]]
    dropped: dict[str, str]
    unknown: tuple[str, ...] = ()
    incomplete: Mapping[str, tuple[str, ...]] = {}
    twice: tuple[str, ...] = ()

    def without(self, target: str, reason: str) -> Mapped:
        """The same, with what would become this target left out."""
        targets = {key: runs for key, runs in self.targets.items() if key != target}
        return self._replace(
            targets=targets, dropped=self.dropped | {run.key: reason for run in self.targets.get(target, ())}
        )


class NamedTensor(NamedTuple):
    """A tensor that two layouts have alike, but for its name.

    Attributes:
        diffusers: its key in diffusers (or transformers).
        sat: its key in SAT.
        shape: its shape in both.
    """

    diffusers: str
    sat: str
    shape: tuple[int, ...]


def renamed(keys: Mapping[str, str], tensors: list[NamedTensor], dropped: Mapping[str, str]) -> Mapped:
    """Map keys of SAT's to the names that a list of tensors has for them, in the order of the list.

    Args:
        keys: the keys, and what they are called without what stands before them.
        tensors: what there should be.
        dropped: the keys among them that are left out, and why.
    """
    keys_of: dict[str, str] = {}
    twice = []
    for key, name in keys.items():
        if key in dropped:
            continue
        if name in keys_of:
            twice.append(key)
        else:
            keys_of[name] = key
    targets: dict[str, tuple[Run, ...]] = {}
    for item in tensors:
        if item.sat in keys_of:
            targets[item.diffusers] = (Run(keys_of.pop(item.sat)),)
    return Mapped(targets, dict(dropped), tuple(keys_of.values()), {}, tuple(twice))

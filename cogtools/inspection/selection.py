"""Which tensors `inspect` lists, and in which order."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from cogtools.errors import OptionError
from cogtools.inspection.sections import SECTIONS

if TYPE_CHECKING:
    from cogtools.inspection.report import TensorReport

Sort = Literal["key", "size", "offset"]
"""The order in which `inspect` lists tensors."""

_GLOB = frozenset("*?[")
_DIGITS = re.compile(r"([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors to list, and how.

    Attributes:
        keys: globs, or plain parts of a key; a tensor is listed if one matches. () lists all.
        lora: list the LoRA only.
        section: list this section only.
        sort: by key (sections in their order, layers by number), by size or offset in the file.
        limit: how many at most.
        offsets: say where in the file each begins, which takes a read for each storage.
        statistics: read the tensors and compute what their elements are like, and how strong a LoRA's updates are.
        tree: fold equal layers, which have no offset and no statistics of their own: those of a LoRA's updates only.
    """

    keys: tuple[str, ...] = ()
    lora: bool = False
    section: str | None = None
    sort: Sort = "key"
    limit: int | None = None
    offsets: bool = False
    statistics: bool = False
    tree: bool = False

    def check(self) -> None:
        """Raise if it makes no sense.

        Raises:
            OptionError: if it does not.
        """
        _check_choice("order", "--sort", self.sort, get_args(Sort))
        _check_choice("section", "--section", self.section, SECTIONS)
        if self.limit is not None and self.limit < 0:
            raise OptionError("--limit is a number of tensors", found=str(self.limit), expected="0 or more")
        if self.tree:
            self._check_tree()

    def _check_tree(self) -> None:
        """Raise if an option asks for what a tree does not show: one tensor's offset, an order, some of a layer."""
        for option, is_given in (
            ("--offsets", self.offsets),
            ("--limit", self.limit is not None),
            ("--sort", self.sort != "key"),
        ):
            if is_given:
                raise OptionError(
                    f"{option} does not go with --tree, which folds all the tensors of equal layers into one line",
                    hint=f"leave out --tree to use {option}, or choose tensors with --keys, --lora or --section",
                )

    def includes(self, tensor: TensorReport) -> bool:
        """Whether a tensor is to be listed, unless there are more than `limit`."""
        if self.section not in (None, tensor.section) or (self.lora and tensor.section != "lora"):
            return False
        return not self.keys or any(matches(tensor.key, pattern) for pattern in self.keys)


def _check_choice(what: str, option: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise OptionError(f"there is no such {what}", found=f"{option} {value}", expected=", ".join(choices))


def matches(key: str, pattern: str) -> bool:
    """Whether a glob (*, ?, [...]) matches a key as a whole, or a pattern that is no glob is a part of it."""
    if _GLOB.isdisjoint(pattern):
        return pattern in key
    return fnmatch.fnmatchcase(key, pattern)


def natural(key: str) -> list[str | int]:
    """A sort key by which layers.2 comes before layers.10."""
    parts: list[str | int] = list(_DIGITS.split(key))
    parts[1::2] = [int(part) for part in parts[1::2] if isinstance(part, str)]
    return parts

"""What an output is to be held against, as it was given."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from cogtools.checkpoint.paths import RemotePath, as_path
from cogtools.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cogtools.checkpoint.paths import AnyPath

    Given = str | PathLike[str] | RemotePath


def given_paths(against: Given | Sequence[Given] | None, iteration: int | None, *, ema: bool) -> list[AnyPath]:
    """The checkpoints as paths; [] if there are none.

    Raises:
        OptionError: if there are none, and `iteration` or `ema` says which of their weights are meant.
    """
    if against is None and (iteration is not None or ema):
        raise OptionError(
            "--iteration and --ema say which weights of a checkpoint are meant, and there is none",
            hint="give the checkpoint with --against",
        )
    if against is None:
        return []
    if isinstance(against, (str, PathLike, RemotePath)):
        return [as_path(against)]
    return list(map(as_path, against))

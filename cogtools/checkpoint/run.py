"""A training's save folder: its iterations, and which of them was opened.

1000/, 1000-ema/                   SAT's trainer
global_step500/, checkpoint-500/   DeepSpeed; accelerate, Transformers and diffusers' training scripts
any other folder                   if the file `latest` names it, as DeepSpeed's tags may be anything
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.files import is_file, is_folder, list_folder, read_small_file
from cogtools.checkpoint.limits import MAX_LATEST_BYTES
from cogtools.checkpoint.names import EMA_SUFFIX, LATEST
from cogtools.checkpoint.paths import real_path
from cogtools.checkpoint.weights import has_library_file, has_weights
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import AnyPath

_STARTS = ("global_step", "checkpoint-", "step-", "iter_")
_ITERATION = re.compile(rf"(?P<before>{'|'.join(_STARTS)})?(?P<number>[0-9]{{1,12}})(?P<ema>{EMA_SUFFIX})?")


class Iteration(NamedTuple):
    """The folder of one iteration in a save folder.

    Attributes:
        number: which iteration, as the folder's name says; None if `latest` names a folder without a number.
        ema: whether it has the EMA weights.
        folder: where it is.
    """

    number: int | None
    ema: bool
    folder: AnyPath

    def __str__(self) -> str:
        return self.folder.name


def iteration_of(folder: AnyPath) -> Iteration | None:
    """The iteration that a folder is called like; None if it is not called like one."""
    match = _ITERATION.fullmatch(folder.name)
    return Iteration(int(match["number"]), match["ema"] is not None, folder) if match else None


@dataclass(frozen=True, slots=True)
class SaveFolder:
    """What is in a save folder, listed once.

    Attributes:
        folder: where it is.
        iterations: all that have weights, by number, those with EMA weights after those without; () if it is another
            kind of folder.
        without_weights: the other folders that are called like one, or that `latest` names.
    """

    folder: AnyPath
    iterations: tuple[Iteration, ...]
    without_weights: tuple[Iteration, ...] = ()

    def named(self, name: str) -> Iteration | None:
        """The iteration of that name, with weights or without."""
        return next((item for item in (*self.iterations, *self.without_weights) if item.folder.name == name), None)

    def nearest(self, number: int | None) -> Iteration | None:
        """The plain weights whose number is the nearest, of two the earlier; None if there are none."""
        if number is None:
            return None
        numbers = {item.number: item for item in self.iterations if item.number is not None and not item.ema}
        return numbers[min(numbers, key=lambda other: (abs(other - number), other))] if numbers else None


@dataclass(frozen=True, slots=True)
class Run:
    """A save folder, and which of its iterations was opened. What else is in it is looked up when it is asked for.

    Attributes:
        folder: the save folder.
        chosen: the iteration that was opened.
    """

    folder: AnyPath
    chosen: Iteration

    @property
    def iterations(self) -> tuple[Iteration, ...]:
        """All there are, by number, those with EMA weights after those without: this lists the save folder."""
        try:
            return read_save_folder(self.folder).iterations
        except CheckpointError:  # it may not be listed: the one that was opened is there
            return (self.chosen,)

    @property
    def latest(self) -> str | None:
        """What its file `latest` says; None if there is none, or it cannot be read."""
        return _latest_or_none(self.folder)

    @property
    def twin(self) -> Iteration | None:
        """The same iteration with EMA weights, if the chosen one is without, and the other way round."""
        name, ema = self.chosen.folder.name, self.chosen.ema
        folder = self.folder / (name.removesuffix(EMA_SUFFIX) if ema else name + EMA_SUFFIX)
        try:
            found = self.chosen.number is not None and is_folder(folder) and has_weights(list_folder(folder))
        except CheckpointError:
            return None
        return Iteration(self.chosen.number, not ema, folder) if found else None


def find_run(file: AnyPath) -> Run | None:
    """The save folder that a checkpoint lies in, in the folder of an iteration; None if it does not.

    A link's own place counts first, then that of what it leads to. No other iteration is looked at.
    """
    for path in dict.fromkeys((file.absolute(), real_path(file))):
        folder = path if is_folder(path) else path.parent  # shards without an index: their folder stands for them
        chosen = iteration_of(folder) or _named_by(_latest_or_none(folder.parent), folder)
        if chosen is not None:
            return Run(folder.parent, chosen)
    return None


def read_save_folder(folder: AnyPath) -> SaveFolder:
    """List the iterations in a folder, once.

    Folders that are not called by their number only are taken for iterations where no library's file of weights lies
    beside them: that is what a training leaves at its end, and they are what came before.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    entries = list_folder(folder)
    may_be_called_anything = not has_library_file(entries)
    latest = _latest_or_none(folder)
    found = []
    for path in (entry.path for entry in entries if entry.is_folder):
        item = iteration_of(path) or _named_by(latest, path)
        if item is not None and (may_be_called_anything or is_trainers_name(path.name)):
            found.append(item)
    found.sort(key=lambda item: (item.number or 0, item.ema))
    whole = {item for item in found if _is_whole(item.folder)}
    return SaveFolder(
        folder,
        tuple(item for item in found if item in whole),
        tuple(item for item in found if item not in whole),
    )


def names_of_iteration(number: int) -> list[str]:
    """What the folder of an iteration may be called, for where it has to be asked for."""
    return [f"{start}{number}{end}" for start in ("", *_STARTS) for end in ("", EMA_SUFFIX)]


def is_trainers_name(name: str) -> bool:
    """Whether the folder of an iteration is called as SAT's trainer calls it: by its number only."""
    return name[:1].isdecimal()


def read_latest(folder: AnyPath) -> str | None:
    """What the file `latest` in a folder says; None if there is none.

    Raises:
        CheckpointError: if it cannot be read, or is too long to name a folder.
    """
    path = folder / LATEST
    if not is_file(path):
        return None
    content = read_small_file(path, MAX_LATEST_BYTES, "the file `latest` is too long to name a folder")
    return content.decode("utf-8", "backslashreplace").strip()


def _latest_or_none(folder: AnyPath) -> str | None:
    try:
        return read_latest(folder)
    except CheckpointError:
        return None


def _named_by(latest: str | None, folder: AnyPath) -> Iteration | None:
    return Iteration(None, latest.endswith(EMA_SUFFIX), folder) if latest and latest == folder.name else None


def _is_whole(folder: AnyPath) -> bool:
    """Whether a folder has weights in it, or a folder with weights that its own `latest` names."""
    try:
        if has_weights(list_folder(folder)):
            return True
        latest = read_latest(folder)
        inner = folder / latest if latest and Path(latest).name == latest else None
        return inner is not None and is_folder(inner) and has_weights(list_folder(inner))
    except CheckpointError:
        return False

"""Which file of a folder holds the weights, where there is one checkpoint in it; and why none does.

Nothing is guessed: if several files could be meant, the error lists them.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from cogtools.checkpoint.files import list_folder, size_of
from cogtools.checkpoint.formats.signatures import looks_like_checkpoint
from cogtools.checkpoint.names import (
    LIBRARY_FILES,
    PIPELINE_INDEX,
    SHARD_INDEX_SUFFIXES,
    TRAINER_FILES,
    ShardName,
    is_companion,
    is_weights_name,
    rank_of,
    shard_name,
    spread_over,
)
from cogtools.checkpoint.shards import kind_of_index
from cogtools.errors import SHOWN_PROBLEMS, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.files import FolderEntry
    from cogtools.checkpoint.names import Spread
    from cogtools.checkpoint.paths import AnyPath

_MOST_SNIFFED = 16
"""How many files of a folder are opened at most to see what they are, where no name tells."""


def find_weights(folder: AnyPath) -> AnyPath | None:
    """The file that a folder stands for; None if there are no weights in it.

    It is a file of weights, an index of shards, or a pipeline's model_index.json. Where shards have no index, the
    folder stands for all of them, and is returned itself.

    Raises:
        CheckpointError: if it could be one of several, or is a part of a checkpoint, or no file can be used alone.
    """
    files = {entry.path.name: entry.path for entry in list_folder(folder) if entry.is_file}
    spread = spread_over(files)
    indices = [name for name in files if name.endswith(SHARD_INDEX_SUFFIXES)]
    # DeepSpeed saves a file of its usual name beside those of the layers too, without weights.
    for name in (PIPELINE_INDEX, *(() if spread else TRAINER_FILES), *LIBRARY_FILES, *indices):
        if name in files:
            return files[name]
    if spread is not None:
        raise spread_error(folder, *spread)
    _refuse_ranks(folder, files)
    weights = [name for name in files if is_weights_name(name)]
    shards = [shard for name in weights if (shard := shard_name(name)) is not None]
    if shards or len(weights) != 1:
        documents = [file for name, file in files.items() if name.endswith(".json")][:_MOST_SNIFFED]
        weights = [file.name for file in documents if kind_of_index(file)] or weights
    if shards and len(shards) == len(weights) and not weights[0].endswith(".json"):
        _refuse_incomplete(folder, shards)
        return folder
    if not weights:
        others = [file for name, file in files.items() if not is_companion(name)]
        weights = sorted(file.name for file in _look_like_checkpoints(others, most=_MOST_SNIFFED))
    if len(weights) > 1:
        raise CheckpointError(
            "this folder holds several checkpoints", file=folder, found=listed(weights), hint="give one of them"
        )
    return files[weights[0]] if weights else None


def has_library_file(entries: Iterable[FolderEntry]) -> bool:
    """Whether there is a file among these under a name that libraries look for."""
    names = {entry.path.name for entry in entries if entry.is_file}
    return not names.isdisjoint((PIPELINE_INDEX, *LIBRARY_FILES))


def has_weights(entries: Iterable[FolderEntry]) -> bool:
    """Whether a folder that has these in it may hold weights that can be read. No file with a usual name is opened."""
    files = [entry.path for entry in entries if entry.is_file]
    spread = spread_over(file.name for file in files)
    if spread is not None:
        return any(file.name in LIBRARY_FILES for file in files)
    files = [file for file in files if not is_companion(file.name)]
    return any(is_weights_name(file.name) for file in files) or any(_look_like_checkpoints(files, most=1))


def what_is_there(folder: AnyPath) -> str:
    """What a folder holds that has no weights in it, in a few words."""
    entries = list_folder(folder)
    names = [entry.path.name for entry in entries]
    if not names:
        return "nothing: the folder is empty"
    spread = spread_over(entry.path.name for entry in entries if entry.is_file)
    if spread is not None:
        return f"files of which none can be used alone: {listed(spread[1])}"
    if all(map(is_companion, names)):
        return f"only what a training saves beside its weights: {listed(names)}"
    return listed(names)


def spread_error(folder: AnyPath, spread: Spread, names: list[str], file: AnyPath | None = None) -> CheckpointError:
    """The error for a checkpoint that has to be put together first."""
    return CheckpointError(
        spread.what,
        file=file or folder,
        found=listed(names),
        expected="a checkpoint whose weights lie in one file, or in shards with an index",
        hint=spread.advice(folder),
    )


def listed(names: Iterable[str]) -> str:
    """Names in a line: the first ones, and how many more there are."""
    every = list(names)
    more = len(every) - SHOWN_PROBLEMS
    return ", ".join(every[:SHOWN_PROBLEMS]) + (f" … and {more} more" if more > 0 else "")


def _refuse_ranks(folder: AnyPath, names: Iterable[str]) -> None:
    """Refuse the files of some ranks without that of rank 0: they are parts of one training, and not a choice."""
    ranks = [name for name in names if rank_of(name)]
    if ranks:
        raise CheckpointError(
            "this folder holds parts of one tensor-parallel training, and the part of rank 0 is missing",
            file=folder,
            found=listed(ranks),
            expected=f"{TRAINER_FILES[0]} beside them",
            hint="no part can be exported on its own: train with model_parallel_size 1",
        )


def _refuse_incomplete(folder: AnyPath, shards: list[ShardName]) -> None:
    """Refuse shards of several checkpoints, or of one that is not whole."""
    first = shards[0]
    if any(shard != first._replace(number=shard.number) for shard in shards):
        names = sorted({shard.other(shard.number) for shard in shards})
        raise CheckpointError(
            "this folder holds shards of several checkpoints, without an index",
            file=folder,
            found=listed(names),
            hint="move those of each checkpoint into a folder of their own",
        )
    there = {shard.number for shard in shards}
    missing = [number for number in range(1, first.of + 1) if number not in there]
    if missing:
        raise CheckpointError(
            "parts of this checkpoint are missing",
            file=folder,
            found=f"{len(there):,} of {first.of:,} parts: {listed(map(first.other, sorted(there)))}",
            expected=f"{listed(map(first.other, missing))} as well",
            hint="copy or download the missing parts",
        )


def _look_like_checkpoints(files: list[AnyPath], *, most: int) -> list[AnyPath]:
    """Those of the largest files that begin as checkpoints do."""
    sizes = [(size, file) for file in files if (size := size_of(file)) is not None]
    return [file for _, file in heapq.nlargest(most, sizes) if looks_like_checkpoint(file)]

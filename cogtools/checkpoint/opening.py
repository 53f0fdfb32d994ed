"""Opening a checkpoint: what kind of file or folder it is, told from its content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.checkpoint.files import SourceFile, is_folder
from cogtools.checkpoint.folder import find_file, find_run, pipeline_components, refuse_choice
from cogtools.checkpoint.formats.safetensors import open_safetensors
from cogtools.checkpoint.formats.signatures import FormatName, format_of, read_start, what_it_is
from cogtools.checkpoint.formats.torch_legacy import open_torch_legacy
from cogtools.checkpoint.formats.torch_zip import open_torch_zip
from cogtools.checkpoint.index import Checkpoint
from cogtools.checkpoint.shards import kind_of_index, read_shard_index
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.tensors import TensorEntry

_OPEN: dict[FormatName, Callable[[SourceFile], Checkpoint]] = {
    "zip": open_torch_zip,
    "safetensors": open_safetensors,
    "legacy": open_torch_legacy,
}


def open_checkpoint(path: str | os.PathLike[str], *, iteration: int | None = None, ema: bool = False) -> Checkpoint:
    """Index a checkpoint. Close it when done, or use it in a `with` statement.

    Args:
        path: a file, or any of the folders that `cogtools.checkpoint.folder` describes.
        iteration: which iteration of a trainer's save folder; None takes the latest.
        ema: take its EMA weights.

    Raises:
        CheckpointError: if it is missing, damaged, or no checkpoint, or could be one of several.
    """
    given = Path(path)
    if is_folder(given):
        file = find_file(given, iteration=iteration, ema=ema)
    else:
        if os.path.lexists(given):  # if not, that is what is wrong
            refuse_choice(given, iteration=iteration, ema=ema)
        file = given
    checkpoint = _open_any(file)
    checkpoint.run = find_run(file) or find_run(file.resolve())
    return checkpoint


def _open_any(path: Path) -> Checkpoint:
    return _open_pipeline(path) if kind_of_index(path) == "pipeline" else _open_weights(path)


def _open_weights(path: Path) -> Checkpoint:
    return _open_shards(path) if kind_of_index(path) == "shards" else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    file = SourceFile.open(path)
    try:
        return _index(file)
    except BaseException:
        file.close()
        raise


def _index(file: SourceFile) -> Checkpoint:
    start = read_start(file)
    found = format_of(start)
    if found is None:
        raise _no_checkpoint(file, start)
    return _OPEN[found](file)


def _open_shards(index: Path) -> Checkpoint:
    """Sharded weights as one checkpoint."""
    weight_map = read_shard_index(index)
    names = sorted(set(weight_map.values()))
    whole = _join(index, "sharded", {name: index.with_name(name) for name in names}, _open_file)
    tensors: dict[str, TensorEntry] = {}
    missing = []
    for key, name in weight_map.items():
        entry = whole.parts[name].tensors.get(key)
        if entry is None:
            missing.append(key)
        else:
            tensors[key] = entry
    if missing:
        whole.close()
        raise CheckpointError(
            "the files lack tensors that the index names",
            file=index,
            found=f"no {missing[0]} in {weight_map[missing[0]]}"
            + (f", and {len(missing) - 1:,} more" if len(missing) > 1 else ""),
            hint="copy or download the files again, all of one version",
        )
    whole.tensors = tensors
    return whole


def _open_pipeline(index: Path) -> Checkpoint:
    """The components of a diffusers pipeline as one checkpoint, keys prefixed with their names."""
    components = pipeline_components(index)
    if not components:
        raise CheckpointError("there are no weights in this pipeline", file=index.parent)
    whole = _join(index, "diffusers pipeline", components, _open_weights)
    whole.tensors = {
        f"{name}.{key}": entry for name, part in whole.parts.items() for key, entry in part.tensors.items()
    }
    return whole


def _join(path: Path, how: str, files: dict[str, Path], open_part: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Several files as one checkpoint, its tensors not yet chosen."""
    parts: dict[str, Checkpoint] = {}
    index = SourceFile.open(path)
    try:
        for name, file in files.items():
            parts[name] = open_part(file)
    except BaseException:
        index.close()
        for part in parts.values():
            part.close()
        raise
    formats = " and ".join(sorted({part.format for part in parts.values()}))
    whole = Checkpoint(path, f"{formats}, {how}" if formats else how, [], {}, parts=parts, index=index)
    for part in parts.values():
        whole.files += part.files
        for foreign, count in part.foreign.items():
            whole.foreign[foreign] = whole.foreign.get(foreign, 0) + count
    return whole


def _no_checkpoint(file: SourceFile, start: bytes) -> CheckpointError:
    expected = "a file of torch.save (.pt, .pth, .bin, .ckpt) or safetensors"
    found, hint = what_it_is(start)
    return CheckpointError("this is no checkpoint", file=file.path, found=found, expected=expected, hint=hint)

"""Opening a checkpoint: what kind of file or folder it is, told from its content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.checkpoint.folder import find_file, pipeline_components, refuse_choice
from cogtools.checkpoint.formats.safetensors import open_safetensors
from cogtools.checkpoint.formats.signatures import FormatName, format_of, read_start, what_it_is
from cogtools.checkpoint.formats.torch_legacy import open_torch_legacy
from cogtools.checkpoint.formats.torch_zip import open_torch_zip
from cogtools.checkpoint.index import Checkpoint
from cogtools.checkpoint.names import DISTRIBUTED_METADATA, is_companion, part_of, spread_over
from cogtools.checkpoint.paths import as_path
from cogtools.checkpoint.places import is_folder, is_there, list_folder, open_file
from cogtools.checkpoint.run import find_run
from cogtools.checkpoint.shards import kind_of_index, read_shard_index, shards_by_name
from cogtools.checkpoint.tensors import OtherTensor
from cogtools.checkpoint.weights import spread_error
from cogtools.errors import CheckpointError
from cogtools.formatting import counted, shown

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.paths import AnyPath, RemotePath
    from cogtools.checkpoint.tensors import TensorEntry

_OPEN: dict[FormatName, Callable[[SourceFile], Checkpoint]] = {
    "zip": open_torch_zip,
    "safetensors": open_safetensors,
    "legacy": open_torch_legacy,
}


def open_checkpoint(
    path: str | os.PathLike[str] | RemotePath, *, iteration: int | None = None, ema: bool = False
) -> Checkpoint:
    """Index a checkpoint. Close it when done, or use it in a `with` statement.

    Args:
        path: a file, or any of the folders that `cogtools.checkpoint.folder` describes; or the URL of one.
        iteration: which iteration of a trainer's save folder; None takes the latest.
        ema: take its EMA weights.

    Raises:
        CheckpointError: if it is missing, damaged, or no checkpoint, or could be one of several.
    """
    given = as_path(path)
    if is_folder(given):
        file = find_file(given, iteration=iteration, ema=ema)
    else:
        if is_there(given):  # if not, that is what is wrong
            refuse_choice(given, iteration=iteration, ema=ema)
        file = given
    checkpoint = _open_any(file)
    part = part_of(file.name)
    if part is not None:
        checkpoint.format += f", {part}"
    checkpoint.run = find_run(file)
    return checkpoint


def _open_any(path: AnyPath) -> Checkpoint:
    return _open_pipeline(path) if not is_folder(path) and kind_of_index(path) == "pipeline" else _open_weights(path)


def _open_weights(path: AnyPath) -> Checkpoint:
    if is_folder(path):
        return _open_loose_shards(path)
    return _open_shards(path) if kind_of_index(path) == "shards" else _open_file(path)


def _open_file(path: AnyPath) -> Checkpoint:
    file = open_file(path)
    try:
        return _index(file)
    except BaseException:
        file.close()
        raise


def _index(file: SourceFile) -> Checkpoint:
    _refuse_spread(file)
    start = read_start(file)
    found = format_of(start)
    if found is None:
        raise _not_a_checkpoint(file, start)
    checkpoint = _OPEN[found](file)
    _refuse_without_values(checkpoint)
    return checkpoint


def _refuse_spread(file: SourceFile) -> None:
    """Refuse a file that is not a checkpoint without others, as its name says."""
    spread = spread_over([file.name]) if part_of(file.name) is None else None
    if spread is None and file.name == DISTRIBUTED_METADATA:
        spread = spread_over(entry.path.name for entry in list_folder(file.path.parent))
    if spread is not None:
        raise spread_error(file.path.parent, *spread, file=file.path)


_PLACEHOLDER = OtherTensor(
    "an empty placeholder, as ZeRO-3 leaves it where a tensor is spread over processes",
    "gather the weights before they are saved (stage3_gather_16bit_weights_on_model_save), or put them together from "
    "DeepSpeed's own checkpoint with its script zero_to_fp32.py",
)


def _refuse_without_values(checkpoint: Checkpoint) -> None:
    """Refuse a file that has the names of its weights only, of most of them; else say of how many."""
    without: dict[OtherTensor, list[str]] = {}
    placeholders = [key for key, entry in checkpoint.tensors.items() if entry.shape == (0,)]
    if 2 * len(placeholders) > len(checkpoint.tensors):  # a single one may be what the tensor is
        without[_PLACEHOLDER] = placeholders
    others = {key: value for key, value in checkpoint.not_tensors.items() if isinstance(value, OtherTensor)}
    for key, tensor in others.items():
        if tensor.advice is not None:
            without.setdefault(tensor, []).append(key)
    count = len(checkpoint.tensors) + len(others)
    for tensor, keys in without.items():
        more = f", and {len(keys) - 1:,} more of {counted(count, 'tensor')}" if len(keys) > 1 else ""
        if 2 * len(keys) > count:
            raise CheckpointError(
                "the weights are not in this file, or not all of them",
                file=checkpoint.path,
                found=f"{tensor.kind}: {shown(keys[0])}{more}",
                hint=tensor.advice,
            )
    missing = sum(map(len, without.values()))
    if missing:
        checkpoint.format += f", {counted(missing, 'tensor')} without values"


def _open_shards(index: AnyPath) -> Checkpoint:
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


def _open_loose_shards(folder: AnyPath) -> Checkpoint:
    """Sharded weights without an index as one checkpoint."""
    files = {path.name: path for path in shards_by_name(folder)}
    whole = _join(folder, "sharded, without an index", files, _open_file)
    for name, part in whole.parts.items():
        twice = next((key for key in part.tensors if key in whole.tensors), None)
        if twice is not None:
            whole.close()
            raise CheckpointError(
                "these shards are not parts of one checkpoint",
                file=folder,
                found=f"{shown(twice)} in {name} and in another of them",
                hint="copy or download the files again, all of one version",
            )
        whole.tensors |= part.tensors
    return whole


def _open_pipeline(index: AnyPath) -> Checkpoint:
    """The components of a diffusers pipeline as one checkpoint, keys prefixed with their names."""
    components = pipeline_components(index)
    if not components:
        raise CheckpointError("there are no weights in this pipeline", file=index.parent)
    whole = _join(index, "diffusers pipeline", components, _open_weights)
    whole.tensors = {
        f"{name}.{key}": entry for name, part in whole.parts.items() for key, entry in part.tensors.items()
    }
    return whole


def _join(path: AnyPath, how: str, files: dict[str, AnyPath], open_part: Callable[[AnyPath], Checkpoint]) -> Checkpoint:
    """Several files as one checkpoint, its tensors not yet chosen."""
    parts: dict[str, Checkpoint] = {}
    index = None if is_folder(path) else open_file(path)
    try:
        for name, file in files.items():
            parts[name] = open_part(file)
    except BaseException:
        if index is not None:
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


def _not_a_checkpoint(file: SourceFile, start: bytes) -> CheckpointError:
    expected = "a file of torch.save (.pt, .pth, .bin, .ckpt) or safetensors"
    found, hint = what_it_is(start)
    if is_companion(file.name):
        hint = "a training saves this beside its weights: give the weights"
    return CheckpointError("this is not a checkpoint", file=file.path, found=found, expected=expected, hint=hint)

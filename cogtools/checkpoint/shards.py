"""Indices: JSON files that say which files make up one checkpoint.

    model.safetensors.index.json, pytorch_model.bin.index.json    {"weight_map": {key: the shard that has it}}
    model_index.json                                              {"_class_name": "…Pipeline", component: […]}

They are known by these names, and under others by what they hold. Shards lie beside their index; people rename them, or
leave the index behind, and then their names say which belong together: model-00001-of-00003.safetensors.
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from cogtools.checkpoint.formats.signatures import looks_like_safetensors
from cogtools.checkpoint.limits import MAX_INDEX_BYTES
from cogtools.checkpoint.names import PIPELINE_INDEX, SHARD_INDEX_SUFFIXES, shard_name
from cogtools.checkpoint.paths import RemotePath
from cogtools.checkpoint.places import is_file, list_folder, open_file, read_small_file
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import AnyPath

_START_BYTES = 16


def kind_of_index(path: AnyPath) -> Literal["pipeline", "shards"] | None:
    """What sort of index a file is; None if it is none."""
    if path.name == PIPELINE_INDEX:
        return "pipeline"
    if path.name.endswith(SHARD_INDEX_SUFFIXES):
        return "shards"
    try:
        content = read_index(path) if _may_be_json(path) else {}
    except CheckpointError:
        return None
    if str(content.get("_class_name")).endswith("Pipeline"):
        return "pipeline"
    return "shards" if isinstance(content.get("weight_map"), dict) else None


def _may_be_json(path: AnyPath) -> bool:
    with open_file(path) as file:
        start = file.read(0, min(file.size_bytes, _START_BYTES))
    return start.lstrip().startswith(b"{") and not looks_like_safetensors(start)


def read_shard_index(path: AnyPath) -> dict[str, str]:
    """Which file each tensor of sharded weights is in.

    Raises:
        CheckpointError: if it is not an index of shards, or names a file that is not beside it.
    """
    weight_map = read_index(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _no_index(path, "no weight_map of names and files")
    folder = path.parent.resolve()
    names = sorted(set(weight_map.values()))
    for name in names:
        _refuse_outside(path, folder, name)
    missing = [name for name in names if not is_file(path.with_name(name))]
    if missing:
        raise _missing(path, names, missing)
    return weight_map


def read_index(path: AnyPath) -> dict[str, object]:
    """What stands in an index.

    Raises:
        CheckpointError: if it is no JSON object, or too long.
    """
    content = read_small_file(path, MAX_INDEX_BYTES, "this is too long for an index of a checkpoint's files")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _no_index(path, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _no_index(path, "JSON, but not an object")
    return value


def _missing(index: AnyPath, names: list[str], missing: list[str]) -> CheckpointError:
    """The error for shards that are not beside their index: which, and under what names they are there instead."""
    renamed = _renamed(index.parent, missing[0])
    more = f", and {len(missing) - 1:,} more of {len(names):,}" if len(missing) > 1 else ""
    if renamed is not None:
        return CheckpointError(
            "the index names files that are not here; they were renamed",
            file=index,
            found=f"{renamed}, which is called {missing[0]} in the index{more}",
            hint="correct the names in the weight_map of the index, or give the files the names that it has",
        )
    return CheckpointError(
        "the index names files that are not here",
        file=index,
        found=f"no {missing[0]}{more}",
        hint="copy or download the missing files into the folder of the index",
    )


def _renamed(folder: AnyPath, name: str) -> str | None:
    """The file that has the number of this shard under another name; None if there is none, or are several."""
    wanted = shard_name(name)
    if wanted is None:
        return None
    found = []
    for entry in list_folder(folder):
        shard = shard_name(entry.path.name) if entry.is_file else None
        if shard is not None and (shard.number, shard.of) == (wanted.number, wanted.of):
            found.append(entry.path.name)
    return found[0] if len(found) == 1 else None


def shards_by_name(folder: AnyPath) -> list[AnyPath]:
    """The shards in a folder that has no index of them, by number.

    Raises:
        CheckpointError: if one is a link to another folder.
    """
    shards = [entry.path for entry in list_folder(folder) if entry.is_file and shard_name(entry.path.name)]
    for path in shards:
        if not _is_inside(path, folder.resolve()):
            raise CheckpointError(
                "this shard is a link to another folder",
                file=path,
                expected="shards that lie beside each other, or in a Hugging Face cache's blobs",
            )
    return shards


def _refuse_outside(index: AnyPath, folder: AnyPath, name: str) -> None:
    """Refuse a shard outside of the index's folder, links followed."""
    if not name or PurePath(name).name != name or "\\" in name or "\0" in name:
        raise _no_index(index, f"the file {name!r}, which is not beside it")
    if isinstance(folder, RemotePath):
        if name == "..":
            raise _no_index(index, f"the file {name!r}, which is not beside it")
        return
    try:
        is_inside = _is_inside(folder / name, folder)
    except (OSError, ValueError, RuntimeError) as error:  # half a surrogate pair; links in a circle
        raise _no_index(index, f"the file {name!r}, which is not a name that a file can have") from error
    if not is_inside:
        raise _no_index(index, f"the file {name!r}, a link to another folder")


def _is_inside(path: AnyPath, folder: AnyPath) -> bool:
    return path.resolve().parent in (folder, _blobs_of(folder))


def _blobs_of(folder: AnyPath) -> AnyPath | None:
    """Where Hugging Face's cache keeps the files of a folder: it has links to them. None for any other folder.

    The folder is `snapshots/REVISION`, or one of a pipeline's components in it; the files are in `blobs` beside
    `snapshots`.
    """
    for snapshot in (folder, folder.parent):
        if snapshot.parent.name == "snapshots":
            return snapshot.parent.with_name("blobs")
    return None


def _no_index(path: AnyPath, found: str) -> CheckpointError:
    return CheckpointError(
        "this is not an index of a checkpoint's files",
        file=path,
        found=found,
        expected="a JSON object that names the files beside it",
    )

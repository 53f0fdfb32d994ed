"""A written model, opened: a pipeline, the folders of its parts, one of them, a file, or a folder that SAT loads."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.places import is_file, is_folder, list_folder
from cogtools.checkpoint.shards import read_index
from cogtools.conversion.model import find_parts, no_model
from cogtools.conversion.part_config import read_config
from cogtools.errors import CheckpointError, CogtoolsError, Problem
from cogtools.layouts.lora import is_lora_key
from cogtools.layouts.pipeline import CONFIG, INDEX, PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.model import ModelPart
    from cogtools.layouts.pipeline import Part

Kind = Literal["pipeline", "parts", "part", "file", "sat"]
"""What a path holds: a pipeline with its index, folders of parts without one, one such folder, a file of weights, or
SAT's transformer."""

WEIGHTS = tuple(name for name, part in PARTS.items() if part.stem is not None)
"""The parts that have weights."""


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """A part of a written model.

    Attributes:
        name: its name.
        path: its folder, or its file.
        part: its tensors; None if they cannot be opened.
        config: its config.json; None if there is none, or it cannot be read.
        problems: what is wrong with its files.
        odd: what is odd about them, and does not keep them from being loaded.
    """

    name: str
    path: AnyPath
    part: ModelPart | None
    config: Mapping[str, object] | None = None
    problems: tuple[Problem, ...] = ()
    odd: tuple[Problem, ...] = ()


@dataclass
class WrittenModel:
    """A written model. Use it in a `with` statement: its files are open.

    Attributes:
        path: what was given.
        kind: what that holds.
        parts: its parts that have weights.
        folders: the folders of parts, by their names, those without weights too.
        index: model_index.json.
    """

    path: AnyPath
    kind: Kind
    parts: dict[str, WrittenPart] = field(default_factory=dict)
    folders: dict[str, AnyPath] = field(default_factory=dict)
    index: Mapping[str, object] | None = None
    opened: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> WrittenModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()

    @property
    def size_bytes(self) -> int:
        """The bytes of the tensors of all parts."""
        parts = (part.part for part in self.parts.values() if part.part is not None)
        return sum(entry.size_bytes for part in parts for entry in part.tensors.values())


def holds_model(path: AnyPath) -> bool:
    """Whether a path is that of a whole model or a part of one, and not of a LoRA."""
    if is_folder(path) and (is_file(path / INDEX) or _part_of_folder(path) is not None or _folders_in(path)):
        return True
    try:
        with open_checkpoint(path) as checkpoint:
            return bool(find_parts(checkpoint)) and not any(map(is_lora_key, checkpoint.tensors))
    except CogtoolsError:
        return False


def open_model(path: AnyPath) -> WrittenModel:
    """Open a written model.

    Args:
        path: what it was written to; of a save folder of SAT, the latest iteration is taken.

    Raises:
        CogtoolsError: if there is no model. What is wrong with one is kept in it.
    """
    alone = _part_of_folder(path) if is_folder(path) else None
    folders = _folders_in(path) if is_folder(path) else {}
    if alone is not None:
        model = WrittenModel(path, "part", folders={alone.name: path})
    elif folders or (is_folder(path) and is_file(path / INDEX)):
        model = WrittenModel(path, "pipeline" if is_file(path / INDEX) else "parts", folders=folders)
    else:
        return _open_file(path)
    try:
        if model.kind == "pipeline":
            model.index = read_index(path / INDEX)
        for name, folder in model.folders.items():
            if name in WEIGHTS:
                model.parts[name] = _open_part(PARTS[name], folder, model.opened)
    except BaseException:
        model.opened.close()
        raise
    return model


def _part_of_folder(folder: AnyPath) -> Part | None:
    """The part that a folder is, as its config.json says; None if it is none that has weights."""
    config = _config(folder / CONFIG)
    architectures = config.get("architectures") if config else None
    classes = [
        config.get("_class_name") if config else None,
        *(architectures if isinstance(architectures, list) else []),
    ]
    return next((PARTS[name] for name in WEIGHTS if PARTS[name].class_name in classes), None)


def _folders_in(path: AnyPath) -> dict[str, AnyPath]:
    """The folders of parts in a folder."""
    found = {name: path / name for name in PARTS if is_folder(path / name)}
    has_config = any(is_file(folder / PARTS[name].config) for name, folder in found.items() if name in WEIGHTS)
    return found if has_config else {}


def _config(path: AnyPath) -> dict[str, object] | None:
    try:
        return read_config(path) if is_file(path) else None
    except CheckpointError:
        return None


def _open_file(path: AnyPath) -> WrittenModel:
    """A file of weights, or a folder of SAT's."""
    checkpoint = open_checkpoint(path)
    model = WrittenModel(path, "file")
    model.opened.enter_context(checkpoint)
    try:
        found = _parts_of(checkpoint)
    except BaseException:
        model.opened.close()
        raise
    if all(part.layout == "sat" for part in found.values()):
        model.kind = "sat"
    model.parts = {name: WrittenPart(name, checkpoint.path, part) for name, part in found.items()}
    return model


def _parts_of(checkpoint: Checkpoint) -> dict[str, ModelPart]:
    found = find_parts(checkpoint)
    if not found:
        raise no_model(checkpoint)
    return found


def _open_part(part: Part, folder: AnyPath, opened: ExitStack) -> WrittenPart:
    """A part's folder, as its library loads it: the index of shards counts before a single file."""
    index, single = folder / part.shard_index, folder / part.weights_name
    problems, odd = [], []
    if is_file(index) and is_file(single):
        expected = "one of them: the shards that the index names are loaded, without a word"
        problems.append(Problem("collision", single.name, f"beside {index.name}", expected))
    try:
        checkpoint = opened.enter_context(open_checkpoint(index if is_file(index) else folder))
    except CheckpointError as error:
        problems.append(Problem("unreadable", folder.name, error.found or error.what, error.expected))
        return WrittenPart(part.name, folder, None, _config(folder / CONFIG), tuple(problems))
    if checkpoint.path == folder:
        problems.append(
            Problem("missing", index.name, "shards without it", "it: nothing finds the shards by their names")
        )
    if checkpoint.path == index:
        problems += _index_problems(index)
        odd += _odd_shards(part, folder, index, checkpoint)
    found = find_parts(checkpoint).get(part.name)
    if found is None:
        problems.append(Problem("unexpected", checkpoint.path.name, "other tensors", f"a {part.class_name}"))
    return WrittenPart(part.name, folder, found, _config(folder / CONFIG), tuple(problems), tuple(odd))


def _index_problems(index: AnyPath) -> list[Problem]:
    metadata = read_index(index).get("metadata")
    if isinstance(metadata, dict):
        return []
    return [Problem("missing", f"metadata in {index.name}", expected='an object such as {"total_size": 123}')]


def _odd_shards(part: Part, folder: AnyPath, index: AnyPath, checkpoint: Checkpoint) -> list[Problem]:
    """Tensors of shards that the index does not name, shards that it does not, and another size than it states."""
    odd = []
    for name, shard in checkpoint.parts.items():
        odd += [
            Problem("unexpected", key, name, "in the index") for key in shard.tensors if key not in checkpoint.tensors
        ]
    for entry in list_folder(folder):
        name = entry.path.name
        if name.startswith(f"{part.stem}-") and name.endswith(".safetensors") and name not in checkpoint.parts:
            odd.append(Problem("unexpected", name, "a shard that the index does not name"))
    metadata = read_index(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size_bytes = sum(entry.size_bytes for entry in checkpoint.tensors.values())
    if total not in (None, size_bytes):
        odd.append(Problem("value", "total_size", str(total), str(size_bytes)))
    return odd

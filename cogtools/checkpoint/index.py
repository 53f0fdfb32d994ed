"""The index of a checkpoint: which tensors there are and where their bytes lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from cogtools.checkpoint.storage import SourceFile, TensorEntry
from cogtools.checkpoint.unpickler import Global, Pickle, Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from cogtools.checkpoint.folder import Run

WRAPPERS = ("module", "model", "state_dict")
"""The keys under which a state dict is kept, by DeepSpeed and by people who save one again."""

MAX_WRAPPERS = 8
"""How many of them may lie in each other; more is a dict that holds itself."""

MAX_DEPTH = 32
"""How deep tensors beside the state dict are looked for. In real checkpoints they lie 3 deep."""

MAX_NAME = 1000
"""How many characters of a key stand in the path to a tensor beside the state dict."""


@dataclass(slots=True)
class Checkpoint:
    """What a checkpoint holds. Nothing of its weights is loaded and nothing of its pickle is run.

    Attributes:
        path: the file or folder that was opened.
        format: what kind of file it is, such as "torch.save (zip)".
        files: its files, held open until `close`.
        tensors: the state dict.
        wrapper: the keys under which the state dict lies; () if it is the top level.
        beside: the tensors outside the state dict, by the path that leads to them.
        values: the other entries of the top level: plain data, tensors and `Record`s.
        not_tensors: the entries of the state dict that are no tensors.
        foreign: names in the pickle that are not ordinary, and how often they occur. None was imported or called.
        metadata: the text entries of a safetensors header.
        run: the trainer's save folder that the file lies in.
        parts: where several files make up one checkpoint, each of them by its name.
    """

    path: Path
    format: str
    files: list[SourceFile]
    tensors: dict[str, TensorEntry]
    wrapper: tuple[str, ...] = ()
    beside: dict[str, TensorEntry] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    not_tensors: dict[str, object] = field(default_factory=dict)
    foreign: dict[Global, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    run: Run | None = None
    parts: dict[str, Checkpoint] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """The size of its files together."""
        return sum(file.size_bytes for file in self.files)

    def close(self) -> None:
        """Close the files; what was not read yet cannot be read any more."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def index_pickle(pickle: Pickle, file: SourceFile, file_format: str) -> Checkpoint:
    """Find the state dict in what a pickle holds, and what lies beside it."""
    wrapper, state_dict = find_state_dict(pickle.value)
    tensors: dict[str, TensorEntry] = {}
    not_tensors: dict[str, object] = {}
    for key, value in state_dict.items():
        if isinstance(value, TensorEntry):
            tensors[_name(key)] = value
        else:
            not_tensors[_name(key)] = value
    top = pickle.value if wrapper and isinstance(pickle.value, dict) else {}
    return Checkpoint(
        path=file.path,
        format=file_format,
        files=[file],
        tensors=tensors,
        wrapper=wrapper,
        beside=dict(walk_tensors(pickle.value, leave_out=state_dict)),
        values={_name(key): value for key, value in top.items() if key != wrapper[0]},
        not_tensors=not_tensors,
        foreign=pickle.foreign,
    )


def find_state_dict(root: object) -> tuple[tuple[str, ...], dict[object, object]]:
    """The keys that lead to the state dict, and the state dict: {} if nothing looks like one."""
    wrapper: list[str] = []
    current = root
    while isinstance(current, dict) and len(wrapper) < MAX_WRAPPERS:
        inside = next((name for name in WRAPPERS if isinstance(current.get(name), dict) and current[name]), None)
        if inside is None:
            return tuple(wrapper), current
        wrapper.append(inside)
        current = current[inside]
    return (), {}


def walk_tensors(root: object, leave_out: object = None) -> Iterator[tuple[str, TensorEntry]]:
    """Every tensor in nested containers and records, with the path that leads to it.

    A container that occurs more than once, or holds itself, is visited once; one deeper than `MAX_DEPTH` is not.
    """
    visited = {id(leave_out)}
    pending: list[tuple[int, str, object]] = [(0, "", root)]
    while pending:
        depth, path, value = pending.pop()
        if isinstance(value, TensorEntry):
            yield path, value
            continue
        if not isinstance(value, (dict, list, tuple, Record)) or isinstance(value, Global) or id(value) in visited:
            continue
        if depth == MAX_DEPTH:
            continue
        visited.add(id(value))
        prefix = f"{path}." if path else ""
        inside = [
            (depth + 1, f"{prefix}{_name(key)[:MAX_NAME]}", item)
            for key, item in _items(value)
            if isinstance(item, _MAY_HOLD_TENSORS) and item
        ]
        # Last in, first out: reversed, so that tensors come in the order of the file.
        pending += reversed(inside)


def _name(key: object) -> str:
    """The name of a dict's entry. Keys that are made of others are not spelled out: that may take for ever."""
    return str(key) if isinstance(key, (str, int, float, Global)) else f"<{type(key).__name__}>"


_MAY_HOLD_TENSORS = (TensorEntry, dict, list, tuple, Record)


def _items(
    value: dict[object, object] | list[object] | tuple[object, ...] | Record,
) -> Iterable[tuple[object, object]]:
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, Record):
        return enumerate((value.arguments, value.state, value.items))
    return enumerate(value)

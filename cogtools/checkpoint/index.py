"""The index of a checkpoint: which tensors there are and where their bytes lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cogtools.checkpoint.files import read_whole
from cogtools.checkpoint.limits import MAX_TENSORS
from cogtools.checkpoint.pickle.machine import Global, Pickle, Record, short_name
from cogtools.checkpoint.state_dict import MAX_DEPTH, StateDict, find_state_dict, key_name, shortened
from cogtools.checkpoint.tensors import TensorEntry
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.run import Run

BARE_TENSOR = "<tensor>"
"""The path of a tensor that is all that a file holds."""

MAX_NAME = 1000
"""How many characters of a key stand in the path to a tensor beside the state dict."""


class Place(NamedTuple):
    """Where beside the state dict a tensor lies.

    Attributes:
        container: the names that lead to the dict or list that it is in, joined with dots; "" for the top level.
        key: its key there.
    """

    container: str
    key: str

    def __str__(self) -> str:
        return f"{self.container}.{self.key}" if self.container else self.key


class SmallFile(NamedTuple):
    """A file that was read as a whole: where it is, for messages, and what is in it."""

    path: AnyPath
    content: bytes


@dataclass(slots=True)
class Checkpoint:
    """What a checkpoint holds. Nothing of its weights is loaded and nothing of its pickle is run.

    Attributes:
        path: the file that was opened, or the index of several.
        format: what kind of file it is, such as "torch.save (zip)".
        files: its files, held open until `close`.
        tensors: the state dict.
        wrapper: the keys under which the state dict lies; () if it is the top level.
        module: the class of the module that was pickled as a whole, where the state dict is that of one.
        beside: the tensors outside the state dict, or in dicts and lists in it, by the path that leads to them.
        places: each such path, taken apart.
        values: what lies beside the state dict and beside its wrappers: plain data, tensors and `Record`s.
        not_tensors: the entries of the state dict that are not described as tensors: plain data, `Record`s, and
            `OtherTensor`s, such as sparse ones.
        foreign: names in the pickle that are not ordinary, and how often they occur. None was imported or called.
        metadata: the text entries of a safetensors header.
        left_out: those of them that are too long to be kept, and how many characters they have.
        run: the trainer's save folder that the file lies in.
        parts: where several files make up one checkpoint, each of them by its name.
        index: the file that names these, where there is one. Like them it is held open until `close`.
    """

    path: AnyPath
    format: str
    files: list[SourceFile]
    tensors: dict[str, TensorEntry]
    wrapper: tuple[str, ...] = ()
    module: Global | None = None
    beside: dict[str, TensorEntry] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    not_tensors: dict[str, object] = field(default_factory=dict)
    foreign: dict[Global, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    run: Run | None = None
    parts: dict[str, Checkpoint] = field(default_factory=dict)
    index: SourceFile | None = None

    @property
    def size_bytes(self) -> int:
        """The size of its files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def iteration(self) -> int | None:
        """The iteration of the training that it says it is of; None if it says none."""
        found = self.values.get("iteration")
        return found if isinstance(found, int) else None

    @property
    def ema(self) -> bool | None:
        """Whether it is the EMA weights of a save folder; None if it does not lie in one."""
        return None if self.run is None else self.run.chosen.ema

    def has_beside(self, name: str) -> bool:
        """Whether a file of that name lies beside the checkpoint."""
        file = self._beside(name)
        if file is not None:
            file.close()
        return file is not None

    def read_beside(self, name: str, limit_bytes: int, *, above: bool = False) -> SmallFile | None:
        """A small file beside the checkpoint, such as its configuration; None if there is none.

        Args:
            name: what it is called.
            limit_bytes: how long it may be.
            above: look into the folder above as well, as a trainer keeps its configuration there.

        Raises:
            CheckpointError: if it is there and cannot be read, or is longer.
        """
        file = self._beside(name, above=above)
        if file is None:
            return None
        with file:
            return SmallFile(file.path, read_whole(file, limit_bytes))

    def _beside(self, name: str, *, above: bool = False) -> SourceFile | None:
        opened = self.index or next(iter(self.files), None)
        return None if opened is None else opened.beside(name, above=above)

    def close(self) -> None:
        """Close the files; what was not read yet cannot be read any more."""
        for file in self.files:
            file.close()
        if self.index is not None:
            self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def index_pickle(pickle: Pickle, file: SourceFile, file_format: str) -> Checkpoint:
    """Find the state dict in what a pickle holds, and what lies beside it."""
    state_dict = find_state_dict(pickle.value)
    module = state_dict.module
    checkpoint = Checkpoint(
        path=file.path,
        format=file_format if module is None else f"{file_format}, a whole module ({short_name(module)})",
        files=[file],
        tensors={},
        wrapper=state_dict.wrapper,
        module=module,
        values=_values_beside(pickle.value, state_dict.wrapper),
        foreign=pickle.foreign,
    )
    if len(state_dict.entries) > MAX_TENSORS:
        raise _too_many(file, f"{len(state_dict.entries):,} entries in its state dict")
    unused = _UnusedNames()
    for key, value in state_dict.entries.items():
        name = unused(key_name(key))
        if isinstance(value, TensorEntry):
            checkpoint.tensors[name] = value
        else:
            checkpoint.not_tensors[name] = value
    unused = _UnusedNames()
    for place, entry in walk_tensors(pickle.value, state_dict):
        if len(checkpoint.beside) == MAX_TENSORS:
            raise _too_many(file, f"more than {MAX_TENSORS:,} tensors beside its state dict")
        path = unused(str(place))
        checkpoint.beside[path] = entry
        checkpoint.places[path] = place
    return checkpoint


def _too_many(file: SourceFile, found: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint has more in it than is read",
        file=file.path,
        found=found,
        expected=f"at most {MAX_TENSORS:,}: the largest real ones have 3,000",
        hint="save the state dict on its own, without what lies beside it",
    )


def _values_beside(root: object, wrapper: tuple[str, ...]) -> dict[str, object]:
    """What lies beside the wrappers and beside the state dict; of equal names, what is nearest to the state dict."""
    values: dict[str, object] = {}
    level: Any = root
    for name in wrapper:
        values |= {key_name(key): value for key, value in level.items() if key != name}
        level = level[name]
    return values


def walk_tensors(root: object, state_dict: StateDict) -> Iterator[tuple[Place, TensorEntry]]:
    """Every tensor in nested containers and records, except for the entries of the state dict.

    A container that occurs more than once, or holds itself, is visited once; one deeper than `MAX_DEPTH` is not. What
    a list repeats is listed once.
    """
    visited: set[int] = set()
    holders, entries = (set(map(id, values)) for values in (state_dict.holders, state_dict.entries.values()))
    # One iterator a level, and not what is still to be visited: a small file can hold half a million containers.
    levels = [_Level("", iter([("", root)]))]
    while levels:
        level = levels[-1]
        for key, value in level.items:
            if isinstance(value, TensorEntry):
                if len(levels) == 1:
                    yield Place("", BARE_TENSOR), value
                elif not (id(level.holder) in holders and id(value) in entries):
                    yield Place(level.path, key_name(key)[:MAX_NAME]), value
            elif (
                isinstance(value, _MAY_HOLD_TENSORS)
                and value
                and not isinstance(value, Global)
                and len(levels) <= MAX_DEPTH
                and id(value) not in visited
            ):
                visited.add(id(value))
                path = str(Place(level.path, key_name(key)[:MAX_NAME])) if len(levels) > 1 else ""
                levels.append(_Level(shortened(path), _items(value), value))
                break
        else:
            levels.pop()


class _Level(NamedTuple):
    """A container that is being visited: the names that lead to it, and what is left of its items."""

    path: str
    items: Iterator[tuple[object, object]]
    holder: object = None


class _UnusedNames:
    """Tells equal names apart, so that none of two things is lost: 1 and "1", or two keys that are tuples."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        """The name, with a number if it was there before."""
        unused = name
        while unused in self._times:
            self._times[name] += 1
            unused = f"{name} ({self._times[name]})"
        self._times[unused] = 1
        return unused


_MAY_HOLD_TENSORS = (dict, list, tuple, Record)


def _items(
    value: dict[object, object] | list[object] | tuple[object, ...] | Record,
) -> Iterator[tuple[object, object]]:
    if isinstance(value, dict):
        return iter(value.items())
    if isinstance(value, Record):
        return enumerate((value.arguments, value.state, value.items))
    return _without_repeated_tensors(value)


def _without_repeated_tensors(items: Iterable[object]) -> Iterator[tuple[object, object]]:
    seen: set[int] = set()
    for index, item in enumerate(items):
        if isinstance(item, TensorEntry):
            if id(item) in seen:
                continue
            seen.add(id(item))
        yield index, item

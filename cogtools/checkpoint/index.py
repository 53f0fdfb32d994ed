"""The index of a checkpoint: which tensors there are and where their bytes lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cogtools.checkpoint.files import read_whole
from cogtools.checkpoint.limits import MAX_TENSORS
from cogtools.checkpoint.pickle.machine import Global, Pickle, Record, short_name
from cogtools.checkpoint.tensors import OtherTensor, TensorEntry
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.run import Run

WRAPPERS = ("module", "model", "state_dict")
"""The keys under which a state dict is kept, by DeepSpeed and by people who save one again."""

MAX_WRAPPERS = 8
"""How many of them may lie in each other; more is a dict that holds itself."""

MAX_DEPTH = 32
"""How deep tensors beside the state dict are looked for. In real checkpoints they lie 3 deep."""

BARE_TENSOR = "<tensor>"
"""The path of a tensor that is all that a file holds."""

MAX_NAME = 1000
"""How many characters of a key stand in the path to a tensor beside the state dict."""

MAX_CONTAINER = 200
"""How many characters of what leads to that key do: a few bytes can mention a tensor, and each mention has its path."""


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
    wrapper = state_dict.wrapper
    holder = pickle.value
    for name in wrapper:
        holder = holder[name]  # type: ignore[index] # that is how it was found
    module = class_of_module(holder)
    checkpoint = Checkpoint(
        path=file.path,
        format=file_format if module is None else f"{file_format}, a whole module ({short_name(module)})",
        files=[file],
        tensors={},
        wrapper=wrapper,
        module=module,
        values=_values_beside(pickle.value, wrapper),
        foreign=pickle.foreign,
    )
    if len(state_dict.entries) > MAX_TENSORS:
        raise _too_many(file, f"{len(state_dict.entries):,} entries in its state dict")
    unused = _UnusedNames()
    for key, value in state_dict.entries.items():
        name = unused(_name(key))
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


class StateDict(NamedTuple):
    """The state dict in what a pickle holds.

    Attributes:
        wrapper: the keys that lead to it.
        entries: its entries; {} if nothing looks like a state dict.
        holders: the dicts that these entries stand in, which are several for a module.
    """

    wrapper: tuple[str, ...]
    entries: dict[object, object]
    holders: tuple[object, ...]


def find_state_dict(root: object) -> StateDict:
    """Find the innermost dict that has tensors, or module; where none has, the innermost dict that has anything."""
    wrapper = _way_to_tensors(root, set(), 0)
    if wrapper is None:
        wrapper = _way_inward(root)
    if wrapper is None:
        return StateDict((), {}, ())
    found: Any = root
    for name in wrapper:
        found = found[name]
    if class_of_module(found) is not None:
        return StateDict(wrapper, *state_dict_of_module(found))
    return StateDict(wrapper, found, (found,))


def _way_to_tensors(value: object, visited: set[int], depth: int) -> tuple[str, ...] | None:
    """The wrappers that lead from here to a dict of tensors, or a module; None if none do."""
    if class_of_module(value) is not None:
        return ()
    if not isinstance(value, dict) or depth == MAX_WRAPPERS or id(value) in visited:
        return None
    visited.add(id(value))
    for name in WRAPPERS:
        rest = _way_to_tensors(value.get(name), visited, depth + 1)
        if rest is not None:
            return (name, *rest)
    return () if any(isinstance(item, (TensorEntry, OtherTensor)) for item in value.values()) else None


def _way_inward(value: object) -> tuple[str, ...] | None:
    """The wrappers that lead from here through dicts with anything in them; None if they do not end."""
    way: list[str] = []
    while isinstance(value, dict) and len(way) < MAX_WRAPPERS:
        inside = next((name for name in WRAPPERS if isinstance(value.get(name), dict) and value[name]), None)
        if inside is None:
            return tuple(way)
        way.append(inside)
        value = value[inside]
    return None


# Modules that were pickled as a whole, as torch.save(model) does


_PARTS_OF_A_MODULE = ("_parameters", "_buffers", "_modules")


def class_of_module(value: object) -> Global | None:
    """The class of a pickled torch.nn.Module; None if this is not one."""
    if not isinstance(value, Record) or not isinstance(value.state, dict) or not isinstance(value.function, Global):
        return None
    return value.function if all(isinstance(value.state.get(part), dict) for part in _PARTS_OF_A_MODULE) else None


def state_dict_of_module(module: Record) -> tuple[dict[object, object], tuple[object, ...]]:
    """The state dict that a pickled module would give, and the dicts that its entries stand in.

    Keys are the names of the modules that lead to an entry, joined with dots (torch/nn/modules/module.py).
    A module that is reached twice has its entries under both names, as there, unless it holds itself.
    """
    entries: dict[object, object] = {}
    holders: dict[int, object] = {}
    pending: list[tuple[str, Record, tuple[int, ...]]] = [("", module, ())]
    for _ in range(MAX_TENSORS):  # a few bytes can hold a module twice, and that one another, and so on
        if not pending:
            break
        prefix, inner, above = pending.pop()
        state: dict[str, Any] = inner.state  # type: ignore[assignment] # that is what makes it a module
        unsaved = state.get("_non_persistent_buffers_set")
        for part in _PARTS_OF_A_MODULE[:2]:
            holders[id(state[part])] = state[part]
            for name, value in state[part].items():
                is_saved = value is not None and not (part == "_buffers" and _is_in(name, unsaved))
                if is_saved and len(entries) <= MAX_TENSORS:
                    entries[_shortened(prefix + _name(name))] = value
        if len(above) == MAX_DEPTH or len(entries) > MAX_TENSORS:
            continue
        modules = [
            (f"{_shortened(prefix + _name(name))}.", value, (*above, id(inner)))
            for name, value in state["_modules"].items()
            if class_of_module(value) is not None and id(value) not in above and value is not inner
        ]
        pending += reversed(modules)  # last in, first out: in the order of the module
    return entries, tuple(holders.values())


def _is_in(name: object, names: object) -> bool:
    return isinstance(names, (set, frozenset, dict)) and isinstance(name, str) and name in names


def _values_beside(root: object, wrapper: tuple[str, ...]) -> dict[str, object]:
    """What lies beside the wrappers and beside the state dict; of equal names, what is nearest to the state dict."""
    values: dict[str, object] = {}
    level: Any = root
    for name in wrapper:
        values |= {_name(key): value for key, value in level.items() if key != name}
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
                    yield Place(level.path, _name(key)[:MAX_NAME]), value
            elif (
                isinstance(value, _MAY_HOLD_TENSORS)
                and value
                and not isinstance(value, Global)
                and len(levels) <= MAX_DEPTH
                and id(value) not in visited
            ):
                visited.add(id(value))
                path = str(Place(level.path, _name(key)[:MAX_NAME])) if len(levels) > 1 else ""
                levels.append(_Level(_shortened(path), _items(value), value))
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


def _name(key: object) -> str:
    """The name of a dict's entry. Keys that are made of others are not spelled out: that may take for ever."""
    return str(key) if isinstance(key, (str, int, float, Global)) else f"<{type(key).__name__}>"


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


def _shortened(path: str) -> str:
    return path if len(path) <= MAX_CONTAINER else f"…{path[-MAX_CONTAINER:]}"

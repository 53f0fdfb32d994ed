"""Where the state dict lies in what a pickle holds: bare, under the keys of those who wrap it, or in a whole module."""

from __future__ import annotations

from typing import Any, NamedTuple

from cogtools.checkpoint.limits import MAX_TENSORS
from cogtools.checkpoint.pickle.machine import Global, Record
from cogtools.checkpoint.tensors import OtherTensor, TensorEntry

WRAPPERS = ("module", "model", "state_dict")
"""The keys under which a state dict is kept, by DeepSpeed and by people who save one again."""

MAX_WRAPPERS = 8
"""How many of them may lie in each other; more is a dict that holds itself."""

MAX_DEPTH = 32
"""How deep modules may lie in each other, and tensors beside the state dict. In real checkpoints those lie 3 deep."""

MAX_CONTAINER = 200
"""How many characters of the names that lead to a key are kept: a few bytes can mention a tensor, and each mention has
its path."""


class StateDict(NamedTuple):
    """The state dict in what a pickle holds.

    Attributes:
        wrapper: the keys that lead to it.
        entries: its entries; {} if nothing looks like a state dict.
        holders: the dicts that these entries stand in, which are several for a module.
        module: the class of the module that it is that of; None if it is a dict.
    """

    wrapper: tuple[str, ...]
    entries: dict[object, object]
    holders: tuple[object, ...]
    module: Global | None = None


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
    module = _class_of_module(found)
    entries, holders = (found, (found,)) if module is None else _state_dict_of(found)
    return StateDict(wrapper, entries, holders, module)


def key_name(key: object) -> str:
    """The name of a dict's entry. Keys that are made of others are not spelled out: that may take for ever."""
    return str(key) if isinstance(key, (str, int, float, Global)) else f"<{type(key).__name__}>"


def shortened(path: str) -> str:
    """The end of the names that lead to something, joined with dots."""
    return path if len(path) <= MAX_CONTAINER else f"…{path[-MAX_CONTAINER:]}"


def _way_to_tensors(value: object, visited: set[int], depth: int) -> tuple[str, ...] | None:
    """The wrappers that lead from here to a dict of tensors, or a module; None if none do."""
    if _class_of_module(value) is not None:
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


def _class_of_module(value: object) -> Global | None:
    """The class of a pickled torch.nn.Module; None if this is not one."""
    if not isinstance(value, Record) or not isinstance(value.state, dict) or not isinstance(value.function, Global):
        return None
    return value.function if all(isinstance(value.state.get(part), dict) for part in _PARTS_OF_A_MODULE) else None


def _state_dict_of(module: Record) -> tuple[dict[object, object], tuple[object, ...]]:
    """The state dict that a pickled module would give, and the dicts that its entries stand in.

    Keys are the names of the modules that lead to an entry, joined with dots (torch/nn/modules/module.py). A module
    that is reached twice has its entries under both names, as there, unless it holds itself.
    """
    entries: dict[object, object] = {}
    holders: dict[int, object] = {}
    pending: list[tuple[str, Record, tuple[int, ...]]] = [("", module, ())]
    for _ in range(MAX_TENSORS):  # a few bytes can hold a module twice, and that one another, and so on
        if not pending or len(entries) > MAX_TENSORS:
            break
        prefix, inner, above = pending.pop()
        state: dict[str, Any] = inner.state  # type: ignore[assignment] # that is what makes it a module
        for part in _PARTS_OF_A_MODULE[:2]:
            holders[id(state[part])] = state[part]
        for name, value in _saved(state):
            entries[shortened(prefix + key_name(name))] = value
        modules = [
            (f"{shortened(prefix + key_name(name))}.", value, (*above, id(inner)))
            for name, value in state["_modules"].items()
            if _class_of_module(value) is not None and id(value) not in above and value is not inner
        ]
        pending += reversed(modules) if len(above) < MAX_DEPTH else []  # last in, first out: in the order of the module
    return entries, tuple(holders.values())


def _saved(state: dict[str, Any]) -> list[tuple[object, object]]:
    """A module's own entries of its state dict: without those that are None, and without buffers that are kept out."""
    unsaved = state.get("_non_persistent_buffers_set")
    kept_out = unsaved if isinstance(unsaved, (set, frozenset)) else frozenset()
    buffers = [(name, value) for name, value in state["_buffers"].items() if name not in kept_out]
    return [(name, value) for name, value in (*state["_parameters"].items(), *buffers) if value is not None]

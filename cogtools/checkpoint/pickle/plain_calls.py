"""The calls by which a pickle writes plain data, and what stands in for each: data, and no call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.checkpoint.pickle.machine import Global, MalformedPickleError, PickleMachine, Record, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

_BYTES_PER_ITEM = 8  # of a list: bytes are copied at that rate


def _ordered_dict(machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """() as a rule; ([[key, value], …],) from Python 2."""
    match arguments:
        case ():
            return {}
        case (list(pairs),) if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            machine.spend(len(pairs))
            keys = machine.hashable([pair[0] for pair in pairs])
            return dict(zip(keys, [pair[1] for pair in pairs], strict=True))
        case _:
            return Record(Global("collections", "OrderedDict"), arguments)


def _default_dict(_machine: PickleMachine, _arguments: tuple[object, ...]) -> dict[object, object]:
    """(factory,): the items follow; the factory is of no use in data that does not change."""
    return {}


def _set(machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """([item, …],): how protocol 2 writes a set."""
    match arguments:
        case (list(items),):
            machine.spend(len(items))
            return set(machine.hashable(items))
        case _:
            return Record(Global("builtins", "set"), arguments)


def _frozen_set(machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """([item, …],): how protocols before 4 write a frozenset."""
    items = _set(machine, arguments)
    return frozenset(items) if isinstance(items, set) else Record(Global("builtins", "frozenset"), arguments)


def _bytes(_machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """(): how protocol 2 writes bytes without length."""
    return b"" if arguments == () else Record(Global("builtins", "bytes"), arguments)


def _encode(machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """(text, "latin1"): how protocol 2 writes bytes."""
    match arguments:
        case (str(text), "latin1"):
            machine.spend(len(text) // _BYTES_PER_ITEM)
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError as error:
                raise MalformedPickleError("it has bytes written as characters above 255") from error
        case _:
            return Record(Global("_codecs", "encode"), arguments)


PLAIN_CALLS: dict[Global, Callable[[PickleMachine, tuple[object, ...]], object]] = {
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("collections", "defaultdict"): _default_dict,
    Global("__builtin__", "set"): _set,
    Global("builtins", "set"): _set,
    Global("__builtin__", "frozenset"): _frozen_set,
    Global("builtins", "frozenset"): _frozen_set,
    Global("__builtin__", "bytes"): _bytes,
    Global("builtins", "bytes"): _bytes,
    Global("_codecs", "encode"): _encode,
}
"""The calls by which a pickle writes plain data."""

PLAIN_ONLY = Vocabulary(PLAIN_CALLS)
"""Plain data: no tensors, no persistent ids."""

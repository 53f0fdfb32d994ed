"""A restricted unpickler: it builds data and never runs code.

A pickle is a program for a small stack machine. Python's `pickle` carries out its GLOBAL and REDUCE instructions by
importing what they name and calling it. This machine imports nothing and calls nothing that a pickle names:

- a name (GLOBAL, STACK_GLOBAL, EXT) becomes a `Global`, which is two strings;
- REDUCE of a name in the caller's table (`plain_calls.py`, and what `torch_calls.py` adds) becomes data, made by the
  function in that table; any other call (NEWOBJ and OBJ too) becomes a `Record`: the name, the arguments, and the state
  that the pickle adds to it;
- every name outside the tables is counted, so that it can be listed.

Time and memory are bounded whatever the input: the number of instructions is limited, lengths are checked against the
bytes that are there before anything is made of them, nothing is recursive, and nothing that grows without bound when it
is hashed, copied or compared is hashed, copied or compared.

Instructions: those that picklers write in protocols 2 to 5, under their names in Python's `pickle`; Lib/pickletools.py
of CPython describes each. Not supported: the text instructions of protocols 0 and 1, which no file of PyTorch needs
(`torch.load` itself cannot read a file of protocol 0, and with `weights_only` none of protocol 1), and the out-of-band
buffers of protocol 5, which PyTorch does not write.
"""

from __future__ import annotations

import pickle as opcodes  # for the names of the opcodes; nothing is unpickled with it
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cogtools.checkpoint import limits
from cogtools.formatting import MAX_SHOWN_CHARS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

_HASH_MODULUS = sys.hash_info.modulus


class Global(NamedTuple):
    """A name that a pickle refers to. It is neither imported nor called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """What a pickle wanted to be made by a call. The call was not made.

    Attributes:
        function: what was to be called, as a rule a `Global`.
        arguments: with what.
        state: what BUILD was to put into the result.
        items: what was to be appended to it, or set in it as (key, value).
    """

    function: object
    arguments: object
    state: object = None
    items: list[object] = field(default_factory=list)


class MalformedPickleError(Exception):
    """A pickle breaks the rules of its format, or asks for more than `limits` allows.

    Attributes:
        foreign: the names outside the tables that it mentions before that, as in `Pickle`.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.foreign: dict[Global, int] = {}


class ForgedPickleError(MalformedPickleError):
    """A pickle asks for what no writer does: to exhaust its reader, or to read beyond what it describes itself."""


class MismatchError(MalformedPickleError):
    """A pickle does not fit the rest of its file: either may be what is wrong."""


class Pickle(NamedTuple):
    """What a pickle holds.

    Attributes:
        value: the object, made of plain data, `Record`s, `Global`s and what the table of calls makes.
        foreign: every name outside the tables and how often the pickle mentions it.
        end: the offset after the STOP instruction.
    """

    value: object
    foreign: dict[Global, int]
    end: int


class Vocabulary(NamedTuple):
    """What a pickle may contain besides plain data.

    Attributes:
        calls: what stands in for a call of a name: a function of the machine and the arguments.
        names: further names that are ordinary where they stand, such as classes given as arguments.
        persistent: what stands in for a persistent id.
    """

    calls: Mapping[Global, Callable[[PickleMachine, tuple[object, ...]], object]]
    names: Collection[Global] = ()
    persistent: Callable[[object], object] | None = None


def read_pickle(
    data: bytes, vocabulary: Vocabulary, start: int = 0, *, instructions: int = limits.MAX_INSTRUCTIONS
) -> Pickle:
    """Read one pickle without running any of it.

    Args:
        data: the bytes; what follows the pickle is not looked at.
        vocabulary: the calls, names and persistent ids that are understood.
        start: where in `data` the pickle begins.
        instructions: how many it may have.

    Raises:
        MalformedPickleError: if it is damaged, or asks for more than `limits` allows.
        CheckpointError: as the vocabulary's functions raise it.
    """
    machine = PickleMachine(data, start, vocabulary)
    try:
        return _finished(machine, instructions)
    except MalformedPickleError as error:
        error.foreign = machine.foreign
        raise


def _finished(machine: PickleMachine, instructions: int) -> Pickle:
    try:
        machine.run(instructions)
    except (IndexError, struct.error) as error:
        # Reading past the end of the data, or using more of the stack than is there.
        raise MalformedPickleError("it ends too early, or uses what is not there") from error
    except KeyError as error:
        raise MalformedPickleError("an instruction uses a memo entry that was never stored") from error
    if not machine.stack:
        raise MalformedPickleError("it ends with nothing on the stack")
    return Pickle(machine.stack[-1], machine.foreign, machine.position)


def all_foreign(pickles: Iterable[Pickle]) -> dict[Global, int]:
    """The names outside the tables that several pickles mention, and how often in all."""
    foreign: Counter[Global] = Counter()
    for pickle in pickles:
        foreign.update(pickle.foreign)
    return dict(foreign)


_UINT8, _UINT16, _UINT32, _UINT64 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q"))
_INT32, _FLOAT64 = struct.Struct("<i"), struct.Struct(">d")

_BININT1, _BINGET, _LONG_BINGET, _LONG_BINPUT, _STOP = (
    opcode[0] for opcode in (opcodes.BININT1, opcodes.BINGET, opcodes.LONG_BINGET, opcodes.LONG_BINPUT, opcodes.STOP)
)

_SCALARS = frozenset({str, int, float, bool, bytes, complex, type(None)})

_SET_ITEMS = 8
"""An empty set has room for so many items from the start: it takes four times as much as a list."""


class PickleMachine:
    """The state of the stack machine while it reads one pickle.

    Attributes:
        data: the bytes that the pickle is in.
        position: the offset of what is read next.
        stack: what the instructions have pushed since the last MARK.
        marked: the stacks below each MARK.
        memo: what was stored for later use.
        foreign: the names outside the tables that were mentioned so far, and how often.
    """

    def __init__(self, data: bytes, start: int, vocabulary: Vocabulary) -> None:
        self.data = data
        self.position = start
        self.calls, self.names, self.persistent = vocabulary
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.foreign: dict[Global, int] = {}
        self._globals: dict[Global, Global] = {}
        self._copied = 0
        self._chosen_key_items = 0

    def run(self, most: int) -> None:
        """Carry out the instructions up to STOP.

        The four that make up half of every checkpoint's pickle are carried out here, the others by `_INSTRUCTIONS`.
        """
        data, memo, instructions, read_uint32 = self.data, self.memo, _INSTRUCTIONS, _UINT32.unpack_from
        position, stack = self.position, self.stack
        for _ in range(most):
            opcode = data[position]
            position += 1
            if opcode == _LONG_BINPUT:
                memo[read_uint32(data, position)[0]] = stack[-1]
                position += 4
            elif opcode == _BININT1:
                stack.append(data[position])
                position += 1
            elif opcode == _BINGET:
                stack.append(memo[data[position]])
                position += 1
            elif opcode == _LONG_BINGET:
                stack.append(memo[read_uint32(data, position)[0]])
                position += 4
            else:
                self.position = position
                if opcode == _STOP:
                    return
                instruction = instructions.get(opcode)
                if instruction is None:
                    raise _not_supported(opcode)
                instruction(self)
                position, stack = self.position, self.stack
        raise MalformedPickleError(f"it has more than {most:,} instructions")

    # What follows an opcode

    def take(self, size: int) -> bytes:
        start = self.position
        end = start + size
        if not start <= end <= len(self.data):
            raise MalformedPickleError("it ends too early")
        self.position = end
        return self.data[start:end]

    def number(self, kind: struct.Struct) -> int:
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value  # type: ignore[no-any-return] # what unpack_from gives is not typed

    def line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise MalformedPickleError("it ends too early")
        line = self.data[self.position : end]
        self.position = end + 1
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise MalformedPickleError("it has a name that is not UTF-8") from error

    # The stack, and the limits on what is done with it

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        return self.stack.pop()

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[object]:
        if not self.marked:
            raise MalformedPickleError("an instruction looks for a mark that is not there")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop_or_unmark(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def store(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def spend(self, items: int) -> None:
        """Count items that are copied."""
        self._copied += items
        if self._copied > limits.MAX_COPIED_ITEMS:
            raise ForgedPickleError(f"it copies more than {limits.MAX_COPIED_ITEMS:,} items")

    def hashable(self, items: list[object]) -> list[object]:
        """The items, if each can be a key without its hash taking long or being of the file's choice."""
        for item in items:
            if type(item) is int and not -_HASH_MODULUS < item < _HASH_MODULUS:
                self._spend_on_keys(1)
            elif type(item) in _SCALARS or isinstance(item, (Global, Record)):
                continue
            elif isinstance(item, tuple):
                self._spend_on_keys(_items_in_key(item))
            else:
                raise MalformedPickleError(f"it uses a {_kind(item)} as a key")
        return items

    def _spend_on_keys(self, items: int) -> None:
        self._chosen_key_items += items
        if self._chosen_key_items > limits.MAX_CHOSEN_KEY_ITEMS:
            raise ForgedPickleError("it has more keys of tuples and large numbers than any checkpoint")

    # Plain data

    def protocol(self, version: int) -> None:
        if version > opcodes.HIGHEST_PROTOCOL:
            raise MalformedPickleError(
                f"it is written in pickle protocol {version}; the newest known one is {opcodes.HIGHEST_PROTOCOL}"
            )

    def long(self, size: int) -> None:
        if not 0 <= size <= limits.MAX_INTEGER_BYTES:
            raise MalformedPickleError(f"it has an integer of {size:,} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, size: int) -> None:
        try:
            self.push(str(self.take(size), "utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise MalformedPickleError("it has a string that is not UTF-8") from error

    def python2_string(self, size: int) -> None:
        if size < 0:
            raise MalformedPickleError(f"it has a string of {size} bytes")
        content = self.take(size)
        try:
            self.push(content.decode())
        except UnicodeDecodeError:
            self.push(content)

    def tuple_of(self, size: int) -> None:
        stack = self.stack
        if len(stack) < size:
            raise MalformedPickleError("an instruction finds too little on the stack")
        stack[-size:] = [tuple(stack[-size:])]

    def tuple_from_mark(self) -> None:
        items = self.pop_mark()  # first: it changes which list the stack is
        self.push(tuple(items))

    def frozenset_from_mark(self) -> None:
        items = self.pop_mark()
        self.push(frozenset(self.hashable(items)))

    def empty_set(self) -> None:
        self.spend(_SET_ITEMS)
        self.push(set())

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Record):
            target.items.extend(items)
        else:
            _refuse_items("append", target)

    def add(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(self.hashable(items))
        elif isinstance(target, Record):
            target.items.extend(items)
        else:
            _refuse_items("add", target)

    def set_one(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise MalformedPickleError("it sets a key without a value")
        if isinstance(target, dict):
            target.update(zip(self.hashable(items[::2]), items[1::2], strict=True))
        elif isinstance(target, Record):
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        else:
            _refuse_items("set", target)

    # Names and calls

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise MalformedPickleError("it has a name that is not a string")
        new = Global(module, name)
        known = self._globals.setdefault(new, new)
        if known not in self.calls and known not in self.names:
            self.foreign[known] = self.foreign.get(known, 0) + 1
            if len(self.foreign) > limits.MAX_NAMES:
                raise MalformedPickleError(f"it mentions more than {limits.MAX_NAMES:,} different names")
        self.push(known)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def extension(self, code: int) -> None:
        # The names behind these numbers are in a registry of the process that wrote the pickle.
        self.name("copyreg extension", str(code))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or function not in self.calls:
            self.push(Record(function, arguments))
        elif isinstance(arguments, tuple):
            self.push(self.calls[function](self, arguments))
        else:
            raise MalformedPickleError(f"it calls {short_name(function)} with a {_kind(arguments)}")

    def new_object(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(Record(function, arguments))

    def new_object_with_keywords(self) -> None:
        keywords, arguments, function = self.pop(), self.pop(), self.pop()
        self.push(Record(function, arguments, state=keywords))

    def object_from_mark(self) -> None:
        items = self.pop_mark()
        self.push(Record(items[0], tuple(items[1:])))

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        # Other objects are plain data: what PyTorch adds to them (a state dict's `_metadata`) is of no use here.

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise MalformedPickleError("it refers to an object outside of it where there can be none")
        self.push(self.persistent(self.pop()))


def _refuse_items(verb: str, target: object) -> NoReturn:
    raise MalformedPickleError(f"it has an instruction to {verb} items where there is a {_kind(target)}")


def _items_in_key(item: tuple[object, ...]) -> int:
    """How many items hashing visits: a tuple that holds itself many times over takes for ever."""
    pending: list[object] = [item]
    visited = 0
    while pending:
        current = pending.pop()
        visited += 1
        if visited > limits.MAX_TUPLE_KEY_ITEMS:
            raise ForgedPickleError("it uses a tuple as a key")
        if isinstance(current, tuple) and not isinstance(current, Global):
            pending.extend(current[: limits.MAX_TUPLE_KEY_ITEMS])
            visited += max(len(current) - limits.MAX_TUPLE_KEY_ITEMS, 0)
        elif type(current) not in _SCALARS and not isinstance(current, (Global, Record)):
            raise MalformedPickleError("it uses a tuple as a key")
    return visited


def _kind(value: object) -> str:
    """What a value is, for a message. It is not printed itself: it may hold itself, or be nested without end."""
    if not isinstance(value, Record):
        return type(value).__name__
    return short_name(value.function) if isinstance(value.function, Global) else "call of something without a name"


def short_name(name: Global) -> str:
    """A name, and as much of it as a line holds: a hostile one has millions of characters."""
    return str(name)[:MAX_SHOWN_CHARS]


# The instructions, but for the five that `PickleMachine.run` carries out itself

# fmt: off
_INSTRUCTIONS: dict[int, Callable[[PickleMachine], object]] = {
    opcode[0]: instruction
    for opcode, instruction in {
        # Control and memo
        opcodes.PROTO: lambda machine: machine.protocol(machine.number(_UINT8)),
        opcodes.FRAME: lambda machine: machine.take(8),  # how much to read ahead: everything is here already
        opcodes.MARK: PickleMachine.mark,
        opcodes.POP: PickleMachine.pop_or_unmark,
        opcodes.POP_MARK: PickleMachine.pop_mark,
        opcodes.DUP: lambda machine: machine.push(machine.stack[-1]),
        opcodes.BINPUT: lambda machine: machine.store(machine.number(_UINT8)),
        opcodes.MEMOIZE: lambda machine: machine.store(len(machine.memo)),
        # Constants and numbers
        opcodes.NONE: lambda machine: machine.push(None),
        opcodes.NEWTRUE: lambda machine: machine.push(True),
        opcodes.NEWFALSE: lambda machine: machine.push(False),
        opcodes.BININT2: lambda machine: machine.push(machine.number(_UINT16)),
        opcodes.BININT: lambda machine: machine.push(machine.number(_INT32)),
        opcodes.LONG1: lambda machine: machine.long(machine.number(_UINT8)),
        opcodes.LONG4: lambda machine: machine.long(machine.number(_INT32)),
        opcodes.BINFLOAT: lambda machine: machine.push(machine.number(_FLOAT64)),
        # Text and bytes
        opcodes.SHORT_BINSTRING: lambda machine: machine.python2_string(machine.number(_UINT8)),
        opcodes.BINSTRING: lambda machine: machine.python2_string(machine.number(_INT32)),
        opcodes.SHORT_BINUNICODE: lambda machine: machine.text(machine.number(_UINT8)),
        opcodes.BINUNICODE: lambda machine: machine.text(machine.number(_UINT32)),
        opcodes.BINUNICODE8: lambda machine: machine.text(machine.number(_UINT64)),
        opcodes.SHORT_BINBYTES: lambda machine: machine.push(machine.take(machine.number(_UINT8))),
        opcodes.BINBYTES: lambda machine: machine.push(machine.take(machine.number(_UINT32))),
        opcodes.BINBYTES8: lambda machine: machine.push(machine.take(machine.number(_UINT64))),
        opcodes.BYTEARRAY8: lambda machine: machine.push(machine.take(machine.number(_UINT64))),
        # Containers
        opcodes.EMPTY_TUPLE: lambda machine: machine.push(()),
        opcodes.TUPLE1: lambda machine: machine.tuple_of(1),
        opcodes.TUPLE2: lambda machine: machine.tuple_of(2),
        opcodes.TUPLE3: lambda machine: machine.tuple_of(3),
        opcodes.TUPLE: PickleMachine.tuple_from_mark,
        opcodes.EMPTY_LIST: lambda machine: machine.push([]),
        opcodes.APPEND: lambda machine: machine.append([machine.pop()]),
        opcodes.APPENDS: lambda machine: machine.append(machine.pop_mark()),
        opcodes.EMPTY_DICT: lambda machine: machine.push({}),
        opcodes.SETITEM: PickleMachine.set_one,
        opcodes.SETITEMS: lambda machine: machine.set_items(machine.pop_mark()),
        opcodes.EMPTY_SET: PickleMachine.empty_set,
        opcodes.ADDITEMS: lambda machine: machine.add(machine.pop_mark()),
        opcodes.FROZENSET: PickleMachine.frozenset_from_mark,
        # Names and calls
        opcodes.GLOBAL: lambda machine: machine.name(machine.line(), machine.line()),
        opcodes.STACK_GLOBAL: PickleMachine.stack_global,
        opcodes.EXT1: lambda machine: machine.extension(machine.number(_UINT8)),
        opcodes.EXT2: lambda machine: machine.extension(machine.number(_UINT16)),
        opcodes.EXT4: lambda machine: machine.extension(machine.number(_INT32)),
        opcodes.REDUCE: PickleMachine.reduce,
        opcodes.OBJ: PickleMachine.object_from_mark,
        opcodes.NEWOBJ: PickleMachine.new_object,
        opcodes.NEWOBJ_EX: PickleMachine.new_object_with_keywords,
        opcodes.BUILD: PickleMachine.build,
        opcodes.BINPERSID: PickleMachine.persistent_id,
    }.items()
}
# fmt: on

_OF_PROTOCOL_0 = {
    opcode[0]
    for opcode in (
        *(opcodes.INT, opcodes.LONG, opcodes.FLOAT, opcodes.STRING, opcodes.UNICODE, opcodes.LIST, opcodes.DICT),
        *(opcodes.PUT, opcodes.GET, opcodes.INST, opcodes.PERSID),
    )
}


def _not_supported(opcode: int) -> MalformedPickleError:
    if opcode in _OF_PROTOCOL_0:
        return MalformedPickleError("it is written in pickle protocol 0 or 1; PyTorch writes protocol 2 and newer")
    return MalformedPickleError(f"it has an unknown instruction, 0x{opcode:02x}")

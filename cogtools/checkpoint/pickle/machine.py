"""A pickle machine of our own: it builds data and never runs code.

A pickle is a program for a small stack machine. Python's `pickle` carries out its GLOBAL and REDUCE instructions
by importing what they name and calling it. This machine imports nothing and calls nothing of what a pickle names:

- a name (GLOBAL, STACK_GLOBAL, INST, EXT) becomes a `Global`, which is two strings;
- a call by REDUCE of a name in the caller's table (`plain_calls.py`, and what `torch_pickle.py` adds) becomes data,
  made by the function in that table; any other call (NEWOBJ, OBJ, INST too) becomes a `Record`: the name, the
  arguments, and whatever state the pickle adds to it;
- every name outside the tables is counted, so that it can be shown.

Time and memory are bounded whatever the input: the number of instructions is limited, lengths are checked against
the bytes that are there before anything is made of them, nothing is recursive, and nothing that grows without bound
when it is hashed, copied or compared is hashed, copied or compared.

Opcodes: Lib/pickletools.py of CPython, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import struct
import sys
import warnings
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
    """A pickle breaks the rules of its format. The reader of the file says where it lies.

    Attributes:
        foreign: the names outside the tables that it mentions before that, as in `Pickle`.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.foreign: dict[Global, int] = {}


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
    """What a pickle may say besides plain data.

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


_UINT16 = struct.Struct("<H").unpack_from
_INT32 = struct.Struct("<i").unpack_from
_UINT32 = struct.Struct("<I").unpack_from
_UINT64 = struct.Struct("<Q").unpack_from
_FLOAT64 = struct.Struct(">d").unpack_from


class PickleMachine:
    """The state of the stack machine while it reads one pickle."""

    def __init__(self, data: bytes, start: int, vocabulary: Vocabulary) -> None:
        self.data = data
        self.position = start
        self.calls, self.names, self.persistent = vocabulary
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.globals: dict[Global, Global] = {}
        self.foreign: dict[Global, int] = {}
        self.copied = 0
        self.chosen_key_items = 0

    def run(self, most: int) -> None:
        """Carry out the instructions up to STOP.

        The four that make up half of every checkpoint's pickle are carried out here, the others by the table.
        """
        data, memo, instructions = self.data, self.memo, _INSTRUCTIONS
        position, stack = self.position, self.stack
        for _ in range(most):
            opcode = data[position]
            position += 1
            if opcode == _LONG_BINPUT:
                memo[_UINT32(data, position)[0]] = stack[-1]
                position += 4
            elif opcode == _BININT1:
                stack.append(data[position])
                position += 1
            elif opcode == _BINGET:
                stack.append(memo[data[position]])
                position += 1
            elif opcode == _LONG_BINGET:
                stack.append(memo[_UINT32(data, position)[0]])
                position += 4
            else:
                self.position = position
                if opcode == _STOP:
                    return
                instruction = instructions.get(opcode)
                if instruction is None:
                    raise MalformedPickleError(f"it has an unknown instruction, 0x{opcode:02x}")
                instruction(self)
                position, stack = self.position, self.stack
        raise MalformedPickleError(f"it has more than {most:,} instructions")

    # Reading what follows an opcode

    def take(self, size: int) -> bytes:
        start = self.position
        end = start + size
        if end > len(self.data):
            raise MalformedPickleError("it ends too early")
        self.position = end
        return self.data[start:end]

    def take_byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def take_uint16(self) -> int:
        (value,) = _UINT16(self.data, self.position)
        self.position += 2
        return int(value)

    def take_int32(self) -> int:
        (value,) = _INT32(self.data, self.position)
        self.position += 4
        return int(value)

    def take_uint32(self) -> int:
        (value,) = _UINT32(self.data, self.position)
        self.position += 4
        return int(value)

    def take_uint64(self) -> int:
        (value,) = _UINT64(self.data, self.position)
        self.position += 8
        return int(value)

    def take_line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise MalformedPickleError("it ends too early")
        line = self.data[self.position : end]
        self.position = end + 1
        return line

    # The stack

    def pop(self) -> object:
        return self.stack.pop()

    def pop_mark(self) -> list[object]:
        if not self.marked:
            raise MalformedPickleError("an instruction looks for a mark that is not there")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def spend(self, items: int) -> None:
        self.copied += items
        if self.copied > limits.MAX_COPIED_ITEMS:
            raise MalformedPickleError(f"it copies more than {limits.MAX_COPIED_ITEMS:,} items")

    # Numbers and strings

    def integer(self, digits: bytes) -> int:
        if len(digits) > 2 * limits.MAX_INTEGER_BYTES:
            raise MalformedPickleError(f"it has an integer of {len(digits):,} digits")
        try:
            return int(digits)
        except ValueError as error:
            raise MalformedPickleError(f"it has a broken integer, {digits[:20]!r}") from error

    def text_int(self) -> None:
        line = self.take_line()
        booleans = {b"00": False, b"01": True}
        self.stack.append(booleans[line] if line in booleans else self.integer(line))

    def text_long(self) -> None:
        self.stack.append(self.integer(self.take_line().removesuffix(b"L")))

    def text_float(self) -> None:
        line = self.take_line()
        try:
            self.stack.append(float(line))
        except ValueError as error:
            raise MalformedPickleError(f"it has a broken number, {line[:20]!r}") from error

    def binary_float(self) -> None:
        (value,) = _FLOAT64(self.data, self.position)
        self.position += 8
        self.stack.append(value)

    def binary_long(self, size: int) -> None:
        if not 0 <= size <= limits.MAX_INTEGER_BYTES:
            raise MalformedPickleError(f"it has an integer of {size:,} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def text_string(self) -> None:
        line = self.take_line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            raise MalformedPickleError(f"it has a string without quotes, {line[:20]!r}")
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that mean nothing
                content, _ = codecs.escape_decode(line[1:-1])
        except ValueError as error:
            raise MalformedPickleError(f"it has a broken string, {line[:20]!r}") from error
        self.stack.append(_python2_string(content))

    def text_unicode(self) -> None:
        try:
            # Not bytes.decode: that would import the codec.
            text, _ = codecs.raw_unicode_escape_decode(self.take_line())
        except UnicodeDecodeError as error:
            raise MalformedPickleError("it has a broken string") from error
        self.stack.append(text)

    def python2_string(self, size: int) -> None:
        if size < 0:
            raise MalformedPickleError(f"it has a string of {size} bytes")
        self.stack.append(_python2_string(self.take(size)))

    def unicode(self, size: int) -> None:
        try:
            self.stack.append(str(self.take(size), "utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise MalformedPickleError("it has a string that is not UTF-8") from error

    # Containers

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Record):
            target.items.extend(items)
        else:
            self.no_container("append", target)

    def add(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(self.hashable(items))
        elif isinstance(target, Record):
            target.items.extend(items)
        else:
            self.no_container("add", target)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise MalformedPickleError("it sets a key without a value")
        if isinstance(target, dict):
            target.update(zip(self.hashable(items[::2]), items[1::2], strict=True))
        elif isinstance(target, Record):
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        else:
            self.no_container("set", target)

    def no_container(self, verb: str, target: object) -> NoReturn:
        raise MalformedPickleError(f"it has an instruction to {verb} items where there is a {_kind(target)}")

    def hashable(self, items: list[object]) -> list[object]:
        for item in items:
            if type(item) is int and not -_HASH_MODULUS < item < _HASH_MODULUS:
                self.spend_on_keys(1)
            elif type(item) in _SCALARS or isinstance(item, (Global, Record)):
                continue
            elif isinstance(item, tuple):
                self.spend_on_keys(_items_in_key(item))
            else:
                raise MalformedPickleError(f"it uses a {_kind(item)} as a key")
        return items

    def spend_on_keys(self, items: int) -> None:
        self.chosen_key_items += items
        if self.chosen_key_items > limits.MAX_CHOSEN_KEY_ITEMS:
            raise MalformedPickleError("it has more keys of tuples and large numbers than any checkpoint")

    # Names and calls

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise MalformedPickleError("it has a name that is not a string")
        new = Global(module, name)
        known = self.globals.setdefault(new, new)
        if known not in self.calls and known not in self.names:
            self.foreign[known] = self.foreign.get(known, 0) + 1
            if len(self.foreign) > limits.MAX_NAMES:
                raise MalformedPickleError(f"it mentions more than {limits.MAX_NAMES:,} different names")
        self.stack.append(known)

    def text_global(self) -> tuple[str, str]:
        try:
            return self.take_line().decode(), self.take_line().decode()
        except UnicodeDecodeError as error:
            raise MalformedPickleError("it has a name that is not UTF-8") from error

    def extension(self, code: int) -> None:
        # The names behind these numbers are in a registry of the process that wrote the pickle.
        self.push_global("copyreg extension", str(code))

    def instance(self) -> None:
        names = self.text_global()
        arguments = tuple(self.pop_mark())
        self.push_global(*names)
        self.stack[-1] = Record(self.stack[-1], arguments)

    def object(self) -> None:
        items = self.pop_mark()
        self.stack.append(Record(items[0], tuple(items[1:])))

    def record(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(Record(function, arguments))

    def record_with_keywords(self) -> None:
        keywords, arguments, function = self.pop(), self.pop(), self.pop()
        self.stack.append(Record(function, arguments, state=keywords))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or function not in self.calls:
            self.stack.append(Record(function, arguments))
        elif isinstance(arguments, tuple):
            self.stack.append(self.calls[function](self, arguments))
        else:
            raise MalformedPickleError(f"it calls {short_name(function)} with a {_kind(arguments)}")

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        # Other objects are plain data: what PyTorch adds to them (a state dict's `_metadata`) is of no use here.

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise MalformedPickleError("it refers to an object outside of it where there can be none")
        self.stack.append(self.persistent(self.pop()))


def _python2_string(content: bytes) -> object:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


_SCALARS = frozenset({str, int, float, bool, bytes, complex, type(None)})


def _items_in_key(item: tuple[object, ...]) -> int:
    """How many items hashing visits: a tuple that holds itself many times over takes for ever."""
    pending: list[object] = [item]
    visited = 0
    while pending:
        current = pending.pop()
        visited += 1
        if visited > limits.MAX_TUPLE_KEY_ITEMS:
            raise MalformedPickleError("it uses a tuple as a key")
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
    return short_name(value.function) if isinstance(value.function, Global) else "call of something that is no name"


def short_name(name: Global) -> str:
    """A name, and as much of it as a line holds: a hostile one has millions of characters."""
    return str(name)[:MAX_SHOWN_CHARS]


# The instructions, by opcode


def _push(value: object) -> Callable[[PickleMachine], None]:
    return lambda machine: machine.stack.append(value)


def _put_byte(machine: PickleMachine) -> None:
    machine.memo[machine.data[machine.position]] = machine.stack[-1]
    machine.position += 1


def _put_text(machine: PickleMachine) -> None:
    index = machine.integer(machine.take_line())
    if not 0 <= index < limits.MAX_MEMO_INDEX:
        raise MalformedPickleError("it numbers a memo entry in a way that no writer does")
    machine.memo[index] = machine.stack[-1]


def _memoize(machine: PickleMachine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _tuple_of(size: int) -> Callable[[PickleMachine], None]:
    def make(machine: PickleMachine) -> None:
        stack = machine.stack
        if len(stack) < size:
            raise MalformedPickleError("an instruction finds too little on the stack")
        stack[-size:] = [tuple(stack[-size:])]

    return make


def _pop(machine: PickleMachine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _pop_to_mark(machine: PickleMachine) -> None:
    machine.pop_mark()


def _skip_frame(machine: PickleMachine) -> None:
    # A frame says how much to read ahead; everything is here already.
    machine.take(8)


def _append_one(machine: PickleMachine) -> None:
    item = machine.pop()
    machine.append([item])


def _set_one(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _stack_global(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push_global(module, name)


def _protocol(machine: PickleMachine) -> None:
    version = machine.take_byte()
    if version > 5:
        raise MalformedPickleError(f"it is written in pickle protocol {version}; the newest known one is 5")


def _dict_from_mark(machine: PickleMachine) -> None:
    items = machine.pop_mark()
    machine.stack.append({})
    machine.set_items(items)


def _empty_set(machine: PickleMachine) -> None:
    machine.spend(_SET_ITEMS)
    machine.stack.append(set())


def _push_popped(
    make: Callable[[PickleMachine, list[object]], object],
) -> Callable[[PickleMachine], None]:
    def push(machine: PickleMachine) -> None:
        items = machine.pop_mark()  # first: it changes which list the stack is
        machine.stack.append(make(machine, items))

    return push


_SET_ITEMS = 8  # for which an empty set has room from the start: it takes four times as much as a list

_STOP = ord(".")
_BININT1 = ord("K")
_BINGET, _LONG_BINGET, _LONG_BINPUT = ord("h"), ord("j"), ord("r")

# fmt: off
# BININT1, BINGET, LONG_BINGET, LONG_BINPUT and STOP are carried out by `PickleMachine.run`.
_INSTRUCTIONS: dict[int, Callable[[PickleMachine], None]] = {
    ord(opcode): instruction
    for opcode, instruction in {
        # Control
        "\x80": _protocol,
        "\x95": _skip_frame,
        "(": PickleMachine.mark,
        "0": _pop,
        "1": _pop_to_mark,
        "2": lambda machine: machine.stack.append(machine.stack[-1]),  # DUP
        # Memo
        "q": _put_byte,
        "p": _put_text,
        "\x94": _memoize,
        "g": lambda machine: machine.stack.append(machine.memo[machine.integer(machine.take_line())]),
        # Constants and numbers
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "M": lambda machine: machine.stack.append(machine.take_uint16()),
        "J": lambda machine: machine.stack.append(machine.take_int32()),
        "I": PickleMachine.text_int,
        "L": PickleMachine.text_long,
        "\x8a": lambda machine: machine.binary_long(machine.take_byte()),
        "\x8b": lambda machine: machine.binary_long(machine.take_int32()),
        "F": PickleMachine.text_float,
        "G": PickleMachine.binary_float,
        # Strings and bytes
        "S": PickleMachine.text_string,
        "T": lambda machine: machine.python2_string(machine.take_int32()),
        "U": lambda machine: machine.python2_string(machine.take_byte()),
        "V": PickleMachine.text_unicode,
        "X": lambda machine: machine.unicode(machine.take_uint32()),
        "\x8c": lambda machine: machine.unicode(machine.take_byte()),
        "\x8d": lambda machine: machine.unicode(machine.take_uint64()),
        "B": lambda machine: machine.stack.append(machine.take(machine.take_uint32())),
        "C": lambda machine: machine.stack.append(machine.take(machine.take_byte())),
        "\x8e": lambda machine: machine.stack.append(machine.take(machine.take_uint64())),
        "\x96": lambda machine: machine.stack.append(machine.take(machine.take_uint64())),  # BYTEARRAY8
        # Containers
        ")": _push(()),
        "\x85": _tuple_of(1),
        "\x86": _tuple_of(2),
        "\x87": _tuple_of(3),
        "t": _push_popped(lambda _, items: tuple(items)),
        "]": lambda machine: machine.stack.append([]),
        "l": _push_popped(lambda _, items: items),
        "}": lambda machine: machine.stack.append({}),
        "d": _dict_from_mark,
        "\x8f": _empty_set,
        "\x91": _push_popped(lambda machine, items: frozenset(machine.hashable(items))),
        "a": _append_one,
        "e": lambda machine: machine.append(machine.pop_mark()),
        "s": _set_one,
        "u": lambda machine: machine.set_items(machine.pop_mark()),
        "\x90": lambda machine: machine.add(machine.pop_mark()),
        # Names and calls
        "c": lambda machine: machine.push_global(*machine.text_global()),
        "\x93": _stack_global,
        "\x82": lambda machine: machine.extension(machine.take_byte()),
        "\x83": lambda machine: machine.extension(machine.take_uint16()),
        "\x84": lambda machine: machine.extension(machine.take_int32()),
        "R": PickleMachine.reduce,
        "i": PickleMachine.instance,
        "o": PickleMachine.object,
        "\x81": PickleMachine.record,
        "\x92": PickleMachine.record_with_keywords,
        "b": PickleMachine.build,
        "Q": PickleMachine.persistent_id,
        # Not here, so unknown: PERSID (persistent ids as text) and the out-of-band buffers of protocol 5; PyTorch
        # writes neither.
    }.items()
}
# fmt: on

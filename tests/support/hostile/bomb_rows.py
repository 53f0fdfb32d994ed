"""Bombs: little to read, much to do."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tests.support.hostile.assembler import (
    ENCODE,
    KEY,
    NO_HOOKS,
    ORDERED_DICT,
    REBUILD_V2,
    SIZE,
    Code,
    HostilePickle,
    build,
    call,
    checkpoint,
    data,
    persistent,
    stack_global,
    storage,
    stream,
    tensor,
    text_global,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PWNED = text_global("pwned", "pwned")
OLD_SET = text_global("__builtin__", "set")


def _runs(*runs: tuple[bytes, int]) -> bytes:
    """A checkpoint whose payload is opcode sequences, each repeated so many times. It need leave nothing."""
    return checkpoint(Code(b"".join(code * times for code, times in runs)))


def laughs(kind: str, levels: int = 60) -> Code:
    """A value that holds the one before twice, and so on: small in memory, endless to whoever walks it."""
    first, double = {
        "tuples": (b")", b"h\0h\0\x86"),
        "lists": (b"]", b"](h\0h\0e"),
        "dicts": (b"}", b"}(K\1h\0K\2h\0u"),
        "records": (PWNED, PWNED + b"h\0h\0\x86R"),
    }[kind]
    return Code(first + b"q\0" + (b"0" + double + b"q\0") * levels)


def deeply(kind: str, levels: int) -> Code:
    """Containers within containers."""
    match kind:
        case "tuples":
            return Code(b")" + b"\x85" * levels)
        case "lists":
            return Code(b"]" * levels + b"a" * (levels - 1))
        case "dicts":
            return Code(b"}K\1" * levels + b"N" + b"s" * levels)
        case "marks":
            return Code(b"(" * levels + b"t" * levels)
        case "records":
            return Code(PWNED + b"q\x000" + b"h\0" * levels + b")R" + b"\x85R" * (levels - 1))
        case _:
            return Code(b"N" + b"Q" * levels)  # persistent ids


def _called_for_arguments(kind: str, levels: int) -> bytes:
    """A call with what a call of something deep would make, in place of arguments."""
    return checkpoint(Code(ORDERED_DICT + deeply(kind, levels) + b")\x81R"))


def _colliding(opening: bytes, after_each: bytes, closing: bytes) -> Code:
    """Keys of one hash: an int hashes to itself modulo 2^61 - 1, so a table of n takes n * n / 2 steps."""
    multiples = (data(index * (2**61 - 1)) + after_each for index in range(50_000))
    return Code(opening + b"".join(multiples) + closing)


def _repeated(first: Code, again: bytes, count: int) -> Code:
    """A list of `count` results of one opcode sequence that uses memo entry 0."""
    return Code(first + b"q\x000](" + again * count + b"e")


def _many_tensors(count: int, size: object, stride: object) -> bytes:
    """Tensors that share one storage, one size and one stride."""
    shared = (REBUILD_V2, storage(), size, stride, NO_HOOKS)
    memo = b"".join(data(value) + b"q%c0" % index for index, value in enumerate(shared))
    one = b"h\0(h\1K\0h\2h\3\x89h\4tR"
    items = b"".join(data(f"k{index}") + one for index in range(count))
    return checkpoint(Code(memo + b"N"), module=Code(b"}(" + items + b"u"))


LONG_NAME = "n" * 2**20


def _with_key(key: bytes) -> Code:
    """A storage's persistent id with `key` as it stands in the stream."""
    return storage(key=Code(key))


def _amplified(value: object, again: bytes, times: int) -> bytes:
    return checkpoint(_repeated(data(value), again, times))


def _calls_of_a_long_name() -> bytes:
    return checkpoint(_repeated(stack_global("pwned", LONG_NAME), b"h\0)R", 100_000))


def _many_names() -> bytes:
    return checkpoint(Code(b"".join(b"cp\nn%d\n0" % index for index in range(50_000)) + b"N"))


def _bombs() -> Iterator[tuple[str, Callable[[], bytes], tuple[str, ...]]]:
    """(id, what builds it, names). A function each, so that the corpus itself stays small in memory."""
    values = {kind: laughs(kind) for kind in ("tuples", "lists", "dicts")}
    for kind, value in values.items():
        uses = {
            "a-value": value,
            "hooks": tensor(hooks=value),
            "a-size": tensor(size=value),
            "an-ordered-dict": call(ORDERED_DICT, value),
            "a-torch-size": call(SIZE, value),
            "a-persistent-id": persistent(value),
            "a-storage-key": storage(key=value),
        }
        for use, code in uses.items():
            yield f"laughs-of-{kind}-as-{use}", partial(checkpoint, code), ()
        yield f"laughs-of-{kind}-as-arguments", partial(checkpoint, call(PWNED, value)), ("pwned.pwned",)
        no_call = Code(ORDERED_DICT + value + b")\x81R")  # called with what a call of the laughs would make
        yield f"laughs-of-{kind}-called-for-arguments", partial(checkpoint, no_call), ()
        yield f"laughs-of-{kind}-as-state", partial(checkpoint, build(call(PWNED), value)), ("pwned.pwned",)
    yield "laughs-of-records", partial(checkpoint, laughs("records")), ("pwned.pwned",)
    by_dup = b"(" * 10 + data("lol") + (b"2" * 9 + b"t") * 10
    by_memo = b"(" * 10 + data("lol") + b"".join(b"q%c" % n + b"h%c" % n * 9 + b"t" for n in range(10))
    yield "laughs-by-dup", partial(checkpoint, Code(by_dup)), ()
    yield "laughs-by-memo", partial(checkpoint, Code(by_memo)), ()
    # hash() of a tuple walks it whole.
    tuples = values["tuples"]
    hashed: dict[str, bytes] = {
        "a-key": b"}" + tuples + b"Ns",
        "a-key-of-many": b"}(" + tuples + b"Nu",
        "a-key-of-an-ordered-dict": call(ORDERED_DICT, [(tuples, 1)]),
        "a-key-of-a-tensor": b"}" + tuples + tensor() + b"s",
        "a-member": b"\x8f(" + tuples + b"\x90",
        "a-member-of-a-frozenset": b"(" + tuples + b"\x91",
        "a-member-of-an-old-set": call(OLD_SET, [tuples]),
    }
    for use, bytecode in hashed.items():
        yield f"laughs-as-{use}", partial(checkpoint, Code(bytecode)), ()
    yield "colliding-keys", lambda: checkpoint(_colliding(b"}(", b"N", b"u")), ()
    yield "colliding-members", lambda: checkpoint(_colliding(b"\x8f(", b"", b"\x90")), ()
    good = data(KEY) + tensor()
    yield "colliding-tensors", lambda: checkpoint(module=_colliding(b"}(" + good, b"N", b"u")), ()

    for kind in ("tuples", "lists", "dicts", "marks", "records", "persistent-ids"):
        for levels in (2_000, 100_000):
            spelled = ("pwned.pwned",) if kind == "records" else ()
            yield f"deep-{kind}-{levels}", partial(lambda *of: checkpoint(deeply(*of)), kind, levels), spelled
            yield f"deep-{kind}-{levels}-called-for-arguments", partial(_called_for_arguments, kind, levels), spelled
    million: dict[str, tuple[bytes, bytes]] = {
        "a-value": (b"", b""),
        "a-key": (b"}", b"Ns"),  # hash() recurses in C, without a limit: the process dies
        "a-member": (b"\x8f(", b"\x90"),
        "a-persistent-id": (b"", b"Q"),
        "arguments": (REBUILD_V2, b"R"),
        "a-torch-size": (SIZE, b"R"),
        "state": (NO_HOOKS, b"b"),
    }
    for use, (before, after) in million.items():
        deep = partial(_runs, (before + b")", 1), (b"\x85", 10**6), (after, 1))
        yield f"deep-a-million-as-{use}", deep, ()
    cycles: dict[str, bytes] = {
        "list": b"]q\0h\0a",
        "dict-value": b"}q\0K\1h\0s",
        "dict-key": b"}q\0h\0Ns",
        "set": b"\x8fq\0(h\0\x90",
        "tuple-of-a-list": b"]q\0h\0\x85a",
        "ordered-dict": NO_HOOKS + b"q\0" + data("a") + b"h\0s",
        "two-lists": b"]q\0]q\1h\0ah\1a",
        "torch-size-in-a-list": b"]q\0" + SIZE + b"h\0\x85Ra",
    }
    for kind, bytecode in cycles.items():
        yield f"cycle-{kind}", partial(checkpoint, Code(bytecode)), ()
    cyclic = Code(b"}q\0(" + good + data("again") + b"h\0u")
    yield "cycle-module", lambda: checkpoint(module=cyclic), ()
    yield "cycle-top", lambda: stream(b"}q\0(" + data("module") + b"h\0u"), ()

    floods: dict[str, tuple[tuple[bytes, int], ...]] = {
        "marks": ((b"(", 10**6), (b"1", 10**6), (b"N", 1)),
        "none": ((b"N", 10**6), (b"0", 10**6 - 1)),
        "dup": ((b"(N", 1), (b"2", 10**6), (b"t", 1)),
        "lists": ((b"(", 1), (b"]", 10**6), (b"t", 1)),
        "dicts": ((b"(", 1), (b"}", 10**6), (b"t", 1)),
        "sets": ((b"(", 1), (b"\x8f", 10**6), (b"t", 1)),
        "memo": ((b"N", 1), (b"\x94", 10**6)),
        "headers": ((b"\x80\4", 10**6), (b"N", 1)),
        "frames": ((b"\x95" + bytes(8), 100_000), (b"N", 1)),
        "tuples-above-a-tall-stack": ((b"(", 1), (b"N", 10**6), (b"(t0", 500_000), (b"t", 1)),
        "names": ((b"(", 1), (b"cpwned\npwned\n", 100_000), (b"t", 1)),
    }
    for kind, runs in floods.items():
        spelled = ("pwned.pwned",) if kind == "names" else ()
        yield f"flood-of-{kind}", partial(_runs, *runs), spelled
    # Honest callables whose result is as large as what the memo holds, called again and again.
    megabyte, ints, pairs = "a" * 10**6, list(range(100_000)), [(n, n) for n in range(20_000)]
    of_memo = b"h\0\x85R"
    amplifiers: dict[str, tuple[object, bytes, int]] = {
        "encode": (megabyte, ENCODE + b"h\0" + data("latin1") + b"\x86R", 20_000),
        "torch-size": (ints, SIZE + of_memo, 50_000),
        "old-set": (ints, OLD_SET + of_memo, 50_000),
        "ordered-dict": (pairs, ORDERED_DICT + of_memo, 50_000),
        "storage-key": (megabyte, _with_key(b"h\0"), 20_000),
    }
    for kind, amplifier in amplifiers.items():
        yield f"amplify-{kind}", partial(_amplified, *amplifier), ()
    yield "amplify-record", partial(_amplified, ints, PWNED + of_memo, 50_000), ("pwned.pwned",)
    yield "amplify-long-name", _calls_of_a_long_name, ("pwned." + LONG_NAME,)
    yield "many-names", _many_names, tuple(f"p.n{index}" for index in range(50_000))
    yield "many-records", lambda: checkpoint(_repeated(PWNED, b"h\0)R", 500_000)), ("pwned.pwned",)
    yield "many-tensors", lambda: _many_tensors(50_000, (2, 4), (4, 1)), ()
    ones = (1,) * 10_000
    yield "many-tensors-of-many-dimensions", lambda: _many_tensors(20_000, ones, ones), ()
    yield "int-of-many-digits", lambda: checkpoint(1 << 10**6, key="iteration"), ()
    # What lazy arguments would do if somebody did call these.
    endless = call(text_global("itertools", "repeat"), (1, 1))
    for kind, function in (("torch-size", SIZE), ("ordered-dict", ORDERED_DICT), ("old-set", OLD_SET)):
        yield f"endless-{kind}", partial(checkpoint, call(function, endless)), ("itertools.repeat",)
    busy: dict[str, tuple[object, ...]] = {
        "builtins.pow": (7, 10**10),
        "builtins.bytearray": (2**40,),
        "torch.empty": (2**50,),
        "time.sleep": (10**6,),
        "re.match": ("(a+)+$", "a" * 64 + "b"),
    }
    for name, arguments in busy.items():
        yield f"busy-{name}", partial(checkpoint, call(text_global(*name.split(".")), *arguments)), (name,)


def bombs() -> Iterator[HostilePickle]:
    """Pickles of at most 4 MB that are meant to take all time, memory or stack.

    Whether one is opened or refused is the reader's choice; it must be soon, and in little memory.
    """
    for identifier, make, spelled in _bombs():
        yield HostilePickle(identifier, make, spelled, expect="either")

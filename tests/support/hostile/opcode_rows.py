"""Every way in which a pickle can call, import or reach into something."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from tests.support.hostile.assembler import (
    CANARY,
    COMMAND,
    ENCODE,
    EXEC,
    FLOAT_STORAGE,
    GETATTR,
    KEY,
    MAP,
    NO_HOOKS,
    ORDERED_DICT,
    OTHER_TENSORS,
    PYTHON,
    REBUILD_V2,
    SHELL,
    SIZE,
    SYSTEM,
    Code,
    Expectation,
    HostilePickle,
    build,
    call,
    checkpoint,
    data,
    newobj,
    parameter,
    persistent,
    stack_global,
    storage,
    stream,
    tensor,
    text_global,
    then,
    u32,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def _in_text() -> bytes:
    """A whole checkpoint of protocol 0: text, except for the tensor."""
    return b"".join(
        (
            pickle.MARK + pickle.DICT + pickle.PUT + b"0\n",
            b"Vpayload\n" + b"p1\n",
            b"cos\nsystem\n" + b"p2\n" + b"(" + f"V{COMMAND}\n".encode() + b"p3\n" + b"tp4\nRp5\ns",
            b"S'module'\n" + data({KEY: tensor()}) + pickle.SETITEM + pickle.STOP,
        )
    )


def _put(code: Code, index: int) -> Code:
    return Code(code + pickle.LONG_BINPUT + u32(index))


def _get(index: int) -> Code:
    return Code(pickle.LONG_BINGET + u32(index))


TENSOR = text_global("torch", "Tensor")
NAMESPACE = text_global("types", "SimpleNamespace")
TYPE = text_global("builtins", "type")
SET_STATE = build(build(newobj(NAMESPACE), {"__setstate__": SYSTEM}), COMMAND)


def _inst(module: str, name: str, *arguments: object) -> Code:
    """`module.name(*arguments)` without REDUCE."""
    return Code(pickle.MARK + b"".join(map(data, arguments)) + pickle.INST + f"{module}\n{name}\n".encode())


def _obj(function: Code, *arguments: object) -> Code:
    return Code(pickle.MARK + function + b"".join(map(data, arguments)) + pickle.OBJ)


def _newobj_ex(cls: Code, *arguments: object) -> Code:
    return Code(cls + data(arguments) + data({}) + pickle.NEWOBJ_EX)


# (id, names, code): each makes the marker under plain pickle.
OPCODES: tuple[tuple[str, tuple[str, ...], bytes], ...] = (
    ("reduce", ("os.system",), SHELL),
    ("reduce-stack-global", ("os.system",), call(stack_global("os", "system"), COMMAND)),
    ("reduce-short-binstring-operands", ("os.system",), b"U\x02osU\x06system\x93" + data((COMMAND,)) + b"R"),
    (
        "reduce-binstring-operands",
        ("os.system",),
        b"T\x02\0\0\0osT\x06\0\0\0system\x93" + data((COMMAND,)) + b"R",
    ),
    (
        "reduce-short-binunicode-operands",
        ("os.system",),
        b"\x8c\x02os\x8c\x06system\x93" + data((COMMAND,)) + b"R",
    ),
    (
        "reduce-binunicode8-operands",
        ("os.system",),
        pickle.BINUNICODE8
        + u64(2)
        + b"os"
        + pickle.BINUNICODE8
        + u64(6)
        + b"system"
        + pickle.STACK_GLOBAL
        + data((COMMAND,))
        + b"R",
    ),
    ("reduce-through-memo", ("os.system",), then(_put(SYSTEM, 7), Code(_get(7) + data((COMMAND,)) + b"R"))),
    ("reduce-through-memoize", ("os.system",), SYSTEM + pickle.MEMOIZE + b"0h\0" + data((COMMAND,)) + b"R"),
    ("reduce-through-dup", ("os.system",), SYSTEM + b"2" + data((COMMAND,)) + b"R\x86"),
    ("reduce-twice", ("builtins.getattr", "os.system"), call(call(GETATTR, SYSTEM, "__call__"), COMMAND)),
    ("reduce-argument-of-honest", ("os.system",), call(ORDERED_DICT, [("a", SHELL)])),
    (
        "reduce-codec-through-memo",
        ("os.system",),
        then(_put(ENCODE, 7), _put(SYSTEM, 7), Code(_get(7) + data((COMMAND,)) + b"R")),
    ),
    ("obj", ("os.system",), _obj(SYSTEM, COMMAND)),
    ("obj-stack-global", ("os.system",), _obj(stack_global("os", "system"), COMMAND)),
    (
        "newobj",
        ("builtins.map", "os.system"),
        newobj(text_global("builtins", "bytes"), newobj(MAP, SYSTEM, [COMMAND])),
    ),
    (
        "newobj-ex",
        ("builtins.map", "os.system"),
        _newobj_ex(text_global("builtins", "bytes"), _newobj_ex(MAP, SYSTEM, [COMMAND])),
    ),
    (
        "newobj-ex-keywords",
        ("functools.partial", "subprocess.run"),
        call(
            Code(
                text_global("functools", "partial")
                + data((text_global("subprocess", "run"), COMMAND))
                + data({"shell": True})
                + pickle.NEWOBJ_EX
            )
        ),
    ),
    (
        "newobj-partial-setstate",
        ("functools.partial", "os.system", "builtins.len"),
        call(
            build(
                newobj(text_global("functools", "partial"), text_global("builtins", "len")),
                (SYSTEM, (COMMAND,), {}, None),
            )
        ),
    ),
    ("build-setstate", ("types.SimpleNamespace", "os.system"), SET_STATE),
    (
        "build-slots",
        ("types.SimpleNamespace", "os.system"),
        build(build(newobj(NAMESPACE), (None, {"__setstate__": SYSTEM})), COMMAND),
    ),
    (
        "build-module",
        ("os.path", "os.path.pwned", "os.system"),
        then(
            build(text_global("os", "path"), {"pwned": SYSTEM}),
            call(text_global("os.path", "pwned"), COMMAND),
        ),
    ),
    (
        "build-module-that-honest-names-come-from",
        ("torch._utils", "builtins.exec"),
        then(build(text_global("torch", "_utils"), {"_rebuild_tensor_v2": EXEC}), call(REBUILD_V2, PYTHON)),
    ),
    (
        "build-function-attributes",
        ("torch._utils._rebuild_tensor_v2.a", "torch._utils._rebuild_tensor_v2.b"),
        then(
            build(REBUILD_V2, (None, {"a": "os", "b": "system"})),
            call(
                Code(
                    text_global("torch._utils", "_rebuild_tensor_v2.a")
                    + text_global("torch._utils", "_rebuild_tensor_v2.b")
                    + pickle.STACK_GLOBAL
                ),
                COMMAND,
            ),
        ),
    ),
    (
        "append",
        ("types.SimpleNamespace", "os.system"),
        build(newobj(NAMESPACE), {"append": SYSTEM}) + data(COMMAND) + b"a",
    ),
    (
        "appends",
        ("types.SimpleNamespace", "os.system"),
        build(newobj(NAMESPACE), {"append": SYSTEM}) + b"(" + data(COMMAND) + b"e",
    ),
    (
        "additems",
        ("types.SimpleNamespace", "os.system"),
        build(newobj(NAMESPACE), {"add": SYSTEM}) + b"(" + data(COMMAND) + b"\x90",
    ),
    (
        "setitem",
        ("builtins.type", "builtins.exec"),
        newobj(call(TYPE, "X", (), {"__setitem__": EXEC})) + data(PYTHON) + data({}) + b"s",
    ),
    (
        "setitems",
        ("builtins.type", "builtins.exec"),
        newobj(call(TYPE, "X", (), {"__setitem__": EXEC})) + b"(" + data(PYTHON) + data({}) + b"u",
    ),
    (
        "hash-of-a-key",
        ("builtins.type", "functools.partial", "os.system"),
        data(
            {
                newobj(
                    call(
                        TYPE,
                        "X",
                        (),
                        {"__hash__": call(text_global("functools", "partial"), SYSTEM, COMMAND)},
                    )
                ): 0
            }
        ),
    ),
    *(
        (
            f"ext{width}",
            ("copyreg.add_extension",),
            then(
                call(text_global("copyreg", "add_extension"), "os", "system", code),
                Code(opcode + code.to_bytes(width, "little") + data((COMMAND,)) + b"R"),
            ),
        )
        for width, opcode, code in (
            (1, pickle.EXT1, 0xF1),
            (2, pickle.EXT2, 0xF1F1),
            (4, pickle.EXT4, 0x71F1F1F1),
        )
    ),
    # where the payload sits
    ("in-a-tuple", ("os.system",), data(((((SHELL,), 1),),))),
    (
        "in-a-tuple-of-each-length",
        ("os.system",),
        data(1) + data(2) + SHELL + b"\x87" + data(3) + b"\x86\x85",
    ),
    ("in-a-list", ("os.system",), data([[[SHELL]]])),
    ("in-a-dict", ("os.system",), data({"a": {"b": {1: SHELL}}})),
    ("in-a-set", ("os.system",), data({SHELL})),
    ("in-a-frozenset", ("os.system",), b"(" + SHELL + pickle.FROZENSET),
    ("as-a-key", ("os.system",), data({SHELL: 1})),
    ("as-a-key-within-a-tuple", ("os.system",), data({(1, SHELL): 1})),
    ("as-an-ordered-dicts-state", ("os.system",), build(NO_HOOKS, {"_metadata": SHELL})),
    ("as-a-size", ("os.system",), call(SIZE, (2, SHELL))),
    ("as-a-persistent-id", ("os.system",), persistent(SHELL)),
    ("in-a-persistent-id", ("os.system",), storage(location=SHELL)),
    ("in-a-storage-type", ("os.system",), storage(kind=SHELL)),
    ("in-the-hooks-of-a-tensor", ("os.system",), tensor(hooks=call(ORDERED_DICT, [(0, SHELL)]))),
    ("in-requires-grad-of-a-tensor", ("os.system",), tensor(requires_grad=SHELL)),
    ("in-the-hooks-of-a-parameter", ("os.system",), parameter(hooks=SHELL)),
    ("in-the-state-of-a-tensor", ("os.system",), build(tensor(), {"ds_shape": SHELL})),
    ("popped", ("os.system",), SHELL + b"0N"),
    ("popped-object", ("os.system",), _obj(SYSTEM, COMMAND) + b"0N"),
    ("popped-with-its-mark", ("os.system",), b"(" + SHELL + b"1N"),
    ("overwritten-in-a-dict", ("os.system",), b"}(" + data("a") + SHELL + data("a") + b"Nu"),
    ("overwritten-in-the-memo", ("os.system",), SHELL + b"q\0" + b"0Nq\0"),
    ("only-in-the-memo", ("os.system",), SHELL + b"q\x63" + b"0N"),
    # what deceived scanners
    (
        "memo-index-not-counted",
        ("os.system",),
        data("os")
        + b"q\0"
        + data("system")
        + b"q\x01"
        + data("torch")
        + b"\x94"
        + data("Size")
        + b"\x94000"
        + b"0h\0h\x01\x93"
        + data((COMMAND,))
        + b"R",
    ),
    (
        "memo-decoy-strings",
        ("os.system",),
        b"\x8c\x02osq\x020\x8c\x06systemq\x030\x8c\x05torchq\x000\x8c\x0bLongStorageq\x010h\x02h\x03\x93"
        + data((COMMAND,))
        + b"R",
    ),
    ("two-protocol-headers", ("os.system",), b"\x80\x02\x80\x04" + SHELL),
    ("many-frames", ("os.system",), b"\x95" + u64(0) + b"\x95" + u64(len(SHELL)) + SHELL),
    (
        "name-split-by-get",
        ("os.system",),
        data("system") + b"q\x050" + data("os") + b"h\x05\x93" + data((COMMAND,)) + b"R",
    ),
    (
        "names-computed",
        ("builtins.getattr",),
        call(GETATTR, "", "join")
        + b"q\x05"
        + data((("o", "s"),))
        + b"R"
        + b"h\x05"
        + data((tuple("system"),))
        + b"R\x93"
        + data((COMMAND,))
        + b"R",
    ),
    (
        "honest-name-with-a-dot",
        ("torch._utils.sys.modules.__getitem__", "builtins.getattr"),
        call(
            call(GETATTR, call(text_global("torch", "_utils.sys.modules.__getitem__"), "os"), "system"),
            COMMAND,
        ),
    ),
    # after a good start
    (
        "after-every-kind-of-data",
        ("os.system",),
        b"(K\3M\4\4J\5\0\0\0\x8a\1\6\x8b\1\0\0\0\7G"
        + bytes(8)
        + b"C\1aB\1\0\0\0b\x8e"
        + u64(1)
        + b"c\x96"
        + u64(1)
        + b"dT\1\0\0\0fU\1g"
        + b"X\1\0\0\0i\x8c\1j\x8d"
        + u64(1)
        + b"kN\x88\x89"
        + SHELL
        + b"t",
    ),
    ("after-ten-thousand-honest-opcodes", ("os.system",), b"N0" * 10_000 + SHELL),
)

# Instructions of protocols 0 and 1 only, which PyTorch does not write: refused, before any name is learned.
OLD_OPCODES: dict[str, bytes] = {
    "inst": _inst("os", "system", COMMAND),
    "string-operands": b"S'os'\nS'system'\n\x93" + data((COMMAND,)) + b"R",
    "unicode-operands": b"Vos\nVsystem\n\x93" + data((COMMAND,)) + b"R",
    "memo": b"N0Np65537\n0" + SYSTEM + b"p1\n0g1\n" + data((COMMAND,)) + b"R",
    "memo-decoy": b"Vos\np2\n0Vsystem\np3\n0Vtorch\np0\n0VLongStorage\np1\n0g2\ng3\n\x93" + data((COMMAND,)) + b"R",
    "list": b"(" + SHELL + b"l",
    "dict": b"(" + data("a") + SHELL + b"d",
    "after-every-kind-of-data": b"(I1\nI01\nL2L\nF0.5\nS'e'\nVh\n" + SHELL + b"t",
}


def opcodes() -> Iterator[HostilePickle]:
    """Every way of a pickle to call, import and reach into things."""
    # Only whoever runs the payload knows what these name.
    unknowable = {"ext1", "ext2", "ext4", "names-computed", "build-function-attributes"}
    # A storage or a tensor that PyTorch would not describe so may be an error.
    abused = {
        "as-a-persistent-id",
        "in-a-persistent-id",
        "in-a-storage-type",
        "build-module-that-honest-names-come-from",
    }
    for identifier, names, code in OPCODES:
        expect: Expectation = "either" if identifier in unknowable | abused else "open"
        yield HostilePickle(f"opcode-{identifier}", checkpoint(Code(code)), names, expect=expect, fires=True)
    yield HostilePickle("opcode-protocol-0", _in_text(), expect="refuse", fires=True)
    for identifier, code in OLD_OPCODES.items():
        yield HostilePickle(f"opcode-old-{identifier}", checkpoint(Code(code)), expect="refuse", fires=True)
    by_name = checkpoint(_inst("__builtin__", "exec", PYTHON), 2)
    yield HostilePickle("opcode-python-2-inst", by_name, expect="refuse", fires=True)
    honest = checkpoint(_inst("collections", "OrderedDict"))
    yield HostilePickle("honest-class-by-inst", honest, expect="refuse")
    for protocol in range(6):
        yield HostilePickle(f"opcode-header-{protocol}", checkpoint(SHELL, protocol), ("os.system",), fires=True)
    for name, module in (
        ("after", {KEY: tensor(), "evil": SHELL}),
        ("before", {"evil": SHELL, KEY: tensor()}),
    ):
        row = checkpoint(module=module)
        yield HostilePickle(f"opcode-{name}-a-good-tensor", row, ("os.system",), fires=True)
    yield HostilePickle(
        "opcode-as-the-key-of-a-tensor",
        checkpoint(module={SHELL: tensor()}),
        ("os.system",),
        expect="either",
        fires=True,
    )
    yield HostilePickle("opcode-as-the-module", checkpoint(module=SHELL), ("os.system",), expect="either", fires=True)
    yield HostilePickle("opcode-as-a-top-level-key", checkpoint(key=SHELL), ("os.system",), expect="either", fires=True)
    yield HostilePickle("opcode-alone", stream(SHELL), ("os.system",), expect="either", fires=True)
    # The first known of all: compile, eval into globals, and take the result out of them.
    space = _put(call(text_global("__builtin__", "globals")), 100)
    compiled = call(text_global("__builtin__", "compile"), f"found = {PYTHON}", "", "exec")
    get = call(text_global("__builtin__", "getattr"), text_global("__builtin__", "dict"), "get")
    evaluated = call(text_global("__builtin__", "eval"), compiled, _get(100))
    sour = then(space, evaluated, call(get, _get(100), "found"))
    # Names that only old protocols translate; what counts is the file's own spelling.
    for identifier, names, code in (
        ("commands", ("commands.getoutput",), call(text_global("commands", "getoutput"), COMMAND)),
        ("builtin", ("__builtin__.eval",), call(text_global("__builtin__", "eval"), PYTHON)),
        ("set", ("os.system",), call(text_global("__builtin__", "set"), [SHELL])),
        ("reduce", ("__builtin__.reduce", "os.system"), then(text_global("__builtin__", "reduce"), SHELL)),
        (
            "sour",
            tuple(f"__builtin__.{name}" for name in ("globals", "compile", "eval", "getattr", "dict")),
            sour,
        ),
    ):
        yield HostilePickle(f"opcode-python-2-{identifier}", checkpoint(code, 2), names, fires=True)


def _odd(family: str, variants: Mapping[str, bytes], expect: Expectation, *names: str) -> Iterator[HostilePickle]:
    for name, code in variants.items():
        yield HostilePickle(f"{family}-{name}", checkpoint(Code(code)), names, expect=expect)


def _calls(function: Code, variants: Mapping[str, tuple[object, ...]]) -> dict[str, bytes]:
    return {name: call(function, *arguments) for name, arguments in variants.items()}


def _from_type(function: Code, *arguments: object) -> Code:
    return call(text_global("torch._tensor", "_rebuild_from_type_v2"), function, TENSOR, arguments, {"a": SHELL})


def odd_opcodes() -> Iterator[HostilePickle]:
    """Opcodes on values that they are not meant for. Nothing is claimed to fire."""
    yield from _odd("ext", {"1": b"\x82\x2a", "2": b"\x83\x2a\x2a", "4": b"\x84\x2a\x2a\x2a\x2a"}, "either")
    yield from _odd("ext", {"1-zero": b"\x82\0", "4-negative": b"\x84\xff\xff\xff\xff"}, "either")
    storage_in_text = b"P('storage', torch.FloatStorage, '0', 'cpu', 16)\n"
    yield from _odd("persid", {"text": b"Ppwned\n", "text-like-a-storage": storage_in_text}, "refuse")
    good = ("storage", FLOAT_STORAGE, "0", "cpu", 16)
    ids: dict[str, object] = {
        "none": None,
        "int": 1,
        "string": "storage",
        "bytes": b"storage",
        "list": list(good),
        "dict": {},
        "nothing": (),
        "one": good[:1],
        "two": good[:2],
        "four": good[:4],
        "six": (*good, None),  # as a legacy file has it
        "seven": (*good, None, None),
        "other-tag": ("pwned", *good[1:]),
        "bytes-tag": (b"storage", *good[1:]),
        "source-code": ("module", FLOAT_STORAGE, "pwned.py", PYTHON),  # legacy files kept a class's source
        "persistent-id": storage(),
        "tensor": tensor(),
        "list-in-itself": Code(b"]q\0h\0a"),
    }
    yield from _odd("persid-of", {name: persistent(value) for name, value in ids.items()}, "either")
    yield from _odd(
        "persid-of", {"gadgets": persistent(("storage", SYSTEM, COMMAND, SYSTEM, 16))}, "either", "os.system"
    )
    for spelled in (
        "torch.PwnedStorage",
        "pwned.FloatStorage",
        "torch._utils.FloatStorage",
        "torch.FloatTensor",
    ):
        kind = text_global(*spelled.rsplit(".", 1))
        yield from _odd("storage-type", {spelled: storage(kind=kind)}, "either", spelled)
    keys: dict[str, object] = {
        "up": "../../../../etc/passwd",
        "absolute": "/etc/passwd",
        "pickle": "../data.pkl",
        "nul": "0\0",
        "empty": "",
        "dot": ".",
        "backslash": "..\\0",
        "newline": "0\n",
        "surrogate": "\ud800",
        "int": 0,
        "bytes": b"0",
        "tuple": ("0",),
        "missing": "1",
        "padded": "00",
        "ansi": "\x1b[31m0",
        "long": "0" * 70_000,
    }
    yield from _odd("storage-key", {name: storage(key=key) for name, key in keys.items()}, "either")
    changes: dict[str, dict[str, object]] = {
        "types": {"kind": text_global("torch", "HalfStorage"), "numel": 32},
        "sizes": {"numel": 8},
        "devices": {"location": "cuda:0"},
    }
    twice = {name: data((storage(), storage(**change))) for name, change in changes.items()}
    yield from _odd("storage-with-two", twice, "either")

    # honest callables, dishonestly used
    encodings: dict[str, tuple[object, ...]] = {
        "nothing": (),
        "none": (None, "latin1"),
        "bytes": (b"pwned", "latin1"),
        "tuple": (("pwned",), "latin1"),
        "no-encoding": ("pwned",),
        "rot13": ("pwned", "rot13"),
        "idna": ("pwned", "idna"),
        "zlib": (b"pwned", "zlib"),
        "unknown-codec": ("pwned", CANARY),
        "dotted-codec": ("pwned", f"{CANARY}.x"),
        "undefined": ("pwned", "undefined"),
        "nul-codec": ("pwned", "lat\0in1"),
        "int-codec": ("pwned", 1),
        "surrogate-codec": ("pwned", "\ud800"),
        "beyond-latin1": ("\u20ac", "latin1"),
        "surrogate": ("\ud800", "latin1"),
        "handler": ("\u20ac", "latin1", "xmlcharrefreplace"),
        "unknown-handler": ("\u20ac", "latin1", "pwned"),
    }
    yield from _odd("encode", _calls(ENCODE, encodings), "either")
    sizes: dict[str, tuple[object, ...]] = {
        "nothing": (),
        "none": (None,),
        "int": (5,),
        "string": ("22",),
        "strings": (("2", "4"),),
        "floats": ((2.0, 4.0),),
        "nan": ((float("nan"),),),
        "negative": ((-1, 2),),
        "huge": ((2**200,),),
        "nested": (((2,), (4,)),),
        "two": ((2,), (4,)),
        "dict": ({2: 4},),
    }
    yield from _odd("size", _calls(SIZE, sizes), "either")
    pairs: dict[str, tuple[object, ...]] = {
        "none": (None,),
        "int": (5,),
        "string": ("ab",),
        "strings": (["ab", "cd"],),
        "unhashable": ([([], 1)],),
        "odd": ([(1, 2, 3)],),
        "two": ({}, {}),
        "tensor": (tensor(),),
    }
    yield from _odd("ordered-dict", _calls(ORDERED_DICT, pairs), "either")
    members: dict[str, tuple[object, ...]] = {
        "none": (None,),
        "int": (5,),
        "string": ("ab",),
        "unhashable": ([[]],),
        "two": ([], []),
    }
    yield from _odd("old-set", _calls(text_global("__builtin__", "set"), members), "either")
    ndarray = text_global("numpy", "ndarray")
    reconstruct = text_global("numpy._core.multiarray", "_reconstruct")
    yield from _odd("ndarray-of", _calls(reconstruct, {"nothing": (), "huge": (ndarray, (2**62,), b"b")}), "either")
    yield from _odd("ndarray-of", _calls(reconstruct, {"a-function": (SYSTEM, (0,), b"b")}), "open", "os.system")
    yield from _odd("ndarray", _calls(ndarray, {"called": ((2**40,),)}), "either")
    dtypes: dict[str, tuple[object, ...]] = {
        "nothing": (),
        "object": ("O",),
        "long": ("i4," * 10_000,),
        "void": ("V9999999999",),
    }
    yield from _odd("dtype", _calls(text_global("numpy", "dtype"), dtypes), "either")
    good_arguments = (storage(), 0, (2, 4), (4, 1), False, NO_HOOKS)
    yield from _odd(
        "honest",
        {
            "function-as-a-class": newobj(REBUILD_V2, storage()),
            "class-as-an-object": _obj(FLOAT_STORAGE, 2**40),
            "class-called": call(FLOAT_STORAGE, 2**40),
            "class-by-newobj": newobj(ORDERED_DICT),
            "class-by-newobj-ex": _newobj_ex(ORDERED_DICT),
            "class-by-obj": _obj(ORDERED_DICT),
            "size-by-newobj": newobj(SIZE, (2, 4)),
            "tensor-by-obj": _obj(REBUILD_V2, *good_arguments),
            "tensor-with-two-arguments": call(REBUILD_V2, *good_arguments[:2]),
            "tensor-with-nine-arguments": call(REBUILD_V2, *good_arguments, None, None, None),
            "parameter-of-a-parameter": parameter(data=parameter()),
            "parameter-of-a-storage": parameter(data=storage()),
        },
        "either",
    )

    for name in OTHER_TENSORS:
        function = text_global("torch._utils", name)
        other: dict[str, tuple[object, ...]] = {
            "nothing": (),
            "none": (None,) * 8,
            "tensors": (tensor(),) * 8,
            "lists": ([],) * 8,
        }
        yield from _odd(f"honest{name}", _calls(function, other), "open")
        calling = {"a-payload": call(function, SHELL, SHELL), "a-payload-in-a-type": _from_type(function, SHELL)}
        yield from _odd(f"honest{name}-of", calling, "open", "os.system")
    layout = text_global("torch.serialization", "_get_layout")
    layouts: dict[str, tuple[object, ...]] = {"nothing": (), "none": (None,), "two": ("a", "b"), "text": ("pwned",)}
    yield from _odd("layout", _calls(layout, layouts), "open")

    # BUILD, APPEND and the like on what they do not fit
    states: dict[str, tuple[object, object]] = {
        "none": (None, {"a": 1}),
        "string": ("a", {"__class__": 1}),
        "tuple": ((1,), (None, {"a": 1})),
        "list": ([], {"append": NO_HOOKS}),
        "dict": ({}, {"__class__": FLOAT_STORAGE}),
        "bytes": (call(ENCODE, "a", "latin1"), {"a": 1}),
        "storage": (storage(), {"numel": 10**9}),
        "tensor": (tensor(), {"size": (10**9,), "offset": -1, "key": "x"}),
        "tensor-by-slots": (tensor(), (None, {"size": (10**9,)})),
        "tensor-by-tuple": (tensor(), (1, 2, 3)),
        "size": (call(SIZE, (2, 4)), {"__dict__": {}}),
        "ordered-dict-class": (NO_HOOKS, {"__class__": FLOAT_STORAGE, "__dict__": {}}),
        "ordered-dict-methods": (NO_HOOKS, {"items": 1, "keys": 2, "__iter__": 3}),
        "ordered-dict-by-slots": (NO_HOOKS, (None, {"__class__": FLOAT_STORAGE})),
        "ordered-dict-by-tuple": (NO_HOOKS, (1, 2, 3)),
        "ordered-dict-by-none": (NO_HOOKS, None),
        "ordered-dict-by-odd-keys": (NO_HOOKS, {1: 2, None: 3, (): 4}),
        "function": (REBUILD_V2, {"__code__": 1}),
        "class": (FLOAT_STORAGE, {"__init__": 1}),
        "itself": (Code(data([]) + b"q\0"), Code(b"h\0")),
    }
    yield from _odd("build-on", {name: build(data(on), state) for name, (on, state) in states.items()}, "either")
    additions = {
        "append": b"Na",
        "appends": b"(NNe",
        "setitem": b"NNs",
        "setitems": b"(NNu",
        "additems": b"(NN\x90",
    }
    targets = {"storage": storage(), "tensor": tensor(), "class": FLOAT_STORAGE, "none": data(None)}
    for on_name, target in targets.items():
        added = {f"{on_name}-{name}": target + code for name, code in additions.items()}
        yield from _odd("add-to", added, "either")
    further = {
        "build": b"Nb",
        "slots": b"N}\x86b",
        "reduce": b")R",
        "newobj": b")\x81",
        "newobj-ex": b")}\x92",
    }
    on_record = {name: SHELL + code for name, code in (additions | further).items()}
    yield from _odd("record", on_record, "open", "os.system")
    changed = {"__class__": EXEC, "__dict__": {}, "__reduce__": EXEC, "name": "torch.Size", "module": "torch"}
    yield from _odd(
        "record",
        {
            "changed-by-build": build(newobj(NAMESPACE), changed),
            "changed-by-slots": build(newobj(NAMESPACE), (changed, changed)),
        },
        "open",
        "types.SimpleNamespace",
        "builtins.exec",
    )
    in_itself = {
        "in-its-own-state": newobj(NAMESPACE) + b"q\0}" + data("me") + b"h\0sb",
        "in-its-own-arguments": NAMESPACE + b"]q\0h\0a\x85R",
    }
    yield from _odd("record", in_itself, "open", "types.SimpleNamespace")
    own_key = {"as-its-own-key": newobj(NAMESPACE) + b"q\0}h\0h\0sb"}
    yield from _odd("record", own_key, "either", "types.SimpleNamespace")

"""Pickles that deceive whoever reads their names and keys, that are none, and whose tensors lie."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from tests.support.hostile.assembler import (
    COMMAND,
    FLOAT_STORAGE,
    KEY,
    SHELL,
    SIZE,
    SYSTEM,
    Code,
    Expectation,
    HostilePickle,
    call,
    checkpoint,
    data,
    parameter,
    stack_global,
    storage,
    stream,
    tensor,
    tensor_v3,
    text_global,
    then,
    u32,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# --- names and keys that are meant to deceive whoever reads them in a terminal, a file or a table -----------

DECEPTIVE: Mapping[str, str] = {
    "newline": "a\nb",
    "carriage-return": "good\rbad",
    "ansi-colour": "\x1b[31mred\x1b[0m",
    "ansi-clear-screen": "\x1b[2J\x1b[H",
    "ansi-title": "\x1b]0;pwned\x07",
    "ansi-link": "\x1b]8;;file:///pwned\x1b\\text\x1b]8;;\x1b\\",
    "ansi-8-bit": "\x9b31mred",
    "rich-markup": "[red]a[/red]",
    "rich-link": "[link=file:///pwned]a[/link]",
    "rich-closing": "a[/]",
    "rich-unknown-closing": "[/nothing]",
    "rich-emoji": ":skull:",
    "bidi-override": "a\u202egpj.exe",
    "bidi-isolate": "a\u2066b\u2069",
    "zero-width": "a\u200bb\ufeff",
    "lone-surrogate": "a\ud800",
    "surrogate-pair-in-halves": "\ud83d\ude00",
    "noncharacter": "\uffff",
    "beyond-the-basic-plane": "\U0001f480",
    "combining": "a" + "\u0301" * 500,
    "nul": "a\0b",
    "backspace": "bad\b\b\bgood",
    "delete": "a\x7f",
    "tab": "a\tb",
    "empty": "",
    "space": " ",
    "dots": "...",
    "path": "../../etc/passwd",
    "format": "{0.__class__}%s%n",
    "quote": "'\"`$(pwned)",
    "metadata": "__metadata__",
    "formula": "=cmd()",
    "wide": "\u4f60" * 300,
    "megabyte": "k" * 2**20,
}


def names() -> Iterator[HostilePickle]:
    """Globals whose names deceive: printed inert, listed whole or cut, and never resolved."""
    for name, value in DECEPTIVE.items():
        yield HostilePickle(
            f"deceptive-name-{name}", checkpoint(call(stack_global("pwned", value), 1)), (f"pwned.{value}",)
        )
        yield HostilePickle(
            f"deceptive-module-{name}", checkpoint(call(stack_global(value, "pwned"), 1)), (f"{value}.pwned",)
        )
    # Names that are almost honest: none of them is.
    almost_honest = (
        ("collections", "orderedDict"),
        ("collections ", "OrderedDict"),
        ("collections", "OrderedDict "),
        ("c\u043ellections", "OrderedDict"),
        ("collections", "OrderedDict\0"),
        ("collections.OrderedDict", ""),
        ("", "collections.OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v22"),
        ("torch.Size", "__new__"),
        ("torch", "FloatStorage.x"),
        ("torch.os", "system"),
        ("torch.", "Storage"),
        ("torch", "Storage"),
        ("numpy", "ndarray.tofile"),
        ("_codecs", "encode.__call__"),
        ("__builtin__", "set.__init__"),
    )
    for index, (module, almost) in enumerate(almost_honest):
        code = call(stack_global(module, almost), 1)
        yield HostilePickle(f"almost-honest-{index}", checkpoint(code), (f"{module}.{almost}",))
    # The same words, split elsewhere: a list of joined names would take it for the honest one.
    split = call(stack_global("torch", "_utils._rebuild_tensor_v2"), 1)
    yield HostilePickle("honest-name-split-elsewhere", checkpoint(split), expect="either")
    carriage = Code(b"cos\r\nsystem\r\n" + data((COMMAND,)) + b"R")
    yield HostilePickle("name-with-carriage-returns", checkpoint(carriage), ("os\r.system\r",))
    many = (f"pwned.n{index}" for index in range(2_000))
    yield HostilePickle(
        "two-thousand-names",
        lambda: checkpoint(then(*(text_global("pwned", f"n{index}") for index in range(2_000)))),
        tuple(many),
    )


def keys() -> Iterator[HostilePickle]:
    """State dicts whose keys deceive, cannot be written, or are no strings."""
    for name, value in DECEPTIVE.items():
        yield HostilePickle(f"deceptive-key-{name}", checkpoint(module={KEY: tensor(), value: tensor()}))
        long_key = f"{KEY.rpartition('.')[0]}.{value}"
        yield HostilePickle(f"deceptive-lora-key-{name}", checkpoint(module={KEY: tensor(), long_key: tensor()}))
    odd_keys: dict[str, object] = {
        "none": None,
        "true": True,
        "int": 7,
        "huge-int": 10**5000,
        "nan": float("nan"),
        "bytes": KEY.encode(),
        "tuple": (KEY,),
        "tensor": tensor(),
        "storage": storage(),
        "size": call(SIZE, (2, 4)),
    }
    for name, odd_key in odd_keys.items():
        yield HostilePickle(f"key-is-{name}", checkpoint(module={odd_key: tensor()}), expect="either")
    unhashable = pickle.EMPTY_DICT + data([]) + data(1) + pickle.SETITEM
    yield HostilePickle("key-is-list", checkpoint(Code(unhashable)), expect="either")
    twice = pickle.EMPTY_DICT + pickle.MARK + 2 * (data(KEY) + tensor()) + pickle.SETITEMS
    yield HostilePickle("key-twice", checkpoint(module=Code(twice)), expect="either")
    numbers = {
        "negative": "-1",
        "huge": "9" * 5000,
        "arabic": "\u0660",
        "plus": "+0",
        "underscore": "0_0",
        "zeros": "00",
    }
    for name, number in numbers.items():
        layer = KEY.replace("layers.0", f"layers.{number}")
        yield HostilePickle(
            f"layer-number-{name}", checkpoint(module={layer: tensor(), KEY: tensor()}), expect="either"
        )


# --- streams that are no pickles ----------------------------------------------------------------------------


def malformed() -> Iterator[HostilePickle]:
    """Streams that end, lie or stumble. Some fire first under plain `pickle`: it runs what it reads."""
    # Whoever calls nothing and reads no frames need not see that these would fail.
    uncalled = {
        "frame-beyond-the-end",
        "reduce-of-no-tuple",
        "reduce-of-none",
        "reduce-of-a-string",
        "newobj-of-a-string",
        "newobj-of-no-tuple",
        "newobj-ex-of-no-dict",
    }
    good = checkpoint()
    good_body = good[2:-1]
    hostile = checkpoint(SHELL)
    whole: dict[str, bytes] = {
        "nothing": b"",
        "only-stop": b".",
        "only-a-header": b"\x80\x02",
        "no-stop": good[:-1],
        "header-6": stream(good_body, 6),
        "header-255": stream(good_body, 255),
        "mark-left-on-the-stack": stream(b"("),
        "unknown-opcode": stream(good_body + b"\xff"),
        "pop-mark-without-mark": stream(b"1"),
        "tuple-without-mark": stream(b"t"),
        "list-without-mark": stream(b"l"),
        "dict-without-mark": stream(b"d"),
        "appends-without-mark": stream(b"]e"),
        "setitems-without-mark": stream(b"}u"),
        "inst-without-mark": stream(b"ios\nsystem\n"),
        "nul-bytes": bytes(64),
        "newlines": b"\n" * 64,
        "text": b"hello, this is not a pickle\n",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "frame-beyond-the-end": stream(b"\x95" + u64(2**60) + good_body),
        "global-without-a-name": stream(b"cos\n"),
        "global-of-invalid-utf-8": stream(b"cmod\n\xf8\n"),
        "inst-of-invalid-utf-8": stream(b"(i\xff\xfe\nx\n"),
        "string-of-invalid-utf-8": stream(b"X\x02\0\0\0\xc3\x28"),
    }
    for name, content in whole.items():
        expect: Expectation = "either" if name in uncalled else "refuse"
        yield HostilePickle(f"malformed-{name}", content, expect=expect)
    # Plain pickle runs the payload in these, and only then fails.
    after: dict[str, bytes] = {
        "no-stop": hostile[:-1],
        "unknown-opcode": stream(SHELL + b"X"),
        "unset-memo": stream(SHELL + b"0h\x63"),
        "invalid-utf-8": stream(SHELL + b"X\x02\0\0\0\xc3\x28"),
        "stack-global-of-an-int": stream(SHELL + b"0K\x2a" + data("os") + b"\x93"),
        "stack-global-of-bytes": stream(SHELL + b"0" + data(b"os") + data("system") + b"\x93"),
        "stack-global-of-a-bytearray": stream(SHELL + b"0" + data("os") + b"\x96" + u64(6) + b"system\x93"),
        "stack-global-of-an-unset-memo": stream(SHELL + b"0h\x03" + data("os") + b"\x93"),
        "tuple-without-a-mark": stream(SHELL + b"t"),
        "truncated-bytes": stream(SHELL + b"B\xff\xff\xff\xff"),
    }
    for name, content in after.items():
        yield HostilePickle(f"malformed-after-firing-{name}", content, expect="refuse", fires=True)
    body: dict[str, bytes] = {
        "pop-nothing": b"00000000",
        "dup-nothing": b"(2",
        "dict-of-three": b"(NNNd",
        "setitems-of-three": b"}(NNNu",
        "setitem-with-an-unhashable-key": b"}]Ns",
        "additems-unhashable": b"\x8f(]\x90",
        "frozenset-unhashable": b"(]\x91",
        "tuple3-across-a-mark": b"N(NN\x87",
        "reduce-across-a-mark": SYSTEM + b"()R",
        "obj-of-nothing": b"(o",
        "put-nothing": b"(q\0",
        "memoize-nothing": b"(\x94",
        "get-unset": b"h\xfe",
        "long-get-unset": b"j\xff\xff\xff\xff",
        "text-get-unset": b"g999\n",
        "text-get-negative": b"Np-1\ng-1\n",
        "text-get-word": b"gx\n",
        "text-put-word": b"Npx\n",
        "text-put-huge": b"Np" + b"9" * 5000 + b"\n",
        "reduce-of-no-tuple": SYSTEM + data([COMMAND]) + b"R",
        "reduce-of-none": b"N)R",
        "reduce-of-a-string": data("os.system") + data((COMMAND,)) + b"R",
        "newobj-of-a-string": data("os.system") + b")\x81",
        "newobj-of-no-tuple": SYSTEM + b"N\x81",
        "newobj-ex-of-no-dict": SYSTEM + b")N\x92",
        "append-to-a-tuple": b")Na",
        "setitem-on-a-list": b"]NNs",
        "additems-on-a-list": b"](N\x90",
        "stack-global-of-none": b"NN\x93",
        "int-word": b"Ix\n",
        "int-empty": b"I\n",
        "int-of-a-million-digits": b"I" + b"9" * 10**6 + b"\n",
        "long-of-a-million-digits": b"L" + b"9" * 10**6 + b"L\n",
        "long-word": b"LxL\n",
        "float-word": b"Fx\n",
        "string-unquoted": b"Sx\n",
        "string-half-quoted": b"S'x\n",
        "unicode-escape-beyond": b"V\\U00110000\n",
        "unicode-escape-cut": b"V\\u12\n",
        "int-true": b"I01\n",
        "int-padded": b"I 7 \n",
        "int-arabic": "I\u0667\n".encode(),
        "int-underscore": b"I1_0\n",
        "int-nul": b"I7\0\n",
        "long-without-its-l": b"L7\n",
        "float-nan": b"Fnan\n",
        "float-beyond": b"F1e999\n",
        "float-underscore": b"F1_0\n",
        "string-escapes": b"S'\\x41\\n\\'\\d'\n",
        "unicode-surrogate": b"V\\ud800\n",
        "text-put-10-to-18": b"Np1000000000000000000\n",
        "short-binunicode-cut": b"\x8c\xff",
        "binstring-negative": b"T\xff\xff\xff\xff",
        "binbytes-4-gigabytes": b"B\xff\xff\xff\xff",
        "binunicode-4-gigabytes": b"X\xff\xff\xff\xff",
        "binbytes8-2-to-60": b"\x8e" + u64(2**60),
        "binbytes8-2-to-64": b"\x8e" + u64(2**64 - 1),
        "binunicode8-2-to-60": b"\x8d" + u64(2**60),
        "bytearray8-2-to-60": b"\x96" + u64(2**60),
        "bytearray8-16-gigabytes": b"\x96" + u64(2**34),
        "long4-2-gigabytes": b"\x8b\xff\xff\xff\x7f",
        "long4-negative": b"\x8b\xff\xff\xff\xff",
        "long1-cut": b"\x8a\xff\x01",
        "next-buffer": b"\x97",
        "readonly-buffer": b"N\x98",
    }
    for name, code in body.items():
        expect = "either" if name in uncalled else "refuse"
        yield HostilePickle(f"malformed-{name}", checkpoint(Code(code)), expect=expect)
    # Unusual, but what plain pickle does with it is clear.
    unusual: dict[str, bytes] = {
        "header-in-the-middle": b"\x80\x04N",
        "frame-of-nothing": b"\x95" + u64(0) + b"N",
        "frame-too-long": b"\x95" + u64(10**6) + b"N",
        "frame-too-short": b"\x95" + u64(2) + data("longer than its frame"),
        "frame-in-a-frame": b"\x95" + u64(30) + b"N\x95" + u64(2) + b"0N",
        "frame-ends-in-a-length": b"\x95" + u64(2) + data(b"\x93" * 600),
        "frame-ends-in-a-global": b"\x95" + u64(4) + b"ccollections\nOrderedDict\n",
        "long-empty": b"\x8a\0",
        "string-latin1": b"U\x02\xff\xfe",
        "put-huge": b"Nr\xff\xff\xff\x7f",
        "put-2-to-32": b"Nr\xff\xff\xff\xff",
        "put-then-memoize": b"Nq\x05K\x01\x94",
        "pop-a-mark": b"N(0",
        "mark-popped-within-a-tuple": b"N(NN10",
        "bytearray": b"\x96" + u64(2) + b"ab",
    }
    for name, code in unusual.items():
        yield HostilePickle(f"unusual-{name}", checkpoint(Code(code)), expect="either")
    # A frame that ends within BINBYTES: whoever obeys it reads on elsewhere than whoever does not.
    hidden = (SHELL + pickle.MARK).ljust(261, pickle.NONE)
    straddling = b"\x95" + u64(2) + b"B" + u32(263) + b"\0\0" + hidden + b"1"
    padding = data("a" * (2**17 - 17)) + pickle.POP
    yield HostilePickle(
        "unusual-frame-hides-a-call", checkpoint(Code(padding + b"(" + straddling + b"N")), expect="either"
    )
    # More than one pickle: data.pkl has one, and what follows is nobody's.
    yield HostilePickle("second-pickle-hostile", good + hostile, expect="either")
    yield HostilePickle("opcode-after-stop", good + SHELL, expect="either")
    yield HostilePickle("newlines-after-stop", good + b"\n\n\t\t", expect="either")
    yield HostilePickle("first-pickle-hostile", stream(SHELL) + good, ("os.system",), expect="either", fires=True)


# --- tensors that lie ---------------------------------------------------------------------------------------


def tensors() -> Iterator[HostilePickle]:
    """Tensors whose geometry is impossible or whose arguments are of the wrong type."""
    lies: dict[str, dict[str, object]] = {
        "negative-size": {"size": (-2, 4)},
        "two-negative-sizes": {"size": (-2, -4)},
        "negative-stride": {"stride": (-4, 1), "offset": 7},
        "negative-offset": {"offset": -1},
        "offset-beyond": {"offset": 9},
        "offset-huge": {"offset": 2**70},
        "offset-wraps-around": {"offset": 2**64 - 8},
        "size-beyond": {"size": (5, 4)},
        "size-huge": {"size": (2**62, 4)},
        "size-product-wraps-to-zero": {"size": (2**32, 2**32), "stride": (2**32, 1)},
        "size-product-wraps-to-eight": {"size": (2**61 + 1, 8), "stride": (8, 1)},
        "size-beyond-64-bits": {"size": (2**64 + 2, 4)},
        "stride-beyond": {"stride": (13, 1)},
        "stride-huge": {"stride": (2**63, 1)},
        "stride-wraps-around": {"stride": (2**64 - 4, 1), "offset": 4},
        "stride-wraps-in-bytes-where-size-is-1": {"size": (1, 4), "stride": (2**62, 2)},
        "size-overflows-by-strides-of-0": {"size": (2**62,) * 64, "stride": (0,) * 64},
        "size-overflows-but-for-a-zero": {"size": (0, *(2**62,) * 31), "stride": (0,) * 32},
        "bytes-overflow-by-strides-of-0": {"size": (2**61,), "stride": (0,)},
        "one-stride-too-few": {"stride": (1,)},
        "one-stride-too-many": {"stride": (4, 1, 1)},
        "storage-shorter-than-its-tensor": {"storage": storage(numel=4)},
        "storage-longer-than-its-bytes": {"storage": storage(numel=17), "size": (17,), "stride": (1,)},
        "storage-of-nothing": {"storage": storage(numel=0)},
        "storage-negative": {"storage": storage(numel=-16)},
        "storage-huge": {"storage": storage(numel=2**62)},
        "storage-wraps-around": {"storage": storage(numel=2**62 + 16)},
        "size-of-a-4-kilobyte-int": {"size": (2, 1 << 32768)},
        "offset-of-a-4-kilobyte-int": {"offset": 1 << 32768},
        "ten-thousand-dimensions-of-2": {"size": (2,) * 10_000, "stride": (1,) * 10_000},
        "a-hundred-4-kilobyte-ints": {"size": (1 << 32768,) * 100, "stride": (1,) * 100},
    }
    for name, change in lies.items():
        yield HostilePickle(f"tensor-{name}", checkpoint(module={KEY: tensor(**change)}), expect="refuse")
    odd: dict[str, dict[str, object]] = {
        "no-dimensions": {"size": (), "stride": ()},
        "empty": {"size": (0, 4)},
        "empty-and-huge": {"size": (0, 2**62), "stride": (2**62, 1)},
        "empty-beyond-its-storage": {"size": (0,), "stride": (1,), "offset": 1000},
        "all-strides-zero": {"stride": (0, 0)},
        "huge-by-stride-zero": {"size": (2**40, 4), "stride": (0, 1)},
        "overlapping": {"size": (8, 8), "stride": (1, 1)},
        "transposed": {"stride": (1, 2)},
        "stride-huge-where-size-is-1": {"size": (1, 4), "stride": (2**62, 1)},
        "ten-thousand-dimensions-of-1": {"size": (1,) * 10_000, "stride": (1,) * 10_000},
    }
    for name, change in odd.items():
        yield HostilePickle(f"tensor-{name}", checkpoint(module={KEY: tensor(**change)}), expect="either")
    wrong: dict[str, object] = {
        "none": None,
        "bool": True,
        "minus-one": -1,
        "huge": 2**70,
        "float": 2.0,
        "nan": float("nan"),
        "string": "pwned",
        "bytes": b"pwned",
        "list": [2],
        "dict": {2: 4},
        "set": {2},
        "strings": ("2", "4"),
        "floats": (2.0, 4.0),
        "bools": (True, True),
        "nested": ((2,), (4,)),
        "class": FLOAT_STORAGE,
        "storage": storage(),
        "tensor": tensor(),
        "global": SYSTEM,
        "record": SHELL,
        "in-itself": Code(b"]q\xf0h\xf0a"),
    }
    arguments = ("storage", "offset", "size", "stride", "requires_grad", "hooks")
    makers: tuple[tuple[str, Callable[..., Code], tuple[str, ...]], ...] = (
        ("v2", tensor, arguments),
        ("v3", tensor_v3, (*arguments, "dtype")),
        ("parameter", parameter, ("data", "requires_grad", "hooks")),
        ("storage", storage, ("tag", "kind", "key", "location", "numel")),
    )
    for maker_name, make, fields in makers:
        for argument in fields:
            for name, value in wrong.items():
                made = make(**{argument: value})
                yield HostilePickle(
                    f"{maker_name}-{argument}-is-{name}",
                    checkpoint(module={KEY: tensor(storage=made) if make is storage else made}),
                    ("os.system",) if value in (SYSTEM, SHELL) else (),
                    expect="either",
                )

"""Pickles put together opcode by opcode, the rows of the corpus, and the one good tensor of every row."""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What a payload makes in the current folder when it runs, as a shell command and as Python.
MARKER = "pwned"
COMMAND = f"echo {MARKER} > {MARKER}"
PYTHON = f"open({MARKER!r}, 'w').close()"

# A module that makes the marker as soon as it is imported, for rows where the import alone is the attack.
# Whoever wants them to fire writes this into `pwned_canary.py` and `hubconf.py` in the current folder.
CANARY = "pwned_canary"
CANARY_SOURCE = f"{PYTHON}\ndef canary(*args): pass\n"

# The functions by which PyTorch writes tensors that are not a view of one storage.
OTHER_TENSORS = (
    "_rebuild_sparse_tensor",
    "_rebuild_qtensor",
    "_rebuild_nested_tensor",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_wrapper_subclass",
    "_rebuild_device_tensor_from_cpu_tensor",
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_xla_tensor",
)

# The globals that honest checkpoints name. Every other one is to be listed by `inspect`.
VOCABULARY = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch.BFloat16Storage",
        "torch.HalfStorage",
        "torch.FloatStorage",
        "torch.ByteStorage",
        "torch.storage.UntypedStorage",
        "torch.float32",
        "torch.Size",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
        "__builtin__.set",
        "builtins.set",
        "builtins.bytes",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",
        *(f"torch._utils.{name}" for name in OTHER_TENSORS),
        "torch.nested._internal.nested_tensor._rebuild_njt",
        "torch.distributed.tensor.DTensor",
        "torch.serialization._get_layout",
    }
)

Expectation = Literal["open", "refuse", "either"]


@dataclass(frozen=True)
class HostilePickle:
    """A pickle to be met where a checkpoint's `data.pkl` is expected.

    Attributes:
        source: the pickle, or a function that builds a large one.
        names: the globals outside `VOCABULARY` that it names, as it spells them, each once. To be listed by
            whoever opens it, also where the value is thrown away again. Empty where it is an error first.
        expect: "open": a sound checkpoint except for what it smuggles in. "refuse": malformed, or its tensors
            lie: to open it and read its tensors' bytes is an error. "either": both are right. In no case may
            anything run, and an error must be a clean one.
        fires: plain `pickle.load` makes the marker (shown by a test).
    """

    id: str
    source: bytes | Callable[[], bytes]
    names: tuple[str, ...] = ()
    expect: Expectation = "open"
    fires: bool = False

    @property
    def pickle(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source()


@dataclass(frozen=True)
class HostileFile:
    """A file or folder to be met where a checkpoint or an exported file is expected.

    Attributes:
        content: the file's bytes, or a function that writes the file or folder at the path it is given.
        name: what to call it. A name with no dot is a folder's.
        names, expect: as in `HostilePickle`.
        fires: plain `torch.load` makes the marker (shown by a test).
    """

    id: str
    content: bytes | Callable[[Path], object]
    name: str = "checkpoint.pt"
    names: tuple[str, ...] = ()
    expect: Expectation = "refuse"
    fires: bool = False

    def write(self, folder: Path) -> Path:
        """Write it into `folder`, which should be empty, and return the path to open."""
        path = folder / self.name
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)
        return path


# --- a tiny pickle assembler --------------------------------------------------------------------------------


class Code(bytes):
    """Opcodes that leave one value on the stack."""


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def data(value: object) -> Code:
    """Opcodes for plain data, in which `Code` may be nested."""
    match value:
        case Code():
            return value
        case None:
            return Code(pickle.NONE)
        case bool():
            return Code(pickle.NEWTRUE if value else pickle.NEWFALSE)
        case int() if -(2**31) <= value < 2**31:
            return Code(pickle.BININT + struct.pack("<i", value))
        case int():
            encoded = pickle.encode_long(value)
            if len(encoded) < 256:
                return Code(pickle.LONG1 + bytes([len(encoded)]) + encoded)
            return Code(pickle.LONG4 + struct.pack("<i", len(encoded)) + encoded)
        case float():
            return Code(pickle.BINFLOAT + struct.pack(">d", value))
        case str():
            encoded = value.encode("utf-8", "surrogatepass")
            return Code(pickle.BINUNICODE + u32(len(encoded)) + encoded)
        case bytes():
            return Code(pickle.BINBYTES + u32(len(value)) + value)
        case tuple():
            return Code(pickle.MARK + b"".join(map(data, value)) + pickle.TUPLE)
        case list():
            return Code(pickle.EMPTY_LIST + pickle.MARK + b"".join(map(data, value)) + pickle.APPENDS)
        case set():
            return Code(pickle.EMPTY_SET + pickle.MARK + b"".join(map(data, value)) + pickle.ADDITEMS)
        case dict():
            items = b"".join(data(key) + data(item) for key, item in value.items())
            return Code(pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS)
    raise TypeError(f"no opcodes for {value!r}")


def text_global(module: str, name: str) -> Code:
    return Code(pickle.GLOBAL + f"{module}\n{name}\n".encode())


def stack_global(module: object, name: object) -> Code:
    return Code(data(module) + data(name) + pickle.STACK_GLOBAL)


def call(function: Code, *arguments: object) -> Code:
    return Code(function + data(arguments) + pickle.REDUCE)


def newobj(cls: Code, *arguments: object) -> Code:
    return Code(cls + data(arguments) + pickle.NEWOBJ)


def build(instance: Code, state: object) -> Code:
    return Code(instance + data(state) + pickle.BUILD)


def then(*values: Code) -> Code:
    """Run all, keep the last."""
    return Code(b"".join(value + pickle.POP for value in values[:-1]) + values[-1])


def stream(code: bytes, protocol: int = 4) -> bytes:
    """A whole pickle. Only from protocol 4 on are dotted names followed, whatever the opcodes are."""
    return pickle.PROTO + bytes([protocol]) + code + pickle.STOP


SYSTEM = text_global("os", "system")
EVAL = text_global("builtins", "eval")
EXEC = text_global("builtins", "exec")
MAP = text_global("builtins", "map")
GETATTR = text_global("builtins", "getattr")
IMPORT = text_global("builtins", "__import__")
ORDERED_DICT = text_global("collections", "OrderedDict")
SIZE = text_global("torch", "Size")
ENCODE = text_global("_codecs", "encode")
FLOAT_STORAGE = text_global("torch", "FloatStorage")
REBUILD_V2 = text_global("torch._utils", "_rebuild_tensor_v2")
REBUILD_V3 = text_global("torch._utils", "_rebuild_tensor_v3")
REBUILD_PARAMETER = text_global("torch._utils", "_rebuild_parameter")
NO_HOOKS = call(ORDERED_DICT)
SHELL = call(SYSTEM, COMMAND)  # the payload where it does not matter which

# The one good tensor of every row: a LoRA key of 2 x 4 float32 in a storage of 16.
KEY = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0"
STORAGES: dict[str, bytes] = {"0": struct.pack("<16f", *range(16))}


def persistent(pid: object) -> Code:
    return Code(data(pid) + pickle.BINPERSID)


def storage(**changes: object) -> Code:
    """The persistent id that stands for a storage, with some of its five fields changed."""
    fields = {"tag": "storage", "kind": FLOAT_STORAGE, "key": "0", "location": "cpu", "numel": 16} | changes
    return persistent(tuple(fields.values()))


def tensor(**changes: object) -> Code:
    """A good tensor of 2 x 4, with some of the arguments of `_rebuild_tensor_v2` changed."""
    arguments = {
        "storage": storage(),
        "offset": 0,
        "size": (2, 4),
        "stride": (4, 1),
        "requires_grad": False,
        "hooks": NO_HOOKS,
    } | changes
    return call(REBUILD_V2, *arguments.values())


def tensor_v3(**changes: object) -> Code:
    arguments = {
        "storage": storage(kind=text_global("torch.storage", "UntypedStorage"), numel=64),
        "offset": 0,
        "size": (2, 4),
        "stride": (4, 1),
        "requires_grad": False,
        "hooks": NO_HOOKS,
        "dtype": text_global("torch", "float32"),
    } | changes
    return call(REBUILD_V3, *arguments.values())


def parameter(**changes: object) -> Code:
    arguments = {"data": tensor(), "requires_grad": True, "hooks": NO_HOOKS} | changes
    return call(REBUILD_PARAMETER, *arguments.values())


def checkpoint(payload: object = None, protocol: int = 4, *, module: object = None, key: object = "payload") -> bytes:
    """A whole checkpoint's pickle: the payload first, then a `module` of one good tensor."""
    top = data(key) + data(payload) + data("module") + data({KEY: tensor()} if module is None else module)
    return stream(pickle.EMPTY_DICT + pickle.MARK + top + pickle.SETITEMS, protocol)

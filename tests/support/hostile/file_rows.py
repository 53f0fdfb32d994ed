"""Files of other kinds: `torch.save` before the zip format, what only is called a checkpoint, safetensors."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from tests.support.hostile.assembler import (
    EVAL,
    FLOAT_STORAGE,
    KEY,
    PYTHON,
    SHELL,
    STORAGES,
    Expectation,
    HostileFile,
    call,
    checkpoint,
    data,
    persistent,
    stream,
    tensor,
    u64,
)
from tests.support.hostile.bomb_rows import deeply, laughs
from tests.support.hostile.pickle_rows import DECEPTIVE
from tests.support.hostile.zip_rows import torch_zip, variants_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# --- torch.save before the zip format -----------------------------------------------------------------------

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM_INFO: dict[str, object] = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def legacy_file(**parts: bytes) -> bytes:
    """A file as `torch.save` wrote it before the zip format: five pickles, then the storages.

    Any part can be replaced: magic, protocol, system, checkpoint, keys, storages.
    """
    honest = {
        "magic": stream(data(MAGIC), 2),
        "protocol": stream(data(1001), 2),
        "system": stream(data(SYSTEM_INFO), 2),
        "checkpoint": legacy_checkpoint(),
        "keys": stream(data(["0"]), 2),
        "storages": u64(16) + STORAGES["0"],
    }
    return b"".join((honest | parts).values())


def legacy_checkpoint(payload: object = None, **changes: object) -> bytes:
    """`checkpoint`, with a storage's persistent id as legacy files have it, some of its fields changed."""
    fields = {
        "tag": "storage",
        "kind": FLOAT_STORAGE,
        "key": "0",
        "location": "cpu",
        "numel": 16,
        "view": None,
    }
    return checkpoint(payload, module={KEY: tensor(storage=persistent(tuple((fields | changes).values())))})


def legacy() -> Iterator[HostileFile]:
    """Legacy `.pt` files that call or lie."""
    firing = {
        "magic": stream(SHELL + b"0" + data(MAGIC)),
        "protocol": stream(SHELL + b"0" + data(1001)),
        "system": stream(SHELL + b"0" + data(SYSTEM_INFO)),
        "checkpoint": legacy_checkpoint(SHELL),
        "keys": stream(SHELL + b"0" + data(["0"])),
    }
    for part, content in firing.items():
        expect: Expectation = "open" if part == "checkpoint" else "either"
        whole = legacy_file(**{part: content})
        yield HostileFile(f"legacy-call-in-{part}", whole, names=("os.system",), expect=expect, fires=True)
    by_eval = legacy_file(magic=stream(call(EVAL, f"[{PYTHON}, {MAGIC}][1]")))
    yield HostileFile("legacy-magic-by-eval", by_eval, names=("builtins.eval",), expect="either", fires=True)
    big_endian = SYSTEM_INFO | {"little_endian": False}
    lying = {
        "magic-zero": legacy_file(magic=stream(data(0), 2)),
        "protocol-2000": legacy_file(protocol=stream(data(2000), 2)),
        "keys-is-none": legacy_file(keys=stream(data(None), 2)),
        "keys-is-a-string": legacy_file(keys=stream(data("0"), 2)),
        "keys-of-ints": legacy_file(keys=stream(data([0]), 2)),
        "keys-of-lists": legacy_file(keys=stream(data([[]]), 2)),
        "keys-missing": legacy_file(keys=stream(data([]), 2)),
        "keys-unknown": legacy_file(keys=stream(data(["pwned"]), 2)),
        "keys-twice": legacy_file(keys=stream(data(["0", "0"]), 2)),
        "keys-of-a-hundred-thousand": legacy_file(keys=stream(data([str(n) for n in range(100_000)]), 2)),
        "storage-cut": legacy_file(storages=u64(16) + bytes(63)),
        "storage-count-cut": legacy_file(storages=u64(16)[:7]),
        "storage-count-zero": legacy_file(storages=u64(0)),
        "storage-count-lower": legacy_file(storages=u64(8) + bytes(32)),
        "storage-count-higher": legacy_file(storages=u64(32) + bytes(128)),
        "storage-count-negative": legacy_file(storages=u64(2**64 - 16) + STORAGES["0"]),
        "storage-count-2-to-60": legacy_file(storages=u64(2**60) + STORAGES["0"]),
        "no-storages": legacy_file(storages=b""),
        "no-keys": legacy_file(keys=b"", storages=b""),
    }
    for kind in ("tuples", "lists", "dicts", "records"):
        lying[f"version-is-a-bomb-of-{kind}"] = legacy_file(protocol=stream(laughs(kind), 2))
        lying[f"version-is-of-deep-{kind}"] = legacy_file(protocol=stream(deeply(kind, 2_000), 2))
    lying["version-of-many-digits"] = legacy_file(protocol=stream(data(1 << 8_000), 2))
    yield from variants_of("legacy", lying, "refuse")
    whole = legacy_file(checkpoint=b"")
    cuts = {f"cut-at-{at}": whole[:at] for at in (1, 10, 20, 30, 60)}
    yield from variants_of("legacy", cuts, "refuse")
    views: dict[str, object] = {
        "honest": ("0", 0, 16),
        "beyond": ("0", 8, 16),
        "negative": ("0", -8, 16),
        "of-itself": ("0", 0, 8),
        "huge": ("0", 2**62, 2**62),
        "int": 1,
        "nothing": (),
    }
    unclear = {f"view-{name}": legacy_file(checkpoint=legacy_checkpoint(view=view)) for name, view in views.items()}
    source = persistent(("module", FLOAT_STORAGE, "pwned.py", PYTHON))
    unclear |= {
        "big-endian": legacy_file(system=stream(data(big_endian), 2)),
        "system-is-none": legacy_file(system=stream(data(None), 2)),
        "numel-other-than-stored": legacy_file(checkpoint=legacy_checkpoint(numel=8)),
        "bytes-behind": legacy_file() + bytes(100),
        "source-code": legacy_file(checkpoint=legacy_checkpoint(source)),
    }
    yield from variants_of("legacy", unclear, "either")


# --- other things called checkpoint.pt ----------------------------------------------------------------------


def _pointing_at(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def strangers() -> Iterator[HostileFile]:
    """Files of other kinds, and files that are no files."""
    good = torch_zip(checkpoint())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3490000000\n"
    kinds = {
        "nothing": b"",
        "one-byte": b"\x80",
        "zeros": bytes(4096),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "git-lfs-pointer": pointer.encode(),
        "web-page": b"<!DOCTYPE html><html><title>404</title></html>",
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "tar": b"storages".ljust(257, b"\0") + b"ustar\0" + bytes(10_000),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "npy": b"\x93NUMPY\1\0" + bytes(100),
        "bare-pickle-of-a-gadget": stream(SHELL),
        "json": b'{"module": {}}',
        "text": b"latest\n",
    }
    for name, content in kinds.items():
        yield HostileFile(f"stranger-{name}", content)
    both = safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8 + len(good)]}}, bytes(8) + good)
    yield HostileFile("stranger-safetensors-and-zip", both, expect="either")
    yield HostileFile("stranger-pickle-and-zip", legacy_file() + good, expect="either")
    yield HostileFile("stranger-folder", lambda path: path.mkdir())
    yield HostileFile("stranger-link-to-itself", _pointing_at("checkpoint.pt"))
    yield HostileFile("stranger-link-to-nothing", _pointing_at("nothing.pt"))
    yield HostileFile("stranger-endless-device", _pointing_at("/dev/zero"))
    yield HostileFile("stranger-empty-device", _pointing_at("/dev/null"))
    yield HostileFile("stranger-named-pipe", os.mkfifo)  # to open it is to wait for somebody who writes


# --- safetensors --------------------------------------------------------------------------------------------

EXPORTED = "pytorch_lora_weights.safetensors"
LORA_KEY = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file. A header of bytes is taken as it is; `length` is what it claims to be long."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return u64(len(encoded) if length is None else length) + encoded + body


def one_tensor(**changes: object) -> dict[str, object]:
    """The header entry of a tensor of two float32."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def _many_entries(path: Path) -> None:
    entries = {f"k{index}": one_tensor(data_offsets=[8 * index, 8 * index + 8]) for index in range(100_000)}
    path.write_bytes(safetensors(entries, bytes(800_000)))


def _too_many_entries(path: Path) -> None:
    entries = {f"{index:x}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(100_001)}
    path.write_bytes(safetensors(entries))


def _long_header(path: Path) -> None:
    path.write_bytes(safetensors(json.dumps({"a": one_tensor()}).encode() + b" " * 2**23, bytes(8)))


def safetensors_files() -> Iterator[HostileFile]:
    """Safetensors files whose header lies."""
    body = bytes(8)
    one = json.dumps(one_tensor()).encode()
    good = safetensors({"a": one_tensor()}, body)
    raw: dict[str, bytes] = {
        "nothing": b"",
        "length-only": u64(0),
        "length-cut": bytes(7),
        "header-cut": good[:20],
        "body-cut": good[:-1],
        "body-too-long": good + b"x",
        "length-2-to-60": safetensors(b"{}", length=2**60),
        "length-2-to-64": safetensors(b"{}", length=2**64 - 1),
        "length-one-more": safetensors(b"{}", length=3),
        "length-zero": safetensors(b"{}", length=0),
        "header-is-nul": safetensors(bytes(64)),
        "header-is-spaces": safetensors(b" " * 64),
        "header-is-a-list": safetensors([]),
        "header-is-a-number": safetensors(b"1"),
        "header-is-null": safetensors(b"null"),
        "header-is-a-string": safetensors(b'"a"'),
        "header-is-no-json": safetensors(b'{"a"'),
        "header-is-no-utf-8": safetensors(b'{"\xff": ' + one + b"}", body),
        "header-is-utf-16": safetensors(json.dumps({"a": one_tensor()}).encode("utf-16"), body),
        "header-begins-with-a-byte-order-mark": safetensors(b'\xef\xbb\xbf{"a": ' + one + b"}", body),
        "header-is-padded-with-nul": safetensors(b'{"a": ' + one + b"}" + bytes(8), body),
        "deep-lists": safetensors(b"[" * 100_000 + b"]" * 100_000),
        "deep-objects": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "deep-shape": safetensors(b'{"a":{"dtype":"F32","shape":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
        "deep-and-cut": safetensors(b'{"a":' + b"[" * 100_000),
        "int-of-many-digits": safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**5 + b"]}}", body),
        "int-of-5000-digits": safetensors({"a": one_tensor(shape=[10**4000 * 2])}, body),
        "int-with-an-exponent": safetensors(b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', body),
        "float-beyond": safetensors(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', body),
        "nan": safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', body),
        "surrogate-in-a-key": safetensors(b'{"\\ud800": ' + one + b"}", body),
        "surrogate-in-the-metadata": safetensors(b'{"__metadata__":{"a":"\\ud800"},"a":' + one + b"}", body),
    }
    # A reader may take these, which the safetensors library refuses, or the other way round.
    unclear = ("length-only", "length-cut", "header-begins", "header-is-padded", "body-too-long", "int-with")
    for name, content in raw.items():
        expect: Expectation = "either" if name.startswith(unclear) else "refuse"
        yield HostileFile(f"safetensors-{name}", content, name=EXPORTED, expect=expect)

    lies: dict[str, object] = {
        "is-null": None,
        "is-a-list": [],
        "is-a-string": "F32",
        "is-empty": {},
        "dtype-missing": {"shape": [2], "data_offsets": [0, 8]},
        "dtype-unknown": one_tensor(dtype="F33"),
        "dtype-lower": one_tensor(dtype="f32"),
        "dtype-null": one_tensor(dtype=None),
        "dtype-list": one_tensor(dtype=["F32"]),
        "dtype-of-another-size": one_tensor(dtype="F16"),
        "shape-missing": {"dtype": "F32", "data_offsets": [0, 8]},
        "shape-null": one_tensor(shape=None),
        "shape-int": one_tensor(shape=2),
        "shape-string": one_tensor(shape="2"),
        "shape-of-strings": one_tensor(shape=["2"]),
        "shape-of-floats": one_tensor(shape=[2.0]),
        "shape-of-bools": one_tensor(shape=[True, 2]),
        "shape-nested": one_tensor(shape=[[2]]),
        "shape-negative": one_tensor(shape=[-2]),
        "shape-twice-negative": one_tensor(shape=[-1, -2]),
        "shape-too-large": one_tensor(shape=[3]),
        "shape-too-small": one_tensor(shape=[1]),
        "shape-product-wraps": one_tensor(shape=[2**63 + 1, 2]),
        "shape-bytes-wrap": one_tensor(shape=[2**62 + 2]),
        "shape-beyond-64-bits": one_tensor(shape=[2**64 + 2]),
        "shape-of-ten-thousand-twos": one_tensor(shape=[2] * 10_000),
        "shape-overflows": one_tensor(shape=[2**62] * 300, data_offsets=[0, 0]),
        "shape-overflows-but-for-a-zero": one_tensor(shape=[0] + [2**62] * 300, data_offsets=[0, 0]),
        "shape-of-many-dimensions": one_tensor(shape=[2**62] * 60_000 + [0], data_offsets=[0, 0]),
        "shape-of-many-dimensions-after-a-zero": one_tensor(shape=[0] + [2**62] * 8_000, data_offsets=[0, 0]),
        "offsets-missing": {"dtype": "F32", "shape": [2]},
        "offsets-null": one_tensor(data_offsets=None),
        "offsets-of-one": one_tensor(data_offsets=[8]),
        "offsets-of-three": one_tensor(data_offsets=[0, 8, 8]),
        "offsets-reversed": one_tensor(data_offsets=[8, 0]),
        "offsets-negative": one_tensor(data_offsets=[-8, 0]),
        "offsets-of-floats": one_tensor(data_offsets=[0.0, 8.0]),
        "offsets-of-strings": one_tensor(data_offsets=["0", "8"]),
        "offsets-of-bools": one_tensor(data_offsets=[False, 8]),
        "offsets-beyond": one_tensor(data_offsets=[8, 16]),
        "offsets-2-to-64": one_tensor(data_offsets=[2**64 - 8, 2**64]),
        "offsets-wrap": one_tensor(data_offsets=[2**64, 2**64 + 8]),
        "offsets-with-a-hole-before": one_tensor(data_offsets=[4, 8], shape=[1]),
        "offsets-with-a-hole-behind": one_tensor(data_offsets=[0, 4], shape=[1]),
    }
    for name, entry in lies.items():
        content = safetensors({"a": entry}, body)
        yield HostileFile(f"safetensors-{name}", content, name=EXPORTED)
    several: dict[str, tuple[object, int]] = {
        "overlapping": ({"a": one_tensor(), "b": one_tensor(data_offsets=[4, 12])}, 12),
        "sharing": ({"a": one_tensor(), "b": one_tensor()}, 8),
        "with-a-hole-between": ({"a": one_tensor(), "b": one_tensor(data_offsets=[12, 20])}, 20),
        "metadata-is-null": ({"__metadata__": None, "a": one_tensor()}, 8),
        "metadata-is-a-list": ({"__metadata__": [], "a": one_tensor()}, 8),
        "metadata-is-a-tensor": ({"__metadata__": one_tensor()}, 8),
        "metadata-of-ints": ({"__metadata__": {"r": 4}, "a": one_tensor()}, 8),
        "metadata-of-objects": ({"__metadata__": {"r": {}}, "a": one_tensor()}, 8),
    }
    for name, (header, size) in several.items():
        expect = "either" if name in ("metadata-is-null",) else "refuse"
        yield HostileFile(f"safetensors-{name}", safetensors(header, bytes(size)), name=EXPORTED, expect=expect)
    twice = b'{"a": ' + one + b', "a": {"dtype":"F32","shape":[2],"data_offsets":[8,16]}, "b": ' + one + b"}"
    fields_twice = b'{"a": {"dtype":"F32","dtype":"F16","shape":[2],"shape":[4],"data_offsets":[0,8]}}'
    unusual: dict[str, bytes] = {
        "key-twice": safetensors(twice, bytes(16)),
        "field-twice": safetensors(fields_twice, body),
        "field-unknown": safetensors({"a": one_tensor(pwned=1)}, body),
        "no-tensors": safetensors({}),
        "metadata-only": safetensors({"__metadata__": {"a": "b"}}),
        "empty-tensor": safetensors({"a": one_tensor(shape=[0], data_offsets=[0, 0])}),
        "empty-and-huge": safetensors({"a": one_tensor(shape=[0, 2**62, 2**62], data_offsets=[0, 0])}),
        "no-dimensions": safetensors({"a": one_tensor(shape=[], data_offsets=[0, 4])}, bytes(4)),
        "ten-thousand-ones": safetensors({"a": one_tensor(shape=[1] * 10_000 + [2])}, body),
        "not-in-order": safetensors({"b": one_tensor(data_offsets=[8, 16]), "a": one_tensor()}, bytes(16)),
        "half-bytes": safetensors({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)),
        "megabyte-of-metadata": safetensors({"__metadata__": {"a": "m" * 2**20}, "a": one_tensor()}, body),
    }
    for name, content in unusual.items():
        yield HostileFile(f"safetensors-{name}", content, name=EXPORTED, expect="either")
    for name, key in DECEPTIVE.items():
        if "surrogate" not in name and name != "metadata":
            content = safetensors(json.dumps({key: one_tensor()}, ensure_ascii=False).encode(), body)
            yield HostileFile(f"safetensors-key-{name}", content, name=EXPORTED, expect="open")
    yield HostileFile("safetensors-many-tensors", _many_entries, name=EXPORTED, expect="open")
    yield HostileFile("safetensors-too-many-tensors", _too_many_entries, name=EXPORTED)
    yield HostileFile("safetensors-long-header", _long_header, name=EXPORTED)
    # The metadata that says how to scale a LoRA is JSON within a string of the JSON.
    adapter: dict[str, str] = {
        "empty": "",
        "no-json": "{",
        "list": "[]",
        "null": "null",
        "number": "1",
        "deep": "[" * 100_000 + "]" * 100_000,
        "digits": '{"transformer.r": ' + "9" * 10_000 + "}",
        "nan": '{"transformer.lora_alpha": NaN}',
        "infinity": '{"transformer.lora_alpha": Infinity}',
        "exponent": '{"transformer.lora_alpha": 1e999}',
        "strings": '{"transformer.r": "4", "transformer.lora_alpha": "4"}',
        "zero": '{"transformer.r": 0, "transformer.lora_alpha": 1}',
        "negative": '{"transformer.r": -4, "transformer.lora_alpha": 1}',
        "bools": '{"transformer.r": true, "transformer.lora_alpha": true}',
        "nested": '{"transformer.r": {"a": 1}, "transformer.lora_alpha": [1]}',
        "twice": '{"transformer.r": 4, "transformer.r": 8}',
        "surrogate": '{"transformer.\\ud800": 1}',
        "patterns": '{"transformer.rank_pattern": [], "transformer.target_modules": {"a": 1}}',
        "regular-expression": '{"transformer.target_modules": "(a+)+$"}',
    }
    for name, value in adapter.items():
        content = safetensors(
            {"__metadata__": {"lora_adapter_metadata": value}, LORA_KEY: one_tensor(shape=[1, 2])}, body
        )
        yield HostileFile(f"adapter-metadata-{name}", content, name=EXPORTED, expect="either")

"""Folders: sharded weights whose index points elsewhere, and trainer folders whose small files lie."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.support.hostile.assembler import CANARY, COMMAND, PYTHON, HostileFile, checkpoint
from tests.support.hostile.file_rows import one_tensor, safetensors
from tests.support.hostile.zip_rows import torch_zip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OUTSIDE = "outside"  # beside the folder: what a path that climbs out would reach, and find plausible


def _sharded(weight_map: object, *, index: bytes | None = None, link: str = "") -> Callable[[Path], None]:
    """A folder of one shard and an index that may say ABSOLUTE; `link` is where the second shard points."""

    def write(path: Path) -> None:
        shard = safetensors({"a": one_tensor()}, bytes(8))
        path.mkdir()
        (path / SHARDS[0]).write_bytes(shard)
        outside = path.parent / OUTSIDE
        outside.mkdir()
        (outside / "b.safetensors").write_bytes(safetensors({"b": one_tensor()}, bytes(8)))
        if link:
            (path / SHARDS[1]).symlink_to(link)
        default = json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map})
        absolute = json.dumps(str(outside / "b.safetensors")).strip('"')
        written = default.replace("ABSOLUTE", absolute).encode() if index is None else index
        (path / "model.safetensors.index.json").write_bytes(written)

    return write


def _loose(link: str) -> Callable[[Path], None]:
    """A folder of two shards without an index, the second of which is a link."""
    whole = _sharded({}, link=link)

    def write(path: Path) -> None:
        whole(path)
        (path / "model.safetensors.index.json").unlink()

    return write


def shard_indexes() -> Iterator[HostileFile]:
    """Folders of sharded safetensors whose index points elsewhere or lies."""
    first, second = SHARDS
    climbing = {
        "up": f"../{OUTSIDE}/b.safetensors",
        "up-to-passwd": "../" * 20 + "etc/passwd",
        "up-by-backslash": f"..\\{OUTSIDE}\\b.safetensors",
        "up-and-down": f"x/../../{OUTSIDE}/b.safetensors",
        "absolute": "ABSOLUTE",
        "absolute-passwd": "/etc/passwd",
        "url": "file:///etc/passwd",
        "drive": "C:\\b.safetensors",
        "share": "\\\\server\\b.safetensors",
        "device": "/dev/zero",
        "nul": "b\0.safetensors",
        "empty": "",
        "dot": ".",
        "index": "model.safetensors.index.json",
        "newline": "b\n.safetensors",
        "surrogate": "\ud800.safetensors",
        "long": "b" * 100_000,
        "home": "~/b.safetensors",
        "missing": second,
    }
    for name, target in climbing.items():
        yield HostileFile(f"shard-{name}", _sharded({"a": first, "b": target}), name="sharded")
    lying: dict[str, object] = {
        "not-there": {"a": first, "b": first},
        "not-listed": {},
        "is-null": None,
        "is-a-list": ["a"],
        "of-ints": {"a": 1},
        "of-nulls": {"a": None},
        "of-lists": {"a": [first]},
    }
    for name, weight_map in lying.items():
        yield HostileFile(f"shard-map-{name}", _sharded(weight_map), name="sharded", expect="either")
    indexes: dict[str, bytes] = {
        "empty": b"",
        "no-json": b"{",
        "list": b"[]",
        "no-utf-8": b'{"weight_map": {"\xff": "x"}}',
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "key-twice": b'{"weight_map": {"a": "%s", "a": "%s"}}' % (first.encode(), second.encode()),
        "ten-megabytes": b" " * 10 * 2**20 + b"{}",
        "many-shards": json.dumps({"weight_map": {f"k{n}": f"{n}.safetensors" for n in range(50_000)}}).encode(),
    }
    for name, content in indexes.items():
        yield HostileFile(f"shard-index-{name}", _sharded({}, index=content), name="sharded", expect="either")
    links = {
        "out": f"../{OUTSIDE}/b.safetensors",
        "to-itself": second,
        "to-a-device": "/dev/zero",
        "to-a-folder": ".",
    }
    for name, target in links.items():
        folder = _sharded({"a": first, "b": second}, link=target)
        yield HostileFile(f"shard-link-{name}", folder, name="sharded", expect="either" if name == "out" else "refuse")
        yield HostileFile(f"loose-shard-link-{name}", _loose(target), name="sharded")


def _run(*, config: bytes = b"", latest: bytes | None = b"1") -> Callable[[Path], None]:
    """A trainer's folder, with a checkpoint of another run beside it."""

    def write(path: Path) -> None:
        for folder in (path / "1", path.parent / OUTSIDE / "1"):
            folder.mkdir(parents=True)
            (folder / "mp_rank_00_model_states.pt").write_bytes(torch_zip(checkpoint()))
        (path / "training_config.yaml").write_bytes(config)
        if latest is not None:
            (path / "latest").write_bytes(latest)

    return write


def lora_config(parameters: str) -> bytes:
    """A `training_config.yaml` with these lines below `lora_config.params`."""
    path = ("model", "network_config", "params", "modules", "lora_config", "params")
    lines = [f"{'  ' * depth}{key}:" for depth, key in enumerate(path)]
    lines += ["  " * len(path) + line for line in parameters.splitlines()]
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"


def _alias_bomb(reference: str, levels: int = 9) -> str:
    """YAML in which each level names the one before nine times."""
    lines = ["a0: &a0 {k: 1}"]
    for level in range(levels):
        nine = ", ".join([f"*a{level}"] * 9)
        lines += [f"a{level + 1}: &a{level + 1} {reference.format(nine)}"]
    return "\n".join(lines) + "\n"


def run_folders() -> Iterator[HostileFile]:
    """Trainer folders whose small files lie, around a good checkpoint."""
    configs: dict[str, bytes] = {
        "alias-bomb": _alias_bomb("[{}]").encode(),
        "merge-bomb": _alias_bomb("{{<<: [{}]}}").encode(),
        "alias-of-itself": b"a: &a [*a]\n",
        "merge-of-itself": b"a: &a {<<: *a}\n",
        "calls-os-system": f"a: !!python/object/apply:os.system ['{COMMAND}']\n".encode(),
        "calls-eval": f'a: !!python/object/new:eval ["{PYTHON}"]\n'.encode(),
        "names-a-module": f"a: !!python/module:{CANARY}\n".encode(),
        "names-a-function": b"a: !!python/name:os.system\n",
        "unknown-tag": b"a: !pwned 1\n",
        "deep-lists": b"a: " + b"[" * 100_000 + b"]" * 100_000,
        "deep-blocks": b"".join(b" " * level + b"a:\n" for level in range(2_000)),
        "ten-megabytes": b"a: 1\n" * (2 * 2**20),
        "ten-megabytes-of-spaces": b" " * 10 * 2**20,
        "one-long-line": b"a: '" + b"x" * 5 * 2**20 + b"'\n",
        "colliding-keys": b"".join(b"%d: 0\n" % (index * (2**61 - 1)) for index in range(20_000)),
        "no-utf-8": b"a: \xff\xfe\xfd\n",
        "utf-16": "a: 1\n".encode("utf-16"),
        "nul": b"a: \0\n",
        "control-characters": b"a: \x1b[31m\n",
        "tabs": b"a:\n\tb: 1\n",
        "no-yaml": b"{[",
        "two-documents": b"a: 1\n---\nb: 2\n",
        "unhashable-key": b"? [a]\n: 1\n? {b: 1}\n: 2\n",
        "date": b"a: 2024-99-99\n",
        "sexagesimal": b"a: 190:20:30:15\n",
        "list": b"- 1\n",
        "string": b"just words\n",
        "number": b"7\n",
        "model-is-a-list": b"model: [1]\n",
        "model-is-null": b"model:\n",
        "params-is-a-string": b"model: {network_config: {params: {modules: {lora_config: {params: r}}}}}\n",
        "twice": lora_config("r: 2\nr: 4\nlora_alpha: 1\nlora_alpha: 2"),
        "missing-rank": lora_config("lora_alpha: 1"),
        "rank-of-another-run": lora_config("r: 64\nlora_alpha: 1"),
    }
    numbers = {
        "null": "null",
        "empty": "",
        "string": "one",
        "string-number": "'1'",
        "nan": ".nan",
        "infinity": ".inf",
        "minus-infinity": "-.inf",
        "negative": "-1",
        "zero": "0",
        "true": "yes",
        "list": "[1]",
        "mapping": "{a: 1}",
        "fraction": "0.5",
        "tiny": "1.0e-320",
        "huge": "1.0e+308",
        "beyond": "1.0e+999",
        "digits": "9" * 5_000,
        "octal": "010",
        "hexadecimal": "0x10",
        "underscore": "1_0",
        "sexagesimal": "1:30",
        "exponent-without-a-dot": "1e2",
        "arabic": "\u0661",
        "date": "2024-01-01",
        "binary": "!!binary AQ==",
        "surrogate": '"\\ud800"',
    }
    for field_name, other in (("r", "lora_alpha: 1"), ("lora_alpha", "r: 2")):
        for name, number in numbers.items():
            configs[f"{field_name}-{name}"] = lora_config(f"{field_name}: {number}\n{other}")
    for name, content in configs.items():
        yield HostileFile(f"config-{name}", _run(config=content), name="run", expect="either")
    pointers: dict[str, bytes] = {
        "empty": b"",
        "newline": b"\n",
        "spaces": b"  1  \n",
        "up": b"../" + OUTSIDE.encode() + b"/1",
        "up-to-the-root": b"../../..",
        "up-and-down": b"1/../../" + OUTSIDE.encode() + b"/1",
        "absolute": b"/etc",
        "here": b".",
        "there": b"..",
        "missing": b"999",
        "nul": b"1\0",
        "no-utf-8": b"\xff\xfe",
        "byte-order-mark": b"\xef\xbb\xbf1",
        "two-lines": b"1\n2\n",
        "ansi": b"\x1b[31m1",
        "arabic": "\u0661".encode(),
        "negative": b"-1",
        "ten-megabytes": b"1" * 10 * 2**20,
        "long": b"1" * 5_000,
        "a-file": b"training_config.yaml",
        "a-name-with-a-slash": b"1/",
        "a-name-of-a-link": b"out",
    }
    for name, content in pointers.items():
        yield HostileFile(f"latest-{name}", _run(latest=content), name="run", expect="either")

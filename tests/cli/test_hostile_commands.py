"""Files that are small and mean much work: what a user runs on them ends soon, and takes little memory.

`tests/test_hostile.py` holds the readers to their bounds; here it is the commands, and what they print.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.checkpoint.test_hostile import deflated
from tests.support import hostile
from tests.support.hostile.assembler import Code, data

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
MEGABYTE = 1 << 20

OVERHEAD_BYTES = 32 * MEGABYTE
PEAK_PER_BYTE = 128
MOST_BYTES = 700 * MEGABYTE
"""The memory that a command takes: so many bytes per byte of the file, unpacked, and never more than the last."""

SECONDS = 6
SECONDS_PER_MEGABYTE = 3
"""Of processor time: a quarter of it is enough on an idle machine, but the machines of tests are not idle."""

TEXT = ("inspect",)
TERMINAL = ("inspect", "on a terminal")
TREE = ("inspect", "--tree", "on a terminal")
STATISTICS = ("inspect", "--stats")
JSON = ("inspect", "--json")
ALL = (TEXT, TERMINAL, TREE, STATISTICS, JSON)


class Bomb(NamedTuple):
    """A file, by its content and its bytes unpacked, and the commands that it is for."""

    make: Callable[[], tuple[bytes, int]]
    commands: tuple[tuple[str, ...], ...] = ALL
    name: str = "checkpoint.pt"


def packed(pickled: bytes) -> tuple[bytes, int]:
    return deflated(pickled), len(pickled)


def plain(content: bytes) -> tuple[bytes, int]:
    return content, len(content)


# The one good tensor is made once, and is memo entry 255: `AGAIN` is what names it again.
AGAIN = b"h\xff"
_ONCE = Code(hostile.tensor() + b"q\xff0")


def with_tensor(payload: bytes) -> bytes:
    """A checkpoint whose payload may use AGAIN."""
    return hostile.checkpoint(Code(_ONCE + payload))


def header(count: int) -> bytes:
    """A safetensors file of so many empty tensors under short keys."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return hostile.safetensors({f"{index:x}": entry for index in range(count)})


def nested(levels: int, value: bytes) -> bytes:
    """Dicts in each other, each under a key of 1,000 characters."""
    key = data("k" * 1000)
    return b"}" + (key + b"}") * (levels - 1) + key + value + b"s" * levels


def far_down() -> bytes:
    """One tensor, 60,000 times in a list to which a path of 30,000 characters leads."""
    return with_tensor(nested(30, b"](" + AGAIN * 60_000 + b"e"))


def in_many_places(count: int) -> bytes:
    """One tensor under many keys of the state dict."""
    items = b"".join(data(f"k{index:x}") + AGAIN for index in range(count))
    return hostile.checkpoint(Code(_ONCE + b"N"), module=Code(b"}(" + items + b"u"))


def under_many_prefixes(count: int) -> bytes:
    """A state dict of which no part is like another, and none can be told in one line."""
    names = (f"p{index}.{below}" for index in range(count) for below in (f"a{index}", f"b{index}.c"))
    items = b"".join(data(name) + AGAIN for name in names)
    return hostile.checkpoint(Code(_ONCE + b"N"), module=Code(b"}(" + items + b"u"))


def one_key(key: str) -> bytes:
    """A state dict of one key, which may be long."""
    return hostile.checkpoint(module={key: hostile.tensor()})


def no_tensors() -> bytes:
    """A checkpoint with many entries that are none."""
    return with_tensor(b"}(" + b"".join(data(f"{index:x}") + b"]" for index in range(50_000)) + b"u")


BOMBS: dict[str, Bomb] = {
    "safetensors-of-100,000-tensors": Bomb(lambda: plain(header(100_000)), (JSON, TREE), hostile.EXPORTED),
    "metadata-of-7-megabytes-in-many-keys": Bomb(
        lambda: plain(hostile.safetensors({"__metadata__": {f"{index:x}": "" for index in range(600_000)}})),
        (JSON, TERMINAL),
        hostile.EXPORTED,
    ),
    "lists-of-nothing-in-a-header": Bomb(
        lambda: plain(
            hostile.safetensors({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], "x": [[]] * 10**6}})
        ),
        (JSON,),
        hostile.EXPORTED,
    ),
    "names-of-everything": Bomb(
        lambda: packed(hostile.checkpoint(Code(b"".join(b"cp\nn%x\n0" % n for n in range(9_999)) + b"N"))),
    ),
    "tensors-that-are-huge-by-strides-of-0": Bomb(
        lambda: plain(
            hostile.torch_zip(
                hostile.checkpoint(
                    module={
                        f"k{index}": hostile.tensor(size=(2**31, 2**29 - 1), stride=(0, 0)) for index in range(1000)
                    }
                )
            )
        ),
    ),
    # checkpoint/index.py: the path to a tensor has no end, and one that is in many places is told as often
    "one-tensor-far-down-60,000-times": Bomb(lambda: packed(far_down())),
    "one-tensor-in-a-list-990,000-times": Bomb(
        lambda: packed(with_tensor(b"](" + AGAIN * 990_000 + b"e")), (TEXT, JSON)
    ),
    "one-tensor-under-490,000-keys": Bomb(lambda: packed(in_many_places(490_000)), (TEXT, JSON)),
    # layouts/sat.py and inspection/sections.py: a prefix is taken off, and the rest copied, again and again
    "key-of-640,000-modules": Bomb(lambda: packed(one_key("module." * 640_000 + "x")), (TERMINAL, TREE)),
    "lora-key-of-640,000-modules": Bomb(lambda: packed(one_key("module." * 640_000 + hostile.KEY)), (TEXT,)),
    # render/folding.py: what is still to be opened is sorted anew for each that is
    "15,000-prefixes": Bomb(lambda: packed(under_many_prefixes(15_000)), (TREE, ("inspect", "--tree"))),
    # render/inspect.py: a key is shortened segment by segment
    "key-of-2-megabytes-of-dots": Bomb(lambda: packed(one_key("." * (2 << 20))), (TERMINAL, TREE)),
    # render/text.py: a character that is not printed takes four, each of them an object
    "key-of-30-megabytes-of-control-characters": Bomb(lambda: packed(one_key("\x01" * (30 << 20))), (TERMINAL, JSON)),
    "key-of-7-million-faces": Bomb(lambda: packed(one_key("\U0001f600" * (7 << 20))), (TERMINAL, JSON)),
    "entries-that-are-no-tensors": Bomb(lambda: packed(no_tensors())),
}


# Running them


class Nowhere(io.TextIOWrapper):
    """Standard output, thrown away; a terminal or a pipe."""

    def __init__(self, *, terminal: bool) -> None:
        nowhere = Path(os.devnull).open("wb")  # noqa: SIM115 - it is closed with this
        super().__init__(nowhere, encoding="utf-8", errors="backslashreplace")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def cost(words: tuple[str, ...], path: Path) -> tuple[float, int, int]:
    """Run a command in this process: seconds of processor time, peak memory in bytes, exit code."""
    import resource
    import time

    from cogtools import cli

    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    sys.stdout, sys.stderr = Nowhere(terminal="on a terminal" in words), Nowhere(terminal=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    code = cli.run([words[0], str(path), *(word for word in words[1:] if word.startswith("--"))])
    seconds = time.process_time() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, code


def in_fork(work: Callable[[], object]) -> object:
    """What a function returns, from a fork of this process; None if that dies."""
    ready, answer = os.pipe()
    if os.fork() == 0:
        try:
            os.write(answer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(answer)
    with os.fdopen(ready) as pipe:
        result = json.loads(pipe.read() or "null")
    os.wait()
    return result


def set_off(name: str, folder: Path) -> None:
    """Run all commands on a bomb, and print its bytes and what each command cost, as JSON."""
    import cogtools.conversion.plan
    import cogtools.inspection.inspect
    import cogtools.inspection.statistics
    import cogtools.render.inspect
    import cogtools.render.json_object  # noqa: F401 - all are imported for their effect: what they take is not the file's

    os.environ["COLUMNS"] = "80"
    bomb = BOMBS[name]
    path = folder / bomb.name

    def write() -> int:
        content, size_bytes = bomb.make()
        path.write_bytes(content)
        return size_bytes

    size_bytes = in_fork(write)
    costs = {" ".join(words): in_fork(partial(cost, words, path)) for words in bomb.commands}
    sys.stdout.write(json.dumps([size_bytes, costs]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory, and its peak in kilobytes, are of Linux")
@pytest.mark.parametrize("name", BOMBS)
def test_a_command_on_a_bomb_ends_soon_and_takes_little_memory(name: str, tmp_path: Path) -> None:
    code = "import sys; from tests.cli.test_hostile_commands import *; set_off(sys.argv[1], Path(sys.argv[2]))"
    output = subprocess.check_output(
        [sys.executable, "-c", code, name, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        timeout=600,
    )
    size_bytes, costs = json.loads(output)
    assert [words for words, spent in costs.items() if spent is None] == []  # died
    most_bytes = min(OVERHEAD_BYTES + PEAK_PER_BYTE * size_bytes, MOST_BYTES)
    most_seconds = max(SECONDS, SECONDS_PER_MEGABYTE * size_bytes / MEGABYTE)
    too_much = {
        words: f"{seconds:.1f} s and {peak / MEGABYTE:.0f} MB for {size_bytes / MEGABYTE:.2f} MB"
        for words, (seconds, peak, _) in costs.items()
        if seconds > most_seconds or peak > most_bytes
    }
    assert too_much == {}
    assert {code for _, _, code in costs.values()} <= {0, 2}

"""What a process that is asked a question can do instead of answering it: each by its name in the question."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cogtools.errors import LibraryError, Problem


def _hang() -> object:
    while True:
        time.sleep(1)


def _take_memory() -> object:
    taken = bytearray(os.urandom(1)) * (600 << 20)
    while True:
        time.sleep(1)
        taken[0] ^= 1


def _talk() -> object:
    print("said on standard output")  # noqa: T201 - as libraries do
    os.write(1, b"and beneath Python\n")
    return "talked"


def _fail() -> object:
    raise ValueError("no answer to that")


def _refuse() -> object:
    raise LibraryError("no", file="x", found="a", expected="b", hint="c", problems=[Problem("rank", "q", keys=("k",))])


def _need() -> object:
    return __import__("not_there")


def _be_short() -> object:
    raise MemoryError


def _be_short_beneath_python() -> object:
    os.write(2, b"terminate called\n  what():  std::bad_alloc\n")
    os.abort()


DEEDS: dict[str, Callable[[], object]] = {
    "hang": _hang,
    "take memory": _take_memory,
    "talk": _talk,
    "fail": _fail,
    "refuse": _refuse,
    "need": _need,
    "be short": _be_short,
    "be short beneath Python": _be_short_beneath_python,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: sys.exit(3),
    "exit beneath Python": lambda: os._exit(1),
    "path": lambda: [str(Path.cwd()), sys.path],
}


def answer(question: Mapping[str, object]) -> dict[str, object]:
    return {"done": DEEDS[str(question["do"])](), "question": question}

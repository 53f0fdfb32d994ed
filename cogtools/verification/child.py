"""A question that a fresh Python process answers, within limits on its time and memory.

What runs there can hang, take all memory or crash without harm: its end without an answer is an error that says why.
Question and answer are JSON objects, on the standard input and output of the process. It imports from where this
process does, uses no network and no GPU, and ends with this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.errors import KilledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TIME_LIMIT_SECONDS = 600
"""Far more than the largest LoRA takes on a busy machine: loading one of 5B at rank 256 takes 5 seconds."""

MEMORY_LIMIT_BYTES = 16 << 30
"""Resident memory; the libraries take 0.5 GB and a LoRA of 5B at rank 2048, the largest known, takes 9 GB. It is
looked at where the system has /proc."""

_LOOK_SECONDS = 0.05

_START = "import sys; sys.path[:] = sys.argv[2:]; __import__('importlib').import_module(sys.argv[1]).main()"
"""With -P, so that nothing is imported from the current folder unless this process would."""

_SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def ask(module: str, question: Mapping[str, object], what: str) -> dict[str, object]:
    """Ask a question of a module's `main` in a fresh process.

    Args:
        module: its name; its `main` is to call `answer_with`.
        question: a JSON object.
        what: what the process does, for messages: "loading the file with diffusers and PEFT".

    Raises:
        KilledError: if the process gives no answer: it dies, or passes a limit.
    """
    with subprocess.Popen(  # noqa: S603 - this interpreter, with code of its own
        [sys.executable, "-P", "-c", _START, module, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **_SURROUNDINGS},
    ) as process:
        try:
            answer, talk = _watch(process, json.dumps(question).encode(), what)
        finally:
            process.kill()
            process.wait()  # also after Ctrl-C, for which Popen does not wait
    try:
        found = json.loads(answer)
    except ValueError as error:
        raise _died(process.returncode, talk, what) from error
    return dict(found)


def _watch(process: subprocess.Popen[bytes], question: bytes, what: str) -> tuple[bytes, bytes]:
    """What the process writes until its end; it is looked at meanwhile."""
    begin = time.monotonic()
    given: bytes | None = question
    while True:
        try:
            return process.communicate(given, timeout=_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            given = None
            if time.monotonic() - begin > TIME_LIMIT_SECONDS:
                raise KilledError(
                    f"{what} was stopped: it had not ended after {TIME_LIMIT_SECONDS} seconds",
                    hint="without --load, verify checks what the file holds and states",
                ) from None
            if _resident_bytes(process.pid) > MEMORY_LIMIT_BYTES:
                raise KilledError(
                    f"{what} was stopped: it took more than {MEMORY_LIMIT_BYTES / 1e9:.2g} GB of memory",
                    hint="without --load, verify checks what the file holds and states",
                ) from None


def _resident_bytes(process_id: int) -> int:
    """The resident memory of a process; 0 where the system does not tell."""
    try:
        pages = Path(f"/proc/{process_id}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _died(code: int, talk: bytes, what: str) -> KilledError:
    lines = talk.decode(errors="replace").strip().splitlines()
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        # Python's interpreter never ends so by itself: the system does it when memory runs out, or a library crashes.
        return KilledError(
            f"{what} was ended by {name}",
            found=lines[-1] if lines else None,
            hint="see whether the machine has enough free memory" if name == "SIGKILL" else None,
        )
    return KilledError(f"{what} ended without an answer", found=lines[-1] if lines else f"exit code {code}")


def answer_with(answer: Callable[[dict[str, object]], Mapping[str, object]]) -> None:
    """Answer the one question of this process: what a module's `main` calls in it."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print does not get into the answer
    if hasattr(signal, "alarm"):
        signal.alarm(2 * TIME_LIMIT_SECONDS)  # ends this process also where the one that asked was killed
    with out:
        json.dump(answer(json.load(sys.stdin)), out)

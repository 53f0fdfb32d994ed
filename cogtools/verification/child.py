"""A question that a fresh Python process answers, within limits on its time and memory.

What runs there can hang, take all memory or crash without harm: its end without an answer is an error that says why.
Question and answer are JSON objects, on the standard input and output of the process. An error there that the user can
act on is one here. The process imports from where this one does, uses no network and no GPU, and ends with this one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtools.errors import CogtoolsError, KilledError
from cogtools.system import as_cogtools_error, prepare_libraries

if TYPE_CHECKING:
    from collections.abc import Mapping

TIME_LIMIT_SECONDS = 600
"""Far more than the largest LoRA takes on a busy machine: loading one of 5B at rank 256 takes 5 seconds."""

MEMORY_LIMIT_BYTES = 16 << 30
"""Resident memory; the libraries take 0.5 GB and a LoRA of 5B at rank 2048, the largest known, takes 9 GB. It is
looked at where the system has /proc."""

_LOOK_SECONDS = 0.05

_START = "import sys; sys.path[:] = sys.argv[2:]; from cogtools.verification import child; child.answer(sys.argv[1])"
"""With -P, so that nothing is imported from the current folder unless this process would."""

_SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def ask(module: str, question: Mapping[str, object], what: str) -> dict[str, object]:
    """Ask a question of a module's function `answer` in a fresh process.

    Args:
        module: its name; its `answer` takes the question and returns the answer.
        question: a JSON object.
        what: what the process does, for messages: "loading the file with diffusers and PEFT".

    Raises:
        KilledError: if the process gives no answer: it dies, or passes a limit.
        CogtoolsError: if there is not enough memory, a library cannot be imported, or `answer` raises one.
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
        found: dict[str, Any] = json.loads(answer)
    except ValueError as error:
        raise _died(process.returncode, talk, what) from error
    if "error" in found:
        raise CogtoolsError.from_dict(found["error"])
    return dict(found["answer"])


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


def _died(code: int, talk: bytes, what: str) -> CogtoolsError:
    """The error of a process that ended without an answer: what it said last may tell why."""
    last = next(reversed(talk.decode(errors="replace").strip().splitlines()), None)
    short = None if last is None else as_cogtools_error(RuntimeError(last))
    if short is not None:
        short.found = last
        return short
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        # Python's interpreter never ends so by itself: the system does it when memory runs out, or a library crashes.
        return KilledError(
            f"{what} was ended by {name}",
            found=last,
            hint="see whether the machine has enough free memory" if name == "SIGKILL" else None,
        )
    return KilledError(f"{what} ended without an answer", found=last or f"exit code {code}")


def answer(module: str) -> None:
    """Answer the one question of this process with a module's `answer`, or with the error that it ends with."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print does not get into the answer
    if hasattr(signal, "alarm"):
        signal.alarm(2 * TIME_LIMIT_SECONDS)  # ends this process also where the one that asked was killed
    prepare_libraries()
    with out:
        json.dump(_answer(module, json.load(sys.stdin)), out)


def _answer(module: str, question: dict[str, object]) -> dict[str, object]:
    try:
        return {"answer": import_module(module).answer(question)}
    except Exception as error:
        known = as_cogtools_error(error)
        if known is None:
            raise
        return {"error": known.to_dict()}

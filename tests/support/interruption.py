"""Kill exports at random moments, send them storms of signals, let system calls fail, and look at what is left.

    python -m tests.support.interruption [--kills N] [--storms N] [--faults N] [--seed N]

After every kill the target has to be absent, as it was before, or new and whole; and a run that is left alone has to
clean up what the killed ones left. After a storm nothing but that may be left at all: no temporary file, no process,
no traceback, and the exit code is that of an interruption or of the result. A system call that fails is one clear
error with exit code 2, or changes nothing.
"""

import argparse
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import torch

from cogtools.__main__ import main as program_main
from cogtools.conversion.output import leftovers
from cogtools.layouts.diffusers import FILE_NAME
from tests.support.command_line import program, surroundings
from tests.support.factories import COGVIDEOX_2B, TOY_2B, sat_checkpoint, sat_state_dict, save_run

OLD = b"what was there before"

HEARING_CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
from cogtools.__main__ import main
main()
"""

ENDS = {
    (0, ""): "ended",
    (130, "interrupted: nothing was left half-written\n"): "interrupted",
    (130, "interrupted\n"): "interrupted while it started or ended",
}
"""How a run may end that is sent signals: its exit code, what it says, and what to call that."""


def export(checkpoint: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(program("export-lora", checkpoint, out, "--overwrite", "--quiet"))


def make_run(folder: Path, seed: int = 0) -> Path:
    """A trainer's save folder with a LoRA of 15 MB, which takes a while to copy."""
    state = sat_state_dict(COGVIDEOX_2B, 16, base="none", seed=seed)
    return save_run(folder, sat_checkpoint(state), rank=16)


def kill_exports(folder: Path, rounds: int, seed: int) -> Counter[str]:
    """Kill that many exports; how often the target was "absent", "old" and "new" afterwards.

    Asserts after each that the target is as it was before, or new and whole; and in the end, that one which is left
    alone writes the whole and removes what the killed ones left.
    """
    chance = random.Random(seed)
    checkpoint = make_run(folder / "run")
    out = folder / "out"
    start = time.monotonic()
    assert export(checkpoint, out).wait() == 0
    whole_seconds = time.monotonic() - start
    target = out / FILE_NAME
    new = target.read_bytes()
    found: Counter[str] = Counter()
    for _ in range(rounds):
        before = set_up(target, chance)
        process = export(checkpoint, out)
        # Later more often than sooner: it is the end that matters.
        time.sleep(whole_seconds * chance.uniform(0.3, 1.1))
        process.kill()
        process.wait()
        found[what_is_there(target, before, new)] += 1
        found["with a leftover"] += any(leftovers(target))
    assert export(checkpoint, out).wait() == 0
    assert target.read_bytes() == new
    assert list(leftovers(target)) == []
    return found


def set_up(target: Path, chance: random.Random) -> bytes | None:
    """Remove the target, or put something else there; what is there then."""
    target.unlink(missing_ok=True)
    if chance.random() < 0.5:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(OLD)
    return OLD


def what_is_there(target: Path, before: bytes | None, new: bytes) -> str:
    """Assert that it is what was there before, or the whole new file; which of the two."""
    after = target.read_bytes() if target.exists() else None
    assert after in (before, new), f"{len(after or b'')} bytes, neither what was there nor what should be"
    return "absent" if after is None else "new" if after == new else "old"


def storm_exports(folder: Path, rounds: int, seed: int, *, most_signals: int = 30) -> Counter[str]:
    """Send that many exports, of one checkpoint and of three, storms of signals; how often they ended in which way.

    From one signal to `most_signals`, a millisecond apart: to the main process, or to its workers as well as Ctrl-C on
    a terminal does. Asserts that each ends in a way of `ENDS`, within a minute, and leaves nothing half-written.
    """
    chance = random.Random(seed)
    runs = [make_run(folder / name, seed) for seed, name in enumerate("abc")]
    wholes = []
    for run in runs:
        assert export(run, folder / "whole").wait() == 0
        wholes.append((folder / "whole" / FILE_NAME).read_bytes())
    out = folder / "out"
    ways: dict[int, list[tuple[Path, bytes]]] = {
        1: [(out / FILE_NAME, wholes[0])],
        3: [(out / f"{name}-1000" / FILE_NAME, new) for name, new in zip("abc", wholes, strict=True)],
    }
    seconds = {count: timed(runs[:count], out) for count in ways}
    found: Counter[str] = Counter()
    for _ in range(rounds):
        count = chance.choice(list(ways))
        before = [set_up(target, chance) for target, _ in ways[count]]
        with start_hearing(*runs[:count], out) as process:
            assert process.stderr is not None
            time.sleep(seconds[count] * chance.uniform(0.0, 1.1))
            send_storm(process, chance, most_signals)
            process.wait(60)
            said = process.stderr.read()  # up to where the workers have ended too
        assert (process.returncode, said) in ENDS, f"exit code {process.returncode}: {said}"
        found[ENDS[process.returncode, said]] += 1
        for (target, new), old in zip(ways[count], before, strict=True):
            found[what_is_there(target, old, new)] += 1
        assert [path.name for path in out.rglob("*.cogtools-tmp")] == []
    return found


def start_hearing(*words: Path) -> subprocess.Popen[str]:
    """Start an export in a process group of its own, and wait until it hears signals."""
    command = [sys.executable, "-c", HEARING_CTRL_C, "export-lora", *map(str, words), "--overwrite", "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=surroundings())
    while process.poll() is None and not hears_sigterm(process.pid):
        time.sleep(0.001)
    return process


def hears_sigterm(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM (Linux)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def timed(runs: list[Path], out: Path) -> float:
    """How long an export takes that is left alone, from where it hears signals."""
    with start_hearing(*runs, out) as process:
        start = time.monotonic()
        assert process.wait() == 0
        return time.monotonic() - start


def send_storm(process: subprocess.Popen[str], chance: random.Random, most_signals: int) -> None:
    to_all = chance.random() < 0.5
    for _ in range(chance.randint(1, most_signals)):
        if process.poll() is not None:
            return
        number = chance.choice([signal.SIGINT, signal.SIGTERM])
        if to_all:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        time.sleep(chance.uniform(0.0, 0.002))


CALLS = (
    *("access", "close", "copy_file_range", "fstat", "fsync", "link", "listdir", "lstat", "mkdir", "open"),
    *("posix_fallocate", "pread", "pwrite", "readlink", "rename", "replace", "rmdir", "scandir", "stat", "statvfs"),
    *("unlink", "write"),
)
"""The functions of `os` that are let fail."""

ERRORS = (
    *(errno.EACCES, errno.EDQUOT, errno.EINVAL, errno.EIO, errno.EMFILE, errno.ENOENT, errno.ENOMEM, errno.ENOSPC),
    *(errno.EPERM, errno.EROFS, errno.ESTALE),
)


def fault_exports(folder: Path, rounds: int, seed: int) -> Counter[str]:
    """Let one system call of that many exports fail; how often which exit code came, and what was there afterwards.

    Asserts that the exit code is 0 or 2, that 0 means that the output is there, and that no traceback is shown. The
    exports run in forks of this process, in which a function of `os` raises an error.
    """
    import cogtools.cli
    import cogtools.export.batch  # noqa: F401 - imported here, they are not in each fork

    chance = random.Random(seed)
    runs = [save_run(folder / name, sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4) for name in "abc"]
    out = folder / "out"
    target = out / FILE_NAME
    assert export(runs[0], out).wait() == 0
    new = target.read_bytes()
    found: Counter[str] = Counter()
    for _ in range(rounds):
        before = set_up(target, chance)
        number, nth = chance.choice(ERRORS), chance.randint(1, 12)
        overwrite = ["--overwrite"] if before is not None or chance.random() < 0.5 else []
        several = [str(runs[1]), str(runs[2])] if chance.random() < 0.2 else []
        # multiprocessing shows a traceback where a pipe of its own cannot be closed: that cannot be
        name = chance.choice([call for call in CALLS if call != "close" or not several])
        place = str(folder / "several") if several else str(out)
        words = ["export-lora", str(runs[0]), *several, place, *overwrite, "--sha256"]
        code, said = with_fault(name, number, nth, words)
        fault = f"{errno.errorcode[number]} of call {nth} of {name} in {' '.join(words)}: exit code {code}, {said}"
        assert code in (0, 2), fault
        assert "Traceback" not in said, fault
        found[f"exit code {code}"] += 1
        if not several:
            after = what_is_there(target, before, new)
            assert code == 2 or after == "new", fault
            found[after] += 1
    assert export(runs[0], out).wait() == 0
    assert list(leftovers(target)) == []
    return found


def with_fault(name: str, number: int, nth: int, words: list[str]) -> tuple[int, str]:
    """Run a command line in a fork in which a function of `os` fails once: its exit code and what it says."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["cogtools", *words]
        code = 99
        try:
            fail_at(name, number, nth)
            program_main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 98
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said


def fail_at(name: str, number: int, nth: int) -> None:
    real = getattr(os, name)
    calls = count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    setattr(os, name, call)


def main() -> None:
    """Run all of it in a temporary folder and tell what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.interruption", description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--storms", type=int, default=300)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_exports(Path(folder), options.kills, options.seed)
    sys.stdout.write(f"{options.kills} exports killed; afterwards: {dict(found)}\n")
    with tempfile.TemporaryDirectory() as folder:
        found = storm_exports(Path(folder), options.storms, options.seed)
    sys.stdout.write(f"{options.storms} exports sent storms of signals; afterwards: {dict(found)}\n")
    with tempfile.TemporaryDirectory() as folder:
        found = fault_exports(Path(folder), options.faults, options.seed)
    sys.stdout.write(f"{options.faults} exports with a system call that failed; afterwards: {dict(found)}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Watch that reading a file does nothing but read: no import, no code, no write, no process, no network.

Python announces such deeds to audit hooks before it does them (PEP 578; the library reference has the table
of events). `no_side_effects` records each and stops it by an exception, so that even a reader that falls for
a file does no harm in a test:

    read(good_file)  # once before: the reader's own lazy imports are not what is watched for
    with no_side_effects() as events:
        read(hostile_file)
    assert events == []
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Events by whole name, or by prefix where they end in a dot.
FORBIDDEN = frozenset(
    {
        # code: `import` is announced for modules that are not loaded yet
        "import", "exec", "compile", "code.__new__", "function.__new__", "marshal.", "pickle.find_class",
        "cpython.", "builtins.input", "builtins.breakpoint", "object.__setattr__", "object.__delattr__",
        "sys.addaudithook", "sys.setprofile", "sys.settrace", "sys.unraisablehook", "gc.",
        # processes and signals
        "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
        "os.startfile", "os.kill", "os.killpg", "signal.pthread_kill", "pty.spawn", "_winapi.",
        # native code
        "ctypes.",
        # files, except for reading
        "os.chdir", "os.chmod", "os.chown", "os.chflags", "os.link", "os.lockf", "os.mkdir", "os.remove",
        "os.removexattr", "os.rename", "os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime",
        "shutil.", "tempfile.", "sqlite3.", "fcntl.", "msvcrt.",
        # the environment and the machine
        "os.putenv", "os.unsetenv", "os.add_dll_directory", "resource.", "syslog.", "winreg.",
        # the network
        "socket.", "urllib.Request", "http.client.", "ftplib.", "imaplib.", "nntplib.", "poplib.", "smtplib.",
        "telnetlib.", "webbrowser.open",
    }
)  # fmt: skip
FAMILIES = tuple(event for event in FORBIDDEN if event.endswith("."))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC


class SideEffect(BaseException):
    """Something was about to be done. No `except Exception` hides it."""


@dataclass
class _Watch:
    inside: Path | None
    events: list[str]

    def deed(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        """What an audit event is about to do, or None where it does nothing but read."""
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, str) and Path(path).is_dir():
                return None  # a temporary file that never has a name (O_TMPFILE), and is gone with its descriptor
            writes = (isinstance(mode, str) and set("wax+") & set(mode)) or (flags or 0) & WRITING
            return f"open {path!r} for writing" if writes else self.outside(path)
        if event not in FORBIDDEN and not event.startswith(FAMILIES):
            return None
        return f"{event} {arguments[0]!r}"[:200] if arguments else event

    def outside(self, path: object) -> str | None:
        """Opening for reading is a deed only where a folder is given and the path leaves it."""
        if self.inside is None or not isinstance(path, str | bytes):
            return None
        within = Path(os.fsdecode(path)).resolve().is_relative_to(self.inside)
        return None if within else f"open {path!r} outside of the folder"


_watch: _Watch | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is None:
        return
    deed = _watch.deed(event, arguments)
    if deed is not None:
        _watch.events.append(deed)
        raise SideEffect(deed)


@cache
def _install() -> None:
    """A hook can not be taken off again: there is one, and `_watch` is its switch."""
    sys.addaudithook(_hook)


@contextmanager
def no_side_effects(inside: Path | None = None) -> Iterator[list[str]]:
    """Record and stop every deed, in all threads.

    Args:
        inside: also count what is opened for reading outside of this folder, links followed.

    Yields:
        What was about to be done, one line each: empty if all is well.
    """
    global _watch
    _install()
    before, watch = _watch, _Watch(None if inside is None else inside.resolve(), [])
    _watch = watch
    try:
        yield watch.events
    finally:
        _watch = before

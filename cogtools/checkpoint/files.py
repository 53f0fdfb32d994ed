"""Where bytes lie: an open file, and a range of it.

Files are read with positioned reads, never through a memory map: a file that shrinks while it is read then gives an
error, not a SIGBUS that ends the process. Whatever the system refuses is a `CheckpointError` with its reason.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from cogtools.checkpoint.paths import real_path
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cogtools.checkpoint.paths import AnyPath


class SourceFile(ABC):
    """A file, held open for reading, so that what was looked at is what is read later.

    Args:
        path: where it is, for messages.
        size_bytes: how long it is.
    """

    fd: int = -1
    """Its file descriptor, where it is a file of this machine."""

    def __init__(self, path: AnyPath, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._lock = threading.RLock()
        self._spool: _Spool | None = None

    @staticmethod
    def open(path: Path) -> SourceFile:
        """Open a file of this machine. Pipes, devices and folders are refused: their bytes cannot be read by position.

        Raises:
            CheckpointError: if it is missing, not readable, or not a regular file.
        """
        return LocalFile.at(path)

    @property
    def name(self) -> str:
        """What it is called in its folder."""
        return self.path.name

    @property
    def parallel(self) -> int:
        """How many reads at once make it faster: 1 where reading takes no waiting."""
        return 1

    @abstractmethod
    def beside(self, name: str, *, above: bool = False) -> SourceFile | None:
        """The file of that name in the same folder, opened; None if there is none.

        If this file was opened through a link, it is looked for beside the link first, then where the link leads.

        Args:
            name: what it is called.
            above: look into the folder above as well.

        Raises:
            CheckpointError: if it is there and cannot be opened.
        """

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Exactly `size_bytes` bytes from `offset_bytes` on.

        Raises:
            CheckpointError: if the file ends before that, or cannot be read.
        """
        if offset_bytes + size_bytes > self.size_bytes:
            raise self.cut_short(offset_bytes, size_bytes)
        parts: list[bytes] = []
        missing = size_bytes
        while missing:
            part = self._read_some(offset_bytes + size_bytes - missing, missing)
            if not part:
                raise self.cut_short(offset_bytes, size_bytes)
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @abstractmethod
    def _read_some(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Some bytes from a position on, at most so many; none where the file has come to an end."""

    def keep(self, offset_bytes: int, size_bytes: int) -> Callable[[], None]:
        """Have a range at hand until the function that is returned is called. Where nothing is waited for, do nothing.

        Raises:
            CheckpointError: if it cannot be read.
        """
        _ = offset_bytes, size_bytes
        return lambda: None

    def remember(self, offset_bytes: int, size_bytes: int) -> None:
        """Have a few bytes that are at hand now ready for `peek`, as long as the file is open."""
        _ = offset_bytes, size_bytes

    def peek(self, offset_bytes: int, size_bytes: int) -> bytes | None:
        """The same as `read`, of bytes that nobody has to wait for; None where they would have to be fetched."""
        return self.read(offset_bytes, size_bytes)

    def cut_short(self, offset_bytes: int, size_bytes: int) -> CheckpointError:
        """The error for a read beyond the end of the file."""
        return CheckpointError(
            "the file is cut short",
            file=self.path,
            found=f"the file ends at {self._now_bytes():,}",
            expected=f"{size_bytes:,} bytes at offset {offset_bytes:,}",
            hint="copy or download it again; a checkpoint that is still being written looks like this too",
        )

    @abstractmethod
    def _now_bytes(self) -> int:
        """How long the file is by now."""

    @abstractmethod
    def refuse_changed(self) -> None:
        """Raise a `CheckpointError` if the file has been written to since it was opened, or cannot be read any more."""

    def unpacked(self, chunks: Iterable[bytes]) -> FileRange:
        """Where these bytes lie from now on: in a temporary file, for all that is unpacked of this one.

        Raises:
            OSError: if there is no room for them.
        """
        with self._lock:
            if self._spool is None:
                self._spool = _Spool(self.path)
            return self._spool.add(chunks)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._spool is not None:
            self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalFile(SourceFile):
    """A regular file of this machine.

    Args:
        path: where it is, for messages.
        fd: its open file descriptor, which `close` closes.

    Raises:
        CheckpointError: if it is not a regular file, or its size cannot be found out.
    """

    def __init__(self, path: AnyPath, fd: int) -> None:
        super().__init__(path, 0)
        self.fd = fd
        status = self._status()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(
                "this is not a regular file",
                file=path,
                found=_file_kind(status.st_mode),
                expected="a file on disk: its parts are read by position",
                hint="save the stream to a file first",
            )
        self.size_bytes = status.st_size
        self._version = status.st_size, status.st_mtime_ns

    @classmethod
    def at(cls, path: Path) -> Self:
        """Open a file; errors as for `open`."""
        try:
            # Without O_NONBLOCK a pipe would block here until somebody writes to it.
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError as error:
            target = link_target(path)
            found = f"a link to {target}, which is not there" if target is not None else None
            raise CheckpointError(
                "there is no such file", file=path, found=found, hint=None if target else _similar(path)
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise CheckpointError(f"the file cannot be opened: {reason(error)}", file=path) from error
        try:
            return cls(path, fd)
        except BaseException:
            _close(fd)
            raise

    def beside(self, name: str, *, above: bool = False) -> SourceFile | None:
        for path in dict.fromkeys((self.path.absolute(), real_path(self.path))):
            for folder in (path.parent, path.parent.parent) if above else (path.parent,):
                place = folder / name
                if isinstance(place, Path) and quietly(place.is_file):
                    return LocalFile.at(place)
        return None

    def _read_some(self, offset_bytes: int, size_bytes: int) -> bytes:
        try:
            if hasattr(os, "pread"):
                return os.pread(self.fd, size_bytes, offset_bytes)
            with self._lock:  # Windows has no positioned read.
                os.lseek(self.fd, offset_bytes, os.SEEK_SET)
                return os.read(self.fd, size_bytes)
        except OSError as error:
            raise self._unreadable(error) from error

    def _status(self) -> os.stat_result:
        try:
            return os.fstat(self.fd)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"the file cannot be read: {reason(error)}", file=self.path)

    def _now_bytes(self) -> int:
        return self._status().st_size

    def refuse_changed(self) -> None:
        status = self._status()
        if (status.st_size, status.st_mtime_ns) != self._version:
            raise CheckpointError(
                "the file was changed while it was read",
                file=self.path,
                hint="wait until nothing writes to it any more, and try again",
            )

    def close(self) -> None:
        super().close()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _close(fd)


class _Spool(LocalFile):
    """A temporary file without a name. One for all: a checkpoint may have more storages than a process may open files.

    Args:
        path: the file of whose parts it holds copies, for messages.
    """

    def __init__(self, path: AnyPath) -> None:
        import tempfile

        with tempfile.TemporaryFile(buffering=0) as file:
            super().__init__(path, os.dup(file.fileno()))

    def add(self, chunks: Iterable[bytes]) -> FileRange:
        """Add what a part consists of; if that fails, the next part is written over what there is of it."""
        with self._lock:
            start = os.lseek(self.fd, self.size_bytes, os.SEEK_SET)
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    left = left[os.write(self.fd, left) :]
            self.size_bytes = os.lseek(self.fd, 0, os.SEEK_CUR)
        return FileRange(self, start, self.size_bytes - start)


class FileRange(NamedTuple):
    """`size_bytes` bytes of a file, from `offset_bytes` on."""

    file: SourceFile
    offset_bytes: int
    size_bytes: int

    def read(self) -> bytes:
        """All of the bytes."""
        return self.file.read(self.offset_bytes, self.size_bytes)


def read_whole(file: SourceFile, limit_bytes: int, what: str = "the file is too long to be read") -> bytes:
    """All of a file that says something of a checkpoint, such as a configuration.

    Args:
        file: the file, open.
        limit_bytes: how long it may be.
        what: what to say of one that is longer.

    Raises:
        CheckpointError: if it cannot be read, or is longer.
    """
    if file.size_bytes > limit_bytes:
        raise CheckpointError(
            what, file=file.path, found=f"{file.size_bytes:,} bytes", expected=f"at most {limit_bytes:,}"
        )
    return file.read(0, file.size_bytes)


class FolderEntry(NamedTuple):
    """A name in a folder, and what is there: links are followed, and one to nothing is neither."""

    path: AnyPath
    is_file: bool
    is_folder: bool


def link_target(path: AnyPath) -> Path | None:
    """Where a link leads; None if it is not a link, or cannot be read."""
    if not isinstance(path, Path):
        return None
    try:
        return path.readlink()
    except (OSError, ValueError):
        return None


def reason(error: OSError | ValueError) -> str:
    """Why the system did not do something, in its own words."""
    return getattr(error, "strerror", None) or str(error)


def quietly(ask: Callable[[], bool]) -> bool:
    """The answer to a question about a path; false where the system refuses to look."""
    try:
        return ask()
    except OSError:
        return False


def _similar(path: Path) -> str | None:
    """The advice to take what has nearly that name; None if nothing has."""
    import difflib  # only here: an error may take its time

    while path != path.parent and not quietly(path.parent.is_dir):
        path = path.parent
    with contextlib.suppress(OSError, ValueError):
        found = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1)
        return f"did you mean {path.with_name(found[0])}?" if found else None
    return None


def _close(fd: int) -> None:
    # Nothing was written: whatever closing fails for, what was read is right.
    with contextlib.suppress(OSError):
        os.close(fd)


def _file_kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for matches, name in kinds if matches(mode)), "a device")

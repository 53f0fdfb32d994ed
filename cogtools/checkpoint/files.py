"""Where bytes lie: an open file, a storage in it, and a tensor's view of that storage.

Files are read with positioned reads, never through a memory map: a file that shrinks while it is read then gives
an error that can be told, not a SIGBUS that ends the process.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from typing import TYPE_CHECKING, NamedTuple, Self

from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class SourceFile:
    """A regular file, held open for reading, so that what was looked at is what is read later.

    Args:
        path: where it is, for messages.
        fd: its open file descriptor, which `close` closes.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        status = os.fstat(fd)
        self.size_bytes = status.st_size
        self._version = status.st_size, status.st_mtime_ns
        self._lock = threading.RLock()
        self._spool: _Spool | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file. Pipes, devices and folders are refused: their bytes cannot be read by position.

        Raises:
            CheckpointError: if it is missing, not readable, or not a regular file.
        """
        try:
            # Without O_NONBLOCK a pipe would block here until somebody writes to it.
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError as error:
            found = f"a link to {path.readlink()}, which is not there" if path.is_symlink() else None
            raise CheckpointError("there is no such file", file=path, found=found) from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise CheckpointError(f"the file cannot be opened: {_reason(error)}", file=path) from error
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            raise CheckpointError(
                "this is not a regular file",
                file=path,
                found=_file_kind(mode),
                expected="a file on disk: its parts are read by position",
                hint="save the stream to a file first",
            )
        return cls(path, fd)

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
            try:
                part = self._pread(missing, offset_bytes + size_bytes - missing)
            except OSError as error:
                raise CheckpointError(f"the file cannot be read: {_reason(error)}", file=self.path) from error
            if not part:
                raise self.cut_short(offset_bytes, size_bytes)
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pread(self, size_bytes: int, offset_bytes: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self.fd, size_bytes, offset_bytes)
        with self._lock:  # Windows has no positioned read.
            os.lseek(self.fd, offset_bytes, os.SEEK_SET)
            return os.read(self.fd, size_bytes)

    def cut_short(self, offset_bytes: int, size_bytes: int) -> CheckpointError:
        """The error for a read beyond the end of the file."""
        return CheckpointError(
            "the file is cut short",
            file=self.path,
            found=f"the file ends at {os.fstat(self.fd).st_size:,}",
            expected=f"{size_bytes:,} bytes at offset {offset_bytes:,}",
            hint="copy or download it again; a checkpoint that is still being written looks like this too",
        )

    def refuse_changed(self) -> None:
        """Raise a `CheckpointError` if the file has been written to since it was opened."""
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != self._version:
            raise CheckpointError(
                "the file was changed while it was read",
                file=self.path,
                hint="wait until nothing writes to it any more, and try again",
            )

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
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # It was only read: whatever close reports changes nothing.
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Spool(SourceFile):
    """A temporary file without a name. One for all: a checkpoint may have more storages than a process may open files.

    Args:
        path: the file of whose parts it holds copies, for messages.
    """

    def __init__(self, path: Path) -> None:
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


def is_file(path: Path) -> bool:
    """Whether a path is that of a file; false also where it may not be looked at, or no file can have that name."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether a path is that of a folder; false also where `is_file` says it may be."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _file_kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for matches, name in kinds if matches(mode)), "a device")

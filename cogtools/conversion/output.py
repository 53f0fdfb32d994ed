"""Writing a safetensors file: bytes stream from file to file, and the target appears whole or not at all.

The file grows beside its place under a temporary name, is synced, and then takes its name in one step. Whatever
happens before that step leaves the target as it was. A temporary file of a run that was killed is told from one that
is still being written by a lock: who writes holds it, and it goes with the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.checkpoint.files import is_folder
from cogtools.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from cogtools.checkpoint.files import FileRange, SourceFile

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: no lock is needed there.
    fcntl = None  # type: ignore[assignment]

_TEMPORARY_SUFFIX = ".cogtools-tmp"
_MAX_NAME_BYTES = 200
"""The longest name that may stand in that of its temporary file: file systems allow 255 bytes."""


_COPY_BYTES = 16 << 20
"""How much is copied at once: in between, a signal is heard."""

_ELSEWHERE = "choose another place"

_NO_KERNEL_COPY = {
    *(errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ETXTBSY),
    errno.EIO,  # reading or writing? Doing both apart tells.
}
"""What `copy_file_range` answers where the system or a file system cannot do it."""


_CANNOT_RESERVE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV}
"""What `posix_fallocate` answers where a file system cannot do it."""


@dataclass(slots=True)
class AtomicFile:
    """A file that takes its place when it is complete, or never.

    Use it in a `with` statement: write to it, `sync` it, `publish` it. If the block ends before `publish`, what was
    written is removed, and so are the folders that were made for it.

    Attributes:
        target: where the file will be.
        overwrite: whether a file that is there already may be replaced.
    """

    target: Path
    overwrite: bool = False
    _fd: int = field(default=-1, init=False)
    _temporary: Path | None = field(default=None, init=False)
    _new_folders: list[Path] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        self.refuse_existing()
        try:
            with _write_errors(self.target):
                self._make_folders()
                _remove_leftovers(self.target)
                self._create()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def refuse_existing(self) -> None:
        """Raise an `OutputError` if the target is there and may not be replaced."""
        if is_folder(self.target):
            raise OutputError("the output would replace a folder", file=self.target, hint=_ELSEWHERE)
        if not self.overwrite and os.path.lexists(self.target):
            _remove_leftovers(self.target)
            raise _exists(self.target)

    def refuse_source(self, sources: Iterable[SourceFile]) -> None:
        """Raise an `OutputError` if the target is one of the files that are read."""
        try:
            target = self.target.stat()
        except OSError:
            return
        if any(os.path.samestat(target, os.fstat(source.fd)) for source in sources):
            raise OutputError(
                "the output would replace the checkpoint that it is made of", file=self.target, hint=_ELSEWHERE
            )

    def _make_folders(self) -> None:
        missing = []
        folder = self.target.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # made by somebody else meanwhile
                path.mkdir()
                self._new_folders.append(path)

    def _create(self) -> None:
        while True:
            name = f"{_temporary_start(self.target)}{os.getpid()}-{os.urandom(4).hex()}{_TEMPORARY_SUFFIX}"
            self._temporary = self.target.with_name(name)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._fd = os.open(self._temporary, flags, 0o666)  # the umask takes from this what it should
            _lock(self._fd, wait=True)
            if os.fstat(self._fd).st_nlink:
                return
            os.close(self._fd)  # Another run took it for a leftover before it was locked.

    def reserve(self, size_bytes: int) -> None:
        """Claim the room for the file: a full disk shows at once, and writing is faster.

        Raises:
            OutputError: if there is no room.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise _cannot_write(self.target, error) from error

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        with _write_errors(self.target):
            while view:
                view = view[os.write(self._fd, view) :]

    def copy(self, source: FileRange) -> None:
        """Append a range of another file: inside the kernel if it can, by reading and writing if not.

        Raises:
            CheckpointError: if the source ends too early.
            OutputError: if the output cannot be written.
        """
        file, offset, missing = source
        while missing:
            count = self._kernel_copy(file.fd, offset, min(missing, _COPY_BYTES))
            if not count:
                data = file.read(offset, min(missing, _COPY_BYTES))
                self.write(data)
                count = len(data)
            offset += count
            missing -= count

    def _kernel_copy(self, source_fd: int, offset: int, size: int) -> int:
        """How many bytes the kernel copied; 0 if it could not, or the source is at its end."""
        if not hasattr(os, "copy_file_range"):
            return 0
        try:
            return os.copy_file_range(source_fd, self._fd, size, offset)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                return 0
            raise _cannot_write(self.target, error) from error

    def sync(self) -> None:
        """Wait until the bytes are on the disk."""
        with _write_errors(self.target):
            os.fsync(self._fd)

    def sha256(self) -> str:
        """The SHA-256 of what was written."""
        import hashlib

        with _write_errors(self.target), os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def publish(self) -> None:
        """Give the file its name.

        Raises:
            OutputError: if a file has appeared there meanwhile and may not be replaced.
        """
        if self._temporary is None:
            raise ValueError("a file is published once, inside its with statement")
        with _write_errors(self.target):
            if self.overwrite:
                self._temporary.replace(self.target)
            else:
                _rename_to_new(self._temporary, self.target)
        self._temporary = None
        self._new_folders = []
        _sync_folder(self.target.parent)

    def _discard(self) -> None:
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            self._temporary = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for folder in reversed(self._new_folders):
            with contextlib.suppress(OSError):  # not empty: somebody else has put something there
                folder.rmdir()
        self._new_folders = []


def refuse_unwritable(target: Path, size_bytes: int) -> None:
    """Raise an `OutputError` if a file of this size can be seen not to find a place there, without writing."""
    folder = target.parent
    with _write_errors(target):
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not hasattr(os, "statvfs"):
            return
        status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < size_bytes:
        raise OutputError(
            "there is no room for the output",
            file=folder,
            found=f"{free:,} bytes free",
            expected=f"{size_bytes:,} bytes",
            hint="free some space, or choose another folder",
        )


def _lock(fd: int, *, wait: bool) -> bool:
    """Lock a file for as long as it is open; False if another process holds it or it cannot be locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove_leftovers(target: Path) -> None:
    """Remove what killed runs have left of the same target, but nothing that is still being written."""
    for path in leftovers(target):
        with contextlib.suppress(OSError):
            if fcntl is None:
                path.unlink()
                continue
            fd = os.open(path, os.O_RDONLY)
            try:
                if _lock(fd, wait=False):
                    path.unlink()
            finally:
                os.close(fd)


def leftovers(target: Path) -> Iterator[Path]:
    """The temporary files of a target, left or still being written."""
    start = _temporary_start(target)
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(start) and entry.name.endswith(_TEMPORARY_SUFFIX):
                yield Path(entry.path)


def _temporary_start(target: Path) -> str:
    """What the names of a target's temporary files begin with: its own name or, if that is long, what stands for it."""
    name = os.fsencode(target.name)
    if len(name) <= _MAX_NAME_BYTES:
        return f".{target.name}."
    import hashlib

    return f".{hashlib.sha256(name).hexdigest()[:32]}."


def _rename_to_new(temporary: Path, target: Path) -> None:
    """Rename, unless the target is there."""
    try:
        os.link(temporary, target)
    except FileExistsError as error:
        raise _exists(target) from error
    except (OSError, NotImplementedError) as error:
        # No hard links here (FAT, some network file systems, Windows without the right to make them).
        if os.path.lexists(target):
            raise _exists(target) from error
        temporary.rename(target)
    else:
        temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename last. Windows and some network file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _exists(target: Path) -> OutputError:
    return OutputError(
        "the output exists already",
        file=target,
        hint="give another folder, or --overwrite to replace it",
    )


@contextlib.contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Tell what the system says against writing as an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(target, error) from error


def _cannot_write(target: Path, error: OSError) -> OutputError:
    hints = {
        errno.ENOSPC: "free some space, or choose another folder",
        errno.EDQUOT: "free some space, or choose another folder",
        errno.EFBIG: "the file system or a limit (ulimit -f) does not allow a file of this size",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ENOENT: "a part of this path is a link that leads nowhere: choose another place",
        errno.ENOTDIR: "a part of this path is a file, not a folder: choose another place",
    }
    return OutputError(
        f"the output cannot be written: {error.strerror or error}",
        file=target,
        hint=hints.get(error.errno or 0, "choose a folder that you may write to"),
    )

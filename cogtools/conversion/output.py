"""Writing outputs: bytes stream from file to file, and a target appears whole or not at all.

A target is one file (`AtomicFile`) or a set of files in a folder of their own (`AtomicFolder`). It grows beside its
place under a temporary name, is synced, and then takes its name. Whatever happens before that leaves the target as it
was. A lock tells what a killed run has left from what is still being written: the writer holds it, and it ends with the
process.

One step is enough for a file, and for a folder where none is yet. A folder that is replaced takes two: the old one is
moved aside, the new one takes its name. What a killed run left between the two is put back by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cogtools.checkpoint.places import is_folder
from cogtools.errors import OutputError
from cogtools.interruption import signals_held_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from cogtools.checkpoint.files import FileRange, SourceFile
    from cogtools.checkpoint.paths import AnyPath

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: no lock is needed there.
    fcntl = None  # type: ignore[assignment]

_TEMPORARY_SUFFIX = ".cogtools-tmp"
"""Ends the name of what is being written, and of what is being removed."""

_OLD_SUFFIX = ".cogtools-old"
"""Ends the name of a folder that was moved aside, to be replaced."""

_MAX_NAME_BYTES = 200
"""The longest name that may stand in that of its temporary file: file systems allow 255 bytes."""

_COPY_BYTES = 16 << 20
"""How much is copied at once: in between, a signal is heard."""

_MOST_RACES = 100
"""How often another run may put its folder into the place while it is replaced."""

_ELSEWHERE = "choose another place"

_NO_KERNEL_COPY = {
    *(errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ETXTBSY),
    errno.EIO,  # reading or writing? Doing both apart tells.
}
"""What `copy_file_range` answers where the system or a file system cannot do it."""

_CANNOT_RESERVE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV}
"""What `posix_fallocate` answers where a file system cannot do it."""

_CANNOT_SYNC = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP}
"""What opening or syncing a folder answers where that cannot be done: on Windows and some network file systems."""


class GrowingFile:
    """A file that is being written, at its end or at any position.

    In a `with` statement it is synced and closed at the end; a block that ends with an error closes it only.

    Attributes:
        target: where it will be found, for messages.
        size_bytes: up to where it was written.
    """

    def __init__(self, target: AnyPath) -> None:
        self.target = target
        self.size_bytes = 0
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.sync()
        finally:
            self.close()

    @property
    def is_open(self) -> bool:
        """Whether it is still being written."""
        return self._fd >= 0

    def begin(self, path: Path) -> None:
        """Create it under this name, which nothing may have yet."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._fd = os.open(path, flags, 0o666)  # the umask takes from this what it should

    def reserve(self, size_bytes: int) -> None:
        """Claim the disk space for the file: a full disk shows at once, and writing is faster.

        Raises:
            OutputError: if there is not enough.
        """
        if not hasattr(os, "posix_fallocate") or not size_bytes:
            return
        try:
            os.posix_fallocate(self._fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise _cannot_write(self.target, error) from error

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self.write_at(self.size_bytes, data)

    def write_at(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """Write bytes from a position on; what lies before it may still be unwritten."""
        view = memoryview(data).cast("B")
        end = offset_bytes + len(view)
        with _write_errors(self.target):
            while view:
                view = view[self._pwrite(view, end - len(view)) :]
        self.size_bytes = max(self.size_bytes, end)

    def _pwrite(self, data: memoryview, offset_bytes: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, data, offset_bytes)
        os.lseek(self._fd, offset_bytes, os.SEEK_SET)  # Windows has no positioned write.
        return os.write(self._fd, data)

    def copy(self, source: FileRange) -> None:
        """Append a range of another file; errors as for `copy_at`."""
        self.copy_at(self.size_bytes, source)

    def copy_at(self, offset_bytes: int, source: FileRange) -> None:
        """Copy a range of another file to a position: inside the kernel if it can, by reading and writing if not.

        Raises:
            CheckpointError: if the source ends too early.
            OutputError: if the output cannot be written.
        """
        file, start, missing = source
        while missing:
            size = min(missing, _COPY_BYTES)
            count = self._kernel_copy(file, start, size, offset_bytes)
            if count:
                self.size_bytes = max(self.size_bytes, offset_bytes + count)
            else:
                data = file.read(start, size)
                self.write_at(offset_bytes, data)
                count = len(data)
            start += count
            offset_bytes += count
            missing -= count

    def _kernel_copy(self, source: SourceFile, start: int, size_bytes: int, offset_bytes: int) -> int:
        """How many bytes the kernel copied; 0 if it could not, or the source is at its end."""
        source_fd = getattr(source, "fd", -1)  # a file that is not on this machine has none
        if source_fd < 0 or not hasattr(os, "copy_file_range"):
            return 0
        try:
            return os.copy_file_range(source_fd, self._fd, size_bytes, start, offset_bytes)
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

    def close(self) -> None:
        """Close it; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # It is synced, or thrown away: whatever close says changes nothing.
                os.close(fd)


class _Atomic:
    """What is written under a temporary name beside its place, and takes its place when it is complete, or never.

    If the `with` block ends before `publish`, what was written is removed, and so are the folders made for it.
    """

    target: Path
    _place: Path
    """The target itself; where it is a link to a folder, that folder."""
    _temporary: Path | None
    _new_folders: list[Path]

    def __enter__(self) -> Self:
        self.refuse_existing()
        try:
            with _write_errors(self.target):
                self._make_folders()
                remove_leftovers(self._place)
                self._create()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def refuse_existing(self) -> None:
        """Raise an `OutputError` if the target is there and may not be replaced."""
        raise NotImplementedError

    def _create(self) -> None:
        raise NotImplementedError

    def _discard(self) -> None:
        raise NotImplementedError

    def _make_folders(self) -> None:
        missing = []
        folder = self._place.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            with signals_held_back(), contextlib.suppress(FileExistsError):  # made by somebody else meanwhile
                path.mkdir()
                self._new_folders.append(path)

    def _sync_new_folders(self) -> None:
        """Make the folders that were made last, each in its parent, before anything in them is."""
        for folder in self._new_folders:
            _sync_folder(folder.parent)

    def _remove_new_folders(self) -> None:
        for folder in reversed(self._new_folders):
            with contextlib.suppress(OSError):  # not empty: somebody else has put something there
                folder.rmdir()
        self._new_folders = []


class AtomicFile(_Atomic, GrowingFile):
    """A file that takes its place when it is complete, or never.

    Use it in a `with` statement: write to it, `sync` it, `publish` it. If the block ends before `publish`, what was
    written is removed, and so are the folders that were made for it.

    Attributes:
        target: where the file will be.
        overwrite: whether a file that is there already may be replaced.
    """

    target: Path

    def __init__(self, target: Path, *, overwrite: bool = False) -> None:
        super().__init__(target)
        self.overwrite = overwrite
        self._place = target
        self._temporary = None
        self._new_folders = []

    def refuse_existing(self) -> None:
        """Raise an `OutputError` if the target is there and may not be replaced."""
        if is_folder(self.target):
            raise OutputError("the output would replace a folder", file=self.target, hint=_ELSEWHERE)
        if _is_special(self.target):
            raise OutputError(
                "the output would replace a pipe, a socket or a device", file=self.target, hint=_ELSEWHERE
            )
        if not self.overwrite and os.path.lexists(self.target):
            remove_leftovers(self.target)
            raise output_exists(self.target)

    def refuse_source(self, sources: Iterable[SourceFile]) -> None:
        """Raise an `OutputError` if the target is one of the files that are read."""
        _refuse_sources([self.target], sources, self.target)

    def _create(self) -> None:
        while True:
            self._temporary = _temporary_name(self.target)
            self.begin(self._temporary)
            _lock(self._fd, wait=True)
            if _is_there(self._temporary, self._fd):
                return
            self.close()  # Another run took it for a leftover before it was locked.

    def publish(self) -> None:
        """Give the file its name.

        Raises:
            OutputError: if a file has appeared there meanwhile and may not be replaced.
        """
        if self._temporary is None:
            raise ValueError("a file is published once, inside its with statement")
        self._sync_new_folders()
        with signals_held_back(), _write_errors(self.target):
            if self.overwrite:
                self._temporary.replace(self.target)
            else:
                _rename_to_new(self._temporary, self.target)
            self._temporary = None
            self._new_folders = []
        _sync_folder(self.target.parent)

    def _discard(self) -> None:
        with signals_held_back():
            if self._temporary is not None:
                with contextlib.suppress(OSError):
                    self._temporary.unlink(missing_ok=True)
                self._temporary = None
            self.close()
            self._remove_new_folders()


class AtomicFolder(_Atomic):
    """A folder of files that takes its place when all of them are complete, or never.

        with AtomicFolder(target) as folder:
            with folder.create("config.json") as file:
                file.write(b"{}")
            folder.publish()

    Several files may be open at once. An empty folder in its place is filled; any other is replaced as a whole, if
    `overwrite` allows it and cogtools wrote it.

    Attributes:
        target: where the folder will be. A link to a folder stays, and leads to the new one.
        overwrite: whether a folder that is there already may be replaced.
        is_ours: whether a folder that is there was written by cogtools, all of it; any other is never replaced.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, is_ours: Callable[[Path], bool] | None = None) -> None:
        self.target = target
        self.overwrite = overwrite
        self.is_ours = is_ours or (lambda _: False)
        is_indirect = target.is_symlink() or target.name in ("", "..")
        self._place = Path(os.path.realpath(target)) if is_indirect else target
        self._temporary = None
        self._new_folders = []
        self._fd = -1
        self._members: list[GrowingFile] = []

    def refuse_existing(self) -> None:
        """Raise an `OutputError` if the target is there and may not be replaced.

        A folder that a killed run has moved aside is put back first.
        """
        with _write_errors(self.target):
            put_back(self._place)
            if self.target.is_symlink() and not self._place.parent.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._refuse(self._place)

    def _refuse(self, folder: Path) -> None:
        """Raise an `OutputError` if what is in the place may not be replaced. Another run may just move it aside."""
        try:
            before = _identity(folder)
            is_current, is_empty = folder.samefile(Path()), not any(folder.iterdir())
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            raise OutputError(
                "the output is a folder, and there is a file in its place", file=self.target, hint=_ELSEWHERE
            ) from error
        if is_current:
            raise OutputError(
                "the output would replace the current folder", file=self.target, hint="name a folder in it"
            )
        if is_empty:
            return
        if not self.overwrite:
            remove_leftovers(folder)
            raise output_exists(self.target)
        if not self.is_ours(folder) and _identity(folder) == before:
            raise OutputError(
                "the output would replace a folder that cogtools did not write", file=self.target, hint=_ELSEWHERE
            )

    def refuse_source(self, sources: Iterable[SourceFile]) -> None:
        """Raise an `OutputError` if one of the files that are read lies in the folder that would be replaced."""
        _refuse_sources(self._place.rglob("*"), sources, self.target)

    def create(self, name: str) -> GrowingFile:
        """A new file in the folder.

        Args:
            name: its name, with `/` after the names of folders in the folder.
        """
        path = PurePosixPath(name)
        if self._temporary is None or not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError("files are created inside the with statement, and inside the folder")
        file = GrowingFile(self.target / path)
        with _write_errors(file.target):
            (self._temporary / path).parent.mkdir(parents=True, exist_ok=True)
            file.begin(self._temporary / path)
        self._members.append(file)
        return file

    def _create(self) -> None:
        while True:
            self._temporary = _temporary_name(self._place)
            self._temporary.mkdir()  # the umask takes from 0o777 what it should
            if fcntl is None:
                return
            with contextlib.suppress(FileNotFoundError):
                self._fd = os.open(self._temporary, os.O_RDONLY | os.O_DIRECTORY)
                _lock(self._fd, wait=True)
                if _is_there(self._temporary, self._fd):
                    return
            self._close()  # Another run took it for a leftover before it was locked.

    def publish(self) -> None:
        """Give the folder its name.

        Raises:
            OutputError: if a folder has appeared there meanwhile and may not be replaced.
        """
        if self._temporary is None or any(file.is_open for file in self._members):
            raise ValueError("a folder is published once, inside its with statement, when its files are closed")
        with _write_errors(self.target):
            for folder, _, _ in os.walk(self._temporary, topdown=False):
                _sync_folder(Path(folder))
        self._sync_new_folders()
        with signals_held_back(), _write_errors(self.target):
            replaced = self._take_place(self._temporary)
            self._temporary = None
            self._new_folders = []
        _sync_folder(self._place.parent)
        for old in replaced:
            _throw_away(old, self._place)

    def _take_place(self, folder: Path) -> list[Path]:
        """Rename the folder to its place; the folders that were moved aside for it."""
        replaced: list[Path] = []
        for _ in range(_MOST_RACES):
            try:
                folder.rename(self._place)  # over an empty folder too
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    put_back(self._place)
                    raise
            else:
                return replaced
            self._refuse(self._place)
            old = _temporary_name(self._place, _OLD_SUFFIX)
            with contextlib.suppress(FileNotFoundError):  # another run has just moved it aside
                self._place.rename(old)
                replaced.append(old)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def _discard(self) -> None:
        with signals_held_back():
            for file in self._members:
                file.close()
            if self._temporary is not None:
                _remove_tree(self._temporary)
                self._temporary = None
            self._close()
            self._remove_new_folders()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def put_back(target: Path) -> None:
    """Put back a folder that a killed run had moved aside and not yet replaced; remove those that were replaced.

    A run that is just between its two steps takes the folder that is put back for one of another run, and moves it
    aside again.
    """
    moved_aside = sorted(_siblings(target, _OLD_SUFFIX), key=_changed_ns)
    if not moved_aside:
        return
    if not os.path.lexists(target):
        with contextlib.suppress(OSError):  # something else has just taken the place
            moved_aside[-1].rename(target)
            del moved_aside[-1]
            _sync_folder(target.parent)
    if os.path.lexists(target):
        for old in moved_aside:
            _throw_away(old, target)


def _changed_ns(path: Path) -> int:
    try:
        return path.lstat().st_ctime_ns
    except OSError:
        return 0


def _throw_away(folder: Path, target: Path) -> None:
    """Remove a folder that was replaced. What is left of it if that is interrupted cannot be taken for a whole one."""
    garbage = _temporary_name(target)
    with contextlib.suppress(OSError):
        folder.rename(garbage)
        _remove_tree(garbage)


def _remove_tree(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def refuse_unwritable(target: AnyPath, size_bytes: int) -> None:
    """Raise an `OutputError` if it can be seen without writing that an output of this size cannot be written there.

    What will be put into a store is written into the folder for temporary files first.
    """
    folder = target.parent if isinstance(target, Path) else _temporary_folder()
    with _write_errors(target):
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        status = os.statvfs(folder) if hasattr(os, "statvfs") else None
        if status is not None and status.f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    free = size_bytes if status is None else status.f_bavail * status.f_frsize
    if free < size_bytes:
        raise OutputError(
            "not enough disk space for the output",
            file=folder,
            found=f"{free:,} bytes free",
            expected=f"{size_bytes:,} bytes",
            hint=_MORE_SPACE,
        )


def _temporary_folder() -> Path:
    import tempfile

    return Path(tempfile.gettempdir())


def _refuse_sources(targets: Iterable[Path], sources: Iterable[SourceFile], target: Path) -> None:
    """Raise an `OutputError` if one of the files that would be replaced is one of those that are read."""
    read = set()
    for source in sources:
        if getattr(source, "fd", -1) >= 0:
            status = os.fstat(source.fd)
            read.add((status.st_dev, status.st_ino))
    for path in targets:
        try:
            status = path.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in read:
            raise replaces_source(target)


def replaces_source(target: AnyPath) -> OutputError:
    """The error for an output in whose place is a file that it is made of."""
    return OutputError("the output would replace the checkpoint that it is made of", file=target, hint=_ELSEWHERE)


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from another one that takes its name; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder, or a link to such a thing."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _lock(fd: int, *, wait: bool) -> bool:
    """Lock a file or folder for as long as it is open; False if another process holds it or it cannot be locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _is_there(path: Path, fd: int) -> bool:
    """Whether an open file or folder still has this name."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except OSError:
        return False


def remove_leftovers(target: Path) -> None:
    """Remove what killed runs have left of the same target, but nothing that is still being written.

    A folder stays where folders cannot be locked (some network file systems): it may still be written to.
    """
    for path in leftovers(target):
        with contextlib.suppress(OSError):
            _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return  # Opening a pipe or a device of this name could wait for ever.
    if fcntl is None:
        path.unlink()  # on Windows: refused for a file that is open, and for a folder
        return
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not _lock(fd, wait=False):
            return
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            path.unlink()
        elif stat.S_ISDIR(mode):
            _remove_tree(path)
    finally:
        os.close(fd)


def leftovers(target: Path) -> Iterator[Path]:
    """The temporary files and folders of a target, left or still being written."""
    return _siblings(target, _TEMPORARY_SUFFIX)


def _siblings(target: Path, suffix: str) -> Iterator[Path]:
    start = _temporary_start(target)
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(start) and entry.name.endswith(suffix):
                yield Path(entry.path)


def _temporary_name(target: Path, suffix: str = _TEMPORARY_SUFFIX) -> Path:
    return target.with_name(f"{_temporary_start(target)}{os.getpid()}-{os.urandom(4).hex()}{suffix}")


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
        raise output_exists(target) from error
    except (OSError, NotImplementedError) as error:
        # No hard links here (FAT, some network file systems, Windows without the right to make them).
        if os.path.lexists(target):
            raise output_exists(target) from error
        temporary.rename(target)
    else:
        with contextlib.suppress(OSError):  # The output is there; a second name of it is a leftover.
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make what was renamed or made in a folder last, where a folder can be synced.

    Raises:
        OutputError: if the system cannot promise it.
    """
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            what = f"the folder of the output cannot be synced: {error.strerror or error}"
            raise OutputError(what, file=folder, hint=_WRITE_ERROR_HINTS.get(error.errno or 0)) from error


def output_exists(target: AnyPath) -> OutputError:
    """The error for an output that is there already and may not be replaced."""
    return OutputError(
        "the output exists already",
        file=target,
        hint="give another folder, or --overwrite to replace it",
    )


@contextlib.contextmanager
def _write_errors(target: AnyPath) -> Iterator[None]:
    """Raise what the system reports on writing as an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(target, error) from error


_MORE_SPACE = "free some space, or choose another folder"

_WRITE_ERROR_HINTS = {
    errno.ENOSPC: _MORE_SPACE,
    errno.EDQUOT: _MORE_SPACE,
    errno.EFBIG: "the file system or a limit (ulimit -f) does not allow a file of this size",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "raise the limit (ulimit -n)",
    errno.ENOMEM: "free some memory",
    errno.EIO: "look at the disk: this is an error of the device or the network file system",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "a part of this path is a link that leads nowhere: choose another place",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another place",
    errno.EBUSY: "it is in use by the system or another run: choose another place",
}


def _cannot_write(target: AnyPath, error: OSError) -> OutputError:
    return OutputError(
        f"the output cannot be written: {error.strerror or error}",
        file=target,
        hint=_WRITE_ERROR_HINTS.get(error.errno or 0, "choose a folder that you may write to"),
    )

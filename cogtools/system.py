"""What the system may refuse: memory, threads, processes, files, libraries. Each becomes one error in plain words."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.errors import CogtoolsError, LibraryError
from cogtools.interruption import is_interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
"""How many threads the linear algebra of NumPy and PyTorch uses: read when they are imported, never later."""

_NUMPY_BYTES = 256 << 20
"""The address space that has to be free for NumPy: it takes 110 MB with one thread (2.4), the rest is for data."""

_PACKAGES = {"yaml": "pyyaml"}
"""What pip calls a library, where that is not its name."""


def prepare_libraries() -> None:
    """Set what the libraries for arithmetic read when they are imported. Call it before that.

    They use one thread, unless the user has set how many: the matrices are small, and threads spend most of their time
    waiting for each other, ten times as long as the work takes if another program is running. Where threads are
    scarce, the libraries call `exit(1)`, which would look like the verdict of `verify`; with one they start none.
    """
    for name in _THREADS:
        os.environ.setdefault(name, "1")
    limit = _address_space_limit()
    if limit is not None:
        sys.meta_path.insert(0, _NumPyNeedsMemory(limit))


class _NumPyNeedsMemory:
    """Stands before the import of NumPy where memory is limited: OpenBLAS calls `exit(1)` if it gets too little."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """Find nothing, and raise a `CogtoolsError` if NumPy would not get the memory that it needs."""
        if name != "numpy":
            return None
        free = self._limit_bytes - _address_space_in_use()
        if free < _NUMPY_BYTES:
            raise CogtoolsError(
                "not enough memory",
                found=f"a limit of {self._limit_bytes:,} bytes, of which {max(free, 0):,} are free",
                expected=f"{_NUMPY_BYTES:,} bytes free for NumPy",
                hint="raise the limit (ulimit -v)",
            )
        return None


def _address_space_limit() -> int | None:
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _address_space_in_use() -> int:
    """The bytes of address space that this process uses; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def as_cogtools_error(error: Exception) -> CogtoolsError | None:
    """An exception of Python or a library as an error that the user can act on; None if it is a bug of cogtools.

    Raises:
        KeyboardInterrupt: if the work was interrupted: then the exception is what somebody has made of that.
    """
    if is_interrupted():
        raise KeyboardInterrupt from error
    causes = list(_causes(error))
    known = next((cause for cause in causes if isinstance(cause, CogtoolsError)), None)
    if known is not None:
        return known
    library = _imported_library(error)
    for short in map(_shortage, causes):
        if short is not None:
            what, hint = short
            found = _one_line(error) + (f", while {library} was imported" if library else "")
            return CogtoolsError(what, found=found, hint=hint)
    if isinstance(error, ModuleNotFoundError) and library:
        package = _PACKAGES.get(library, library)
        return LibraryError(f"this needs {library}, which is not installed", hint=f"pip install {package}")
    if library:
        versions = _versions(error, library)
        return LibraryError(
            f"{library} cannot be imported",
            found=_one_line(causes[-1]),
            expected=f"versions that go together; installed: {versions}" if versions else None,
            hint=f"pip install --upgrade {_PACKAGES.get(library, library)}",
        )
    if isinstance(error, OSError):
        what = f"the system reports an error: {error.strerror or error}"
        return CogtoolsError(what, file=os.fsdecode(error.filename) if _is_name(error.filename) else None)
    return None


def _is_name(value: object) -> bool:
    return isinstance(value, (str, bytes))


_MORE_MEMORY = ("not enough memory", "free some memory, or raise the limit (ulimit -v, or that of the container)")
_MORE_FILES = ("too many open files", "raise the limit (ulimit -n)")
_MORE_THREADS = (
    "the system does not allow another process or thread",
    "raise the limit (ulimit -u, or that of the container), or end other programs",
)

_SHORT_ERRNOS = {
    errno.ENOMEM: _MORE_MEMORY,
    errno.EAGAIN: _MORE_THREADS,
    errno.EMFILE: _MORE_FILES,
    errno.ENFILE: _MORE_FILES,
}

_SHORT_TEXTS = {
    "can't start new thread": _MORE_THREADS,
    "can't allocate memory": _MORE_MEMORY,  # PyTorch raises a RuntimeError
    "bad_alloc": _MORE_MEMORY,  # what C++ says of it
    "failed to map segment": _MORE_MEMORY,  # the dynamic linker, of a library that does not fit into memory
    "cannot allocate memory": _MORE_MEMORY,
    "cannot map zero-fill pages": _MORE_MEMORY,
}


def _shortage(error: BaseException) -> tuple[str, str] | None:
    """What there was too little of, and what to do; None if that is not what the error says."""
    if isinstance(error, MemoryError):
        return _MORE_MEMORY
    if isinstance(error, OSError) and error.errno in _SHORT_ERRNOS:
        return _SHORT_ERRNOS[error.errno]
    if isinstance(error, (OSError, ImportError, RuntimeError)):
        text = str(error).lower()
        return next((short for part, short in _SHORT_TEXTS.items() if part in text), None)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those that it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _modules(error: BaseException) -> Iterator[tuple[str, bool]]:
    """The module of each call on the way to where an error was raised, and whether it was being imported."""
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_name == "<module>"
        traceback = traceback.tb_next


def _imported_library(error: BaseException) -> str | None:
    """The library whose import failed with an error; None if it was raised otherwise, or by a module of cogtools."""
    names = [error.name] if isinstance(error, ModuleNotFoundError) else []
    names += [name for name, is_import in _modules(error) if is_import]
    names += [error.name] if isinstance(error, ImportError) else []
    libraries = (name.partition(".")[0] for name in names if name)
    return next((library for library in libraries if library not in ("cogtools", "__main__")), None)


def _versions(error: BaseException, library: str) -> str:
    """The versions of the libraries that took part in a failed import."""
    from importlib.metadata import PackageNotFoundError, version

    names = [library, *(name.partition(".")[0] for cause in _causes(error) for name, _ in _modules(cause))]
    names += [str(cause.name).partition(".")[0] for cause in _causes(error) if isinstance(cause, ImportError)]
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(f"{name} {version(_PACKAGES.get(name, name))}")
        except (PackageNotFoundError, ValueError):
            continue  # a module of Python, or cogtools
    return ", ".join(found)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

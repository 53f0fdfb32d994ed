"""What a server or an object store answers for: which files there are, and ranges of their bytes.

What is asked once is kept for as long as the path that was given lives. Requests that may go through later are made
again, with growing pauses. No message has a URL that a library has put into it: it could be signed.
"""

from __future__ import annotations

import random
import re
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.paths import HTTP_SCHEMES
from cogtools.errors import CheckpointError, OptionError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from typing import TypeVar

    from cogtools.checkpoint.files import FolderEntry
    from cogtools.checkpoint.paths import RemotePath

    T = TypeVar("T")

BLOCK_BYTES = 128 << 10
"""What is read at least at once, and kept: a checkpoint's directory, pickle and headers are read in small parts."""

RANGE_BYTES = 8 << 20
"""What is asked for at most in one request: one that breaks off costs so much."""

PAUSES_SECONDS = (0.3, 1.0, 3.0, 8.0)
"""How long is waited before a request is made again, up to half more at random."""

MAX_PAUSE_SECONDS = 30.0
"""The longest pause that a server may ask for."""

_MAX_REASON = 200
_ANY_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")


class Found(NamedTuple):
    """What is at a path.

    Attributes:
        is_file: false for a folder.
        size_bytes: of a file.
        version: what changes with its content, and what that is called: an ETag, a time … Not every answer has all.
        start: the first bytes of a file, where they came with the answer.
    """

    is_file: bool
    size_bytes: int = 0
    version: tuple[tuple[str, str], ...] = ()
    start: bytes = b""

    def is_same(self, other: Found | None) -> bool:
        """Whether both can be of one version of a file."""
        return other is not None and self.size_bytes == other.size_bytes and is_same(self.version, other.version)


_TIMES = frozenset({"Last-Modified", "LastModified", "mtime", "created"})
"""What tells less than the others: some stores round it in some answers."""


def is_same(one: Iterable[tuple[str, str]], other: Iterable[tuple[str, str]]) -> bool:
    """Whether what two answers say of a file's version goes together: by what both have, times only if nothing else."""
    before, after = dict(one), dict(other)
    both = before.keys() & after.keys()
    return all(before[name] == after[name] for name in (both - _TIMES or both))


class TryAgainError(Exception):
    """A request failed in a way that may not last.

    Attributes:
        what: why, in a few words.
        pause_seconds: how long the server wants to be left alone; None if it does not say.
    """

    def __init__(self, what: str, pause_seconds: float | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.pause_seconds = pause_seconds


class Store(ABC):
    """What answers for the paths of one URL.

    Attributes:
        lists: whether it can tell what is in a folder. A plain server cannot: there, names are asked for.
        parallel: how many requests it is sent at once.
    """

    lists: bool = True
    parallel: int = 8

    def __init__(self) -> None:
        self._found: dict[RemotePath, Found | None] = {}
        self._entries: dict[RemotePath, list[FolderEntry]] = {}
        self._refused: dict[RemotePath, str] = {}
        self._names: dict[RemotePath, list[str]] = {}

    def look(self, path: RemotePath) -> Found | None:
        """What is at a path; None if nothing is, or nothing that may be looked at. Asked once.

        Raises:
            CheckpointError: if there is no answer.
        """
        if path not in self._found:
            self._found[path] = self.ask(path)
        return self._found[path]

    def list(self, folder: RemotePath) -> list[FolderEntry]:
        """What is in a folder, by name; errors as for `look`. Asked once."""
        if folder not in self._entries:
            self._entries[folder] = sorted(self.ask_list(folder))
        return self._entries[folder]

    def why_not(self, path: RemotePath) -> str | None:
        """Why nothing was found at a path, where there was an answer that says more than that."""
        return self._refused.get(path)

    def is_folder(self, path: RemotePath) -> bool:
        """Whether a path is that of a folder; errors as for `look`."""
        found = self.look(path)
        return found is not None and not found.is_file

    def ask_for(self, folder: RemotePath, names: Iterable[str]) -> None:
        """Folders that `list` has to ask for where nothing lists what is in a folder."""
        self._names.setdefault(folder, []).extend(names)
        self._entries.pop(folder, None)

    @abstractmethod
    def refuse_changed(self, path: RemotePath, found: Found) -> None:
        """Raise a `CheckpointError` if a file is not as it was found any more."""

    @abstractmethod
    def ask(self, path: RemotePath) -> Found | None:
        """The same as `look`, asked again."""

    @abstractmethod
    def ask_list(self, folder: RemotePath) -> Iterable[FolderEntry]:
        """The same as `list`, asked again."""

    @abstractmethod
    def fetch(self, path: RemotePath, offset_bytes: int, size_bytes: int, found: Found) -> bytes:
        """A range of a file: exactly these bytes, and they are of the version that was found.

        Raises:
            CheckpointError: if they cannot be had.
        """

    def refuse_put(self, path: RemotePath) -> None:
        """Raise an `OutputError` if nothing can be put at a path, as far as that is known before."""
        raise OutputError(
            f"nothing can be written to {path.scheme}://",
            file=path,
            hint="write to a folder of this machine, or to an object store such as s3://",
        )

    def put(self, local: Path, path: RemotePath, *, overwrite: bool) -> None:
        """Put a file of this machine at a path, in one step.

        Raises:
            FileExistsError: if there is something already that may not be replaced.
            OutputError: if it cannot be done.
        """
        raise NotImplementedError

    def remove(self, path: RemotePath) -> None:
        """Remove what was put at a path.

        Raises:
            OutputError: if it cannot be done.
        """
        raise NotImplementedError

    def patiently(self, path: RemotePath, request: Callable[[], T]) -> T:
        """What a request answers, made again where it fails in a way that may not last."""
        for pause in PAUSES_SECONDS:
            try:
                return request()
            except TryAgainError as error:
                asked = error.pause_seconds or 0.0
                time.sleep(min(max(asked, pause * (1 + random.random() / 2)), MAX_PAUSE_SECONDS))  # noqa: S311
        try:
            return request()
        except TryAgainError as error:
            raise CheckpointError(
                "the server does not answer as it should",
                file=path,
                found=f"{error.what}, {len(PAUSES_SECONDS) + 1} times",
                hint="try again later",
            ) from error


def open_store(scheme: str, url: str) -> Store:
    """What answers for a URL.

    Raises:
        OptionError: if nothing installed does.
    """
    try:
        if scheme in HTTP_SCHEMES:
            from cogtools.checkpoint.remote.http import HttpStore

            return HttpStore(scheme)
        from cogtools.checkpoint.remote.objects import ObjectStore

        return ObjectStore(scheme, url)
    except ImportError as error:
        raise _not_installed(scheme, error) from error
    except CheckpointError:
        raise
    except Exception as error:
        raise OptionError(
            f"{scheme}:// cannot be opened",
            found=reason(error),
            hint=f"look at the configuration for {scheme} (fsspec's, and that of the store's own tools)",
        ) from error


_IN_EXTRA = (*HTTP_SCHEMES, "s3", "s3a")


def _not_installed(scheme: str, error: ImportError) -> OptionError:
    hint = "pip install 'cogtools[remote]'" if scheme in _IN_EXTRA else "install what is named above"
    return OptionError(f"what reads {scheme}:// is not installed", found=reason(error), hint=hint)


def reason(error: BaseException) -> str:
    """What an error of a library says, in a line and without URLs."""
    text = getattr(error, "strerror", None) or str(error)
    line = " ".join(_ANY_URL.sub("…", str(text)).split())[:_MAX_REASON]
    return line or type(error).__name__


def changed(path: RemotePath) -> CheckpointError:
    """The error for a file that is not the one that was opened any more."""
    return CheckpointError(
        "the file was changed while it was read",
        file=path,
        hint="wait until nothing writes to it any more, and try again",
    )

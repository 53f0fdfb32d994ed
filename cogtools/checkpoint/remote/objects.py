"""Object stores, the hub and other file systems that fsspec opens, such as s3, gs, hf and ssh.

Only what lists, looks and reads ranges is used of them: their opened files read ahead.
"""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs

from cogtools.checkpoint.files import FolderEntry
from cogtools.checkpoint.remote.store import Found, Store, TryAgainError, changed, reason
from cogtools.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from typing import TypeVar

    from cogtools.checkpoint.paths import RemotePath

    T = TypeVar("T")

_READ_ONLY = ("hf",)

_VERSIONS = ("ETag", "etag", "VersionId", "generation", "blob_id", "xet_hash", "LastModified", "mtime", "created")
"""What file systems call that which changes with a file's content."""


class ObjectStore(Store):
    """What a file system of fsspec reaches."""

    def __init__(self, scheme: str, url: str) -> None:
        super().__init__()
        self.scheme = scheme
        self.fs: Any = url_to_fs(url)[0]
        self.fs.invalidate_cache()  # an instance lives as long as the process, and keeps what it has listed
        self._hint = f"look whether the URL is right, and at the credentials and the configuration for {scheme}"
        self._is_asynchronous = bool(getattr(self.fs, "async_impl", False))
        if not self._is_asynchronous and scheme != "hf":
            self.parallel = 1

    def inner(self, path: RemotePath) -> str:
        """What the file system calls a path."""
        return str(self.fs._strip_protocol(path.url))  # noqa: SLF001 - fsspec has no other name for it

    def ask(self, path: RemotePath) -> Found | None:
        siblings = self._entries.get(path.parent)
        if siblings is not None and path not in self._found:
            return None
        self.fs.invalidate_cache(self.inner(path))
        try:
            return _found(self._call(path, lambda: self.fs.info(self.inner(path))))
        except FileNotFoundError:
            return None
        except PermissionError as error:
            self._refused[path] = reason(error)
            return None

    def ask_list(self, folder: RemotePath) -> Iterable[FolderEntry]:
        own = self.inner(folder).rstrip("/")
        try:
            infos = self._call(folder, lambda: self.fs.ls(self.inner(folder), detail=True))
        except FileNotFoundError:
            infos = []
        except PermissionError as error:
            raise CheckpointError("the folder cannot be read", file=folder, found=reason(error)) from error
        for info in infos:
            name = str(info["name"]).rstrip("/")
            if name == own:  # an object that stands for the folder itself
                continue
            path, found = folder / name.rpartition("/")[2], _found(info)
            self._found[path] = found
            yield FolderEntry(path, is_file=found.is_file, is_folder=not found.is_file)

    def fetch(self, path: RemotePath, offset_bytes: int, size_bytes: int, found: Found) -> bytes:
        # Where reading is opening a file, it is not to read ahead.
        options = {} if self._is_asynchronous else {"cache_type": "none"}
        start, end = offset_bytes, offset_bytes + size_bytes

        def read() -> bytes:
            content: bytes = self.fs.cat_file(self.inner(path), start=start, end=end, **options)
            return content

        try:
            content = self._call(path, read)
        except FileNotFoundError as error:
            raise changed(path) from error
        except PermissionError as error:
            raise CheckpointError("the file cannot be read", file=path, found=reason(error)) from error
        if len(content) != size_bytes:
            if not found.is_same(self.ask(path)):
                raise changed(path)
            raise CheckpointError(
                "the store does not serve parts of this file",
                file=path,
                found=f"{len(content):,} bytes",
                expected=f"{size_bytes:,} bytes at offset {offset_bytes:,}",
            )
        return content

    def refuse_changed(self, path: RemotePath, found: Found) -> None:
        self._entries.pop(path.parent, None)
        if not found.is_same(self.ask(path)):
            raise changed(path)

    def refuse_put(self, path: RemotePath) -> None:
        if self.scheme in _READ_ONLY:
            super().refuse_put(path)

    def put(self, local: Path, path: RemotePath, *, overwrite: bool) -> None:
        mode, inner = "overwrite" if overwrite else "create", self.inner(path)
        try:
            if self._is_asynchronous:
                self.fs.put_file(str(local), inner, mode=mode)
            else:
                self._put_in_steps(local, inner, overwrite=overwrite)
        except FileExistsError:
            raise
        except Exception as error:
            self._forget(path)
            if not overwrite and self.look(path) is not None:  # stores have several errors for that
                raise FileExistsError(inner) from error
            raise OutputError(
                "the output cannot be put there",
                file=path,
                found=reason(error),
                hint=self._hint,
            ) from error
        finally:
            self._forget(path)
        found = self.look(path)
        if found is None or found.size_bytes != local.stat().st_size:
            raise OutputError("the output was put there and is not there whole", file=path, hint="try again")

    def _put_in_steps(self, local: Path, inner: str, *, overwrite: bool) -> None:
        """Where a file grows under its name while it is put there: under another name first."""
        folder, _, name = inner.rpartition("/")
        growing = f"{folder}/.{name}.cogtools-tmp"
        if not overwrite and self.fs.exists(inner):
            raise FileExistsError(inner)
        self.fs.makedirs(folder, exist_ok=True)
        try:
            self.fs.put_file(str(local), growing)
            self.fs.mv(growing, inner)
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.rm_file(growing)
            raise

    def remove(self, path: RemotePath) -> None:
        try:
            self.fs.rm_file(self.inner(path))
        except Exception as error:
            raise OutputError("the output cannot be removed", file=path, found=reason(error)) from error
        finally:
            self._forget(path)

    def _forget(self, path: RemotePath) -> None:
        self._found.pop(path, None)
        while path not in (path.parent, None):
            path = path.parent
            self._entries.pop(path, None)
            self._found.pop(path, None)

    def _call(self, path: RemotePath, call: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return call()
            except (FileNotFoundError, PermissionError, NotImplementedError):
                raise
            except (OSError, TimeoutError) as error:
                raise TryAgainError(reason(error)) from error

        try:
            return self.patiently(path, attempt)
        except (CheckpointError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            raise CheckpointError(
                "the store cannot be read",
                file=path,
                found=reason(error),
                hint=self._hint,
            ) from error


def _found(info: Mapping[str, Any]) -> Found:
    version = tuple((name, _text(info[name])) for name in _VERSIONS if info.get(name) is not None)
    return Found(info.get("type") == "file", int(info.get("size") or 0), version)


def _text(value: object) -> str:
    """A value as text: the same time in two types is one."""
    return str(value.timestamp() if isinstance(value, datetime) else value)

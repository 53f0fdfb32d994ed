"""Paths: of this machine, and those that a URL names.

`AnyPath` is a `pathlib.Path` or a `RemotePath`, which has those of Path's methods that are used here. What is there is
asked through `cogtools.checkpoint.files`, so that a folder, a server and an object store are one thing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import quote, unquote

from cogtools.errors import OptionError

if TYPE_CHECKING:
    from cogtools.checkpoint.remote.store import Found, Store

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)

HTTP_SCHEMES = ("http", "https")


class _Origin:
    """What the paths of one URL share: where it leads, and what is known of what lies there.

    Args:
        scheme: such as "https" or "s3".
        authority: the host, bucket or owner, with user and password where the URL has them.
        query: what follows a "?" in a URL of HTTP: it is sent with every request, and shown nowhere.
    """

    def __init__(self, scheme: str, authority: str, query: str) -> None:
        self.scheme = scheme
        self.authority = authority
        self.query = query
        self._store: Store | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.scheme, self.authority, self.query

    @property
    def store(self) -> Store:
        """What answers for it, made when it is first asked."""
        if self._store is None:
            from cogtools.checkpoint.remote.store import open_store

            self._store = open_store(self.scheme, f"{self.scheme}://{self.authority}")
        return self._store


class RemotePath:
    """A path that a URL names. As text it has neither user nor password nor query: these are in `url` only.

    Paths that are made from one another share what they have found out: each is looked at once.
    """

    __slots__ = ("_origin", "_parts")

    def __init__(self, origin: _Origin, parts: tuple[str, ...]) -> None:
        self._origin = origin
        self._parts = parts

    @property
    def scheme(self) -> str:
        """How it is reached, such as "https" or "s3"."""
        return self._origin.scheme

    @property
    def store(self) -> Store:
        """What answers for it."""
        return self._origin.store

    @property
    def url(self) -> str:
        """The whole URL, secrets included: for requests, never for messages."""
        scheme, authority, query = self._origin.key
        return "/".join((f"{scheme}://{authority}", *self._parts)) + (f"?{query}" if query else "")

    def __str__(self) -> str:
        authority = self._origin.authority.rpartition("@")[2]
        return "/".join((f"{self.scheme}://{authority}", *self._parts))

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return as_path, (self.url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (self._origin.key, self._parts) == (other._origin.key, other._parts)

    def __hash__(self) -> int:
        return hash((self._origin.key, self._parts))

    def __lt__(self, other: AnyPath) -> bool:
        return str(self) < str(other)

    @property
    def parts(self) -> tuple[str, ...]:
        """Where it leads, then the names that lead there."""
        return str(RemotePath(self._origin, ())), *self._parts

    @property
    def name(self) -> str:
        """Its last part, as its folder would list it."""
        last = self._parts[-1] if self._parts else ""
        return unquote(last) if self.scheme in HTTP_SCHEMES else last

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot on."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in; the top is in itself."""
        return RemotePath(self._origin, self._parts[:-1])

    def __truediv__(self, name: str) -> RemotePath:
        parts = name.split("/")
        if self.scheme in HTTP_SCHEMES:
            parts = [quote(part, safe="") for part in parts]
        return RemotePath(self._origin, (*self._parts, *parts))

    def with_name(self, name: str) -> RemotePath:
        """The path of that name in the same folder."""
        return self.parent / name

    def absolute(self) -> RemotePath:
        """The same: a URL always is."""
        return self

    def resolve(self) -> RemotePath:
        """The same: where a server looks is its own affair."""
        return self

    def look(self) -> Found | None:
        """What is there; None if there is nothing.

        Raises:
            CheckpointError: if it cannot be found out.
        """
        return self.store.look(self)

    def is_file(self) -> bool:
        """Whether it is a file; errors as for `look`."""
        found = self.look()
        return found is not None and found.is_file

    def is_dir(self) -> bool:
        """Whether it is a folder; errors as for `look`."""
        return self.store.is_folder(self)


AnyPath: TypeAlias = Path | RemotePath


def as_path(given: str | os.PathLike[str] | RemotePath) -> AnyPath:
    """A path or a URL as a path. Nothing is asked of a server.

    Raises:
        OptionError: if it is a URL that can lead nowhere.
    """
    match = _URL.fullmatch(given) if isinstance(given, str) else None
    if isinstance(given, RemotePath):
        return given
    if match is None:
        return Path(given)
    scheme, rest = match["scheme"].lower(), match["rest"]
    if scheme == "file":
        return Path(unquote(rest.removeprefix("localhost")))
    if "::" in rest:
        raise OptionError(
            "a chain of URLs is not supported", found=f"{scheme}://…::…", hint="give the URL of the checkpoint itself"
        )
    query = ""
    if scheme in HTTP_SCHEMES:
        rest, _, query = rest.partition("#")[0].partition("?")
    authority, *parts = rest.rstrip("/").split("/")
    if not authority or any(part in (".", "..") for part in parts):
        what = "has no host or bucket" if not authority else "has a part that is not a name"
        raise OptionError(f"this URL {what}", found=f"{scheme}://{rest.rpartition('@')[2]}")
    return RemotePath(_Origin(scheme, authority, query), tuple(parts))


def local_path(given: str | os.PathLike[str] | RemotePath, what: str) -> Path:
    """A path of this machine.

    Raises:
        OptionError: if it is a URL; `what` says what is to be on this machine.
    """
    path = as_path(given)
    if isinstance(path, RemotePath):
        raise OptionError(f"{what}, and this is a URL", found=str(path), hint="give a path of this machine")
    return path


def real_path(path: AnyPath) -> AnyPath:
    """Where links lead in the end."""
    return path if isinstance(path, RemotePath) else Path(os.path.realpath(path))

"""Servers that speak plain HTTP: ranges of files, by name.

fsspec's file system has the session, and the user's configuration in it. Its own reads check neither the status nor
the range of an answer and take the whole of it into memory; so answers are read here: in pieces, never more than was
asked for, and held to status, Content-Range, length, encoding and version.

Nothing lists what is in a folder. What could be there is asked for by its usual names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import fsspec
import yarl
from fsspec.asyn import sync

from cogtools.checkpoint.files import FolderEntry, read_whole
from cogtools.checkpoint.limits import MAX_LATEST_BYTES
from cogtools.checkpoint.names import (
    EMA_SUFFIX,
    LATEST,
    LIBRARY_FILES,
    PIPELINE_INDEX,
    SHARD_INDEX_SUFFIXES,
    TRAINER_FILES,
)
from cogtools.checkpoint.remote.file import RemoteFile
from cogtools.checkpoint.remote.store import BLOCK_BYTES, Found, Store, TryAgainError, changed, is_same, reason
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cogtools.checkpoint.paths import RemotePath

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_EMPTY = re.compile(r"bytes \*/0")
_PIECE_BYTES = 256 << 10

_CONNECT_SECONDS = 15.0
_SILENCE_SECONDS = 30.0
_LEAST_BYTES_PER_SECOND = 16 << 10
"""A server that is slower is given up: one could send a byte every second, for ever."""

_NOT_THERE = (403, 404, 410)
"""A store that may not be listed answers 403 for what is not there."""

_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)

_INDICES = tuple(
    stem + suffix
    for suffix in SHARD_INDEX_SUFFIXES
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
    if (stem == "pytorch_model") == suffix.startswith(".bin")
)
_USUAL_NAMES = (*TRAINER_FILES, PIPELINE_INDEX, *LIBRARY_FILES, *_INDICES)


class _Answer(NamedTuple):
    """What a server says to a request for a range."""

    status: int
    phrase: str
    headers: Mapping[str, str]
    content: bytes

    @property
    def version(self) -> tuple[tuple[str, str], ...]:
        return tuple((name, self.headers[name]) for name in ("ETag", "Last-Modified") if name in self.headers)

    @property
    def is_page(self) -> bool:
        """Whether it is what a server says of a folder, or in place of what is not there."""
        return self.headers.get("Content-Type", "").startswith("text/html")


class HttpStore(Store):
    """Files of a server that speaks HTTP."""

    lists = False

    def __init__(self, scheme: str) -> None:
        super().__init__()
        configured = fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
        # As curl does it: proxies are where the environment says.
        self._fs: Any = fsspec.filesystem(scheme, client_kwargs={"trust_env": True, **configured})
        self._was_reached = False

    def is_folder(self, path: RemotePath) -> bool:
        return self.look(path) is None and bool(self.list(path))

    def ask(self, path: RemotePath) -> Found | None:
        answer = self._get(path, 0, BLOCK_BYTES)
        if answer.status in _NOT_THERE or (answer.status == 200 and answer.is_page):
            self._refused[path] = "a web page" if answer.status == 200 else f"HTTP {answer.status} {answer.phrase}"
            return None
        if answer.status == 416 and _EMPTY.fullmatch(answer.headers.get("Content-Range", "")):
            return Found(is_file=True, version=answer.version)
        if answer.status == 200:
            return Found(True, len(answer.content), answer.version, answer.content)
        return Found(True, _range_of(path, answer)[2], answer.version, answer.content)

    def ask_list(self, folder: RemotePath) -> Iterable[FolderEntry]:
        """What is there of what could be; the first file of weights is enough."""
        names = TRAINER_FILES if folder.name.removesuffix(EMA_SUFFIX).isdecimal() else _USUAL_NAMES
        latest = folder / LATEST
        folders = list(self._names.get(folder, ()))
        if names is _USUAL_NAMES and self.is_file(latest):
            yield FolderEntry(latest, is_file=True, is_folder=False)
            folders += self._named_by(latest)
        for name in dict.fromkeys(folders):
            if self.list(folder / name):
                yield FolderEntry(folder / name, is_file=False, is_folder=True)
        if not folders:
            found = next((folder / name for name in names if self.is_file(folder / name)), None)
            if found is not None:
                yield FolderEntry(found, is_file=True, is_folder=False)

    def refuse_changed(self, path: RemotePath, found: Found) -> None:
        if found.size_bytes:
            self.fetch(path, 0, 1, found)

    def _named_by(self, latest: RemotePath) -> list[str]:
        with RemoteFile(latest, self) as file:
            if file.size_bytes > MAX_LATEST_BYTES:
                return []
            name = read_whole(file, MAX_LATEST_BYTES).decode("utf-8", "replace").strip().removesuffix(EMA_SUFFIX)
        return [] if not name or "/" in name or name in (".", "..") else [name, name + EMA_SUFFIX]

    def fetch(self, path: RemotePath, offset_bytes: int, size_bytes: int, found: Found) -> bytes:
        answer = self._get(path, offset_bytes, size_bytes)
        if not is_same(answer.version, found.version):
            raise changed(path)
        if answer.status == 200:
            content = answer.content[offset_bytes : offset_bytes + size_bytes]
            if len(answer.content) != found.size_bytes or len(content) != size_bytes:
                raise changed(path)
            return content
        if answer.status != 206:
            raise changed(path)
        first, last, total = _range_of(path, answer)
        if total != found.size_bytes:
            raise changed(path)
        if (first, last) != (offset_bytes, offset_bytes + size_bytes - 1):
            raise _no_ranges(path, f"bytes {first:,} to {last:,}, where {size_bytes:,} from {offset_bytes:,} on were")
        return answer.content

    def _get(self, path: RemotePath, offset_bytes: int, size_bytes: int) -> _Answer:
        answer = self.patiently(path, lambda: self._get_once(path, offset_bytes, size_bytes))
        if answer.status not in (200, 206, 416, *_NOT_THERE):
            raise _refusal(path, answer)
        return answer

    def _get_once(self, path: RemotePath, offset_bytes: int, size_bytes: int) -> _Answer:
        try:
            answer: _Answer = sync(self._fs.loop, self._request, path, offset_bytes, size_bytes)
        except (CheckpointError, TryAgainError):
            raise
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, aiohttp.TooManyRedirects) as error:
            raise CheckpointError(
                "the server redirects to where nothing is read from",
                file=path,
                found="too many redirects" if isinstance(error, aiohttp.TooManyRedirects) else "not a URL of HTTP",
                hint="download the file with what follows such redirects",
            ) from error
        except aiohttp.ClientSSLError as error:
            raise CheckpointError("the server cannot be trusted", file=path, found=_certificate(error)) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError) and not self._was_reached:
                raise CheckpointError(
                    "the server cannot be reached", file=path, found=reason(error), hint="look whether the URL is right"
                ) from error
            what = "it is silent for too long" if isinstance(error, TimeoutError) else type(error).__name__
            raise TryAgainError(what) from error
        except ValueError as error:  # aiohttp has several kinds for headers and URLs that cannot be
            raise CheckpointError("the server cannot be asked", file=path, found=type(error).__name__) from error
        self._was_reached = True
        if answer.status in _MAY_PASS:
            raise TryAgainError(f"HTTP {answer.status} {answer.phrase}", _pause(answer))
        return answer

    async def _request(self, path: RemotePath, offset_bytes: int, size_bytes: int) -> _Answer:
        session = await self._fs.set_session()
        options = dict(self._fs.kwargs)
        headers = {
            **options.pop("headers", {}),
            "Range": f"bytes={offset_bytes}-{offset_bytes + size_bytes - 1}",
            "Accept-Encoding": "identity",
        }
        timeout = aiohttp.ClientTimeout(
            total=2 * _SILENCE_SECONDS + size_bytes / _LEAST_BYTES_PER_SECOND,
            sock_connect=_CONNECT_SECONDS,
            sock_read=_SILENCE_SECONDS,
        )
        url = path.url
        target = yarl.URL(url, encoded=url.isascii() and url.isprintable() and " " not in url)
        async with session.get(target, headers=headers, timeout=timeout, **options) as response:
            status, phrase = response.status, (response.reason or "")[:100]
            answer = _Answer(status, phrase, response.headers, b"")
            if status == 206 or (status == 200 and not answer.is_page):
                answer = answer._replace(content=await _content(path, response, answer, size_bytes))
            return answer


async def _content(path: RemotePath, response: aiohttp.ClientResponse, answer: _Answer, size_bytes: int) -> bytes:
    """The body of an answer, which is as long as it says, and never more than what was asked for."""
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _no_ranges(path, "a packed answer")
    if answer.status == 206:
        first, last, _ = _range_of(path, answer)
        length = last - first + 1
        if response.content_length not in (None, length):
            raise _no_ranges(path, f"{response.content_length:,} bytes for a range of {length:,}")
        if not 0 < length <= size_bytes:
            raise _no_ranges(path, f"{length:,} bytes, where {size_bytes:,} were asked for")
    elif response.content_length is None or response.content_length > size_bytes:
        raise _no_ranges(path, "the whole file (HTTP 200), where a part was asked for")
    else:  # all of a file that is no longer than what was asked for
        length = response.content_length
    content = bytearray()
    while piece := await response.content.read(_PIECE_BYTES):
        content += piece
        if len(content) > length:
            raise _no_ranges(path, f"more than the {length:,} bytes that it announced")
    if len(content) < length:
        raise TryAgainError(f"the answer ends after {len(content):,} of {length:,} bytes")
    return bytes(content)


def _range_of(path: RemotePath, answer: _Answer) -> tuple[int, int, int]:
    """The first and last byte of an answer, and how many the file has."""
    text = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    first, last, total = map(int, match.groups()) if match else (0, 0, 0)
    if match is None or not first <= last < total:
        raise _no_ranges(path, f"Content-Range: {text[:100]}" if text else "no Content-Range")
    return first, last, total


def _pause(answer: _Answer) -> float | None:
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() and len(text) < 5 else None


def _no_ranges(path: RemotePath, found: str) -> CheckpointError:
    return CheckpointError(
        "the server does not serve parts of this file",
        file=path,
        found=found,
        expected="exactly the bytes that are asked for (HTTP 206)",
        hint="download the file, and give the copy",
    )


def _refusal(path: RemotePath, answer: _Answer) -> CheckpointError:
    found = f"HTTP {answer.status} {answer.phrase}".strip()
    if answer.status in (401, 407):
        hint = "give a signed URL, or configure the credentials for fsspec's http file system"
        return CheckpointError("the server asks for credentials", file=path, found=found, hint=hint)
    return CheckpointError("the server refuses the request", file=path, found=found)


def _certificate(error: aiohttp.ClientSSLError) -> str:
    return "its certificate is not valid" if isinstance(error, aiohttp.ClientConnectorCertificateError) else "TLS fails"

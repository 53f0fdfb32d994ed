"""Which store answers for a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.checkpoint.paths import HTTP_SCHEMES
from cogtools.checkpoint.remote.store import Store, reason
from cogtools.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import RemotePath


def store_of(path: RemotePath) -> Store:
    """What answers for a path, made when it is first asked and kept with what it has found out.

    Raises:
        OptionError: if nothing installed does.
    """
    origin = path.origin
    if not isinstance(origin.store, Store):
        origin.store = _open_store(origin.scheme, f"{origin.scheme}://{origin.authority}")
    return origin.store


def _open_store(scheme: str, url: str) -> Store:
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
    hint = (
        "pip install aiohttp s3fs, or cogtools with its extra remote"
        if scheme in _IN_EXTRA
        else "install what is named above"
    )
    return OptionError(f"what reads {scheme}:// is not installed", found=reason(error), hint=hint)

"""An executor that runs exports on a Dask cluster: its scheduler and workers are there already.

Dask gives a job whose worker is lost to another one. After so many lost workers (its setting
`distributed.scheduler.allowed-failures`, 3 by default) the job fails, and so do those that the same workers had been
given beside it. Nothing of that is done here; `batch` tries each of these alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from cogtools.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor

_CONNECT_SECONDS = "15s"


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """The executor of the cluster whose scheduler has this address, for the time of a `with` statement.

    Args:
        address: such as tcp://127.0.0.1:8786.

    Raises:
        OptionError: if distributed is not installed, or no scheduler answers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise OptionError(
            "--dask needs distributed, which is not installed",
            hint="pip install distributed, or cogtools with its extra cluster",
        ) from error
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(
            "no Dask scheduler answers at this address",
            found=address,
            expected="the address that `dask scheduler` prints, such as tcp://127.0.0.1:8786",
            hint="start one with `dask scheduler`, and workers with `dask worker ADDRESS`",
        ) from error
    with client:
        # Not pure: equal jobs of two runs are not the same result.
        yield client.get_executor(pure=False)

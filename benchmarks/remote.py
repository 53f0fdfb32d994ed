"""Measure what travels: inspect and export-lora of a full-size checkpoint by URL, and a batch on a Dask cluster.

    python -m benchmarks.remote FOLDER

The server is on this machine, so that its times show what cogtools adds, and not what a network takes. How many jobs a
cluster of N workers does is bound by min(N / seconds of a job, the store's bytes a second / bytes of a job, the
scheduler's tasks a second).
"""

from __future__ import annotations

import argparse
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.conversion.options import ExportOptions
from cogtools.export.batch import export_many, plan_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Executor

CURL = shutil.which("curl") or "curl"
COGTOOLS = str(Path(sys.executable).parent / "cogtools")
WEIGHTS = "mp_rank_00_model_states.pt"
JOBS = 24


class Counting(http.server.BaseHTTPRequestHandler):
    """Serves ranges of a folder, and counts them."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    requests = 0
    sent_bytes = 0
    ranges: list[tuple[int, int]] = []  # noqa: RUF012 - one for all
    lock = threading.Lock()

    def do_GET(self) -> None:
        """Answer with a range, or all."""
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self._count(0)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)
        self._count(end - start, (start, end) if path.name == WEIGHTS else None)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with path.open("rb") as file:
            while start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

    def _count(self, size_bytes: int, range_: tuple[int, int] | None = None) -> None:
        with self.lock:
            type(self).requests += 1
            type(self).sent_bytes += size_bytes
            if range_ is not None:
                self.ranges.append(range_)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder; its URL."""
    Counting.folder = folder
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def row(label: str, action: Callable[[], object]) -> float:
    """Measure one thing once, and print it."""
    Counting.requests, Counting.sent_bytes = 0, 0
    Counting.ranges.clear()
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    print(f"{label:<52} {seconds:7.2f} s {Counting.sent_bytes / 1e6:10.2f} MB {Counting.requests:5} requests")
    return seconds


def command(*words: str) -> Callable[[], object]:
    """Run a command, its output thrown away."""
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def travel(folder: Path) -> None:
    """What inspect and export-lora of a 2B checkpoint take over HTTP."""
    path = folder / "served" / "run" / "1000" / WEIGHTS
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [str(path), "--model", "2b", "--rank", "128"]
        subprocess.run([sys.executable, "-m", "benchmarks.full_size", *words], check=True)
        path.parent.with_name("latest").write_text("1000")
    out = folder / "out"
    print(f"2B, full size: {path.stat().st_size / 1e9:.2f} GB")
    with served(folder / "served") as url:
        file = f"{url}/run/1000/{WEIGHTS}"
        row("inspect the file", command(COGTOOLS, "inspect", file))
        row("inspect the save folder", command(COGTOOLS, "inspect", f"{url}/run"))
        shutil.rmtree(out, ignore_errors=True)
        row("export-lora", command(COGTOOLS, "export-lora", file, str(out), "--alpha", "1"))
        ranges = list(Counting.ranges)
        row("curl: the same ranges, one after the other", lambda: [
            subprocess.run([CURL, "-s", "-o", os.devnull, "-r", f"{start}-{end - 1}", file], check=True)
            for start, end in ranges
        ])  # fmt: skip
        row("curl: the whole file", command(CURL, "-s", "-o", os.devnull, file))
    shutil.rmtree(out, ignore_errors=True)
    row("export-lora of the local file", command(COGTOOLS, "export-lora", str(path), str(out), "--alpha", "1"))


def batch(folder: Path) -> None:
    """Jobs a minute on this machine: the local pool, and a cluster of one and of two workers."""
    from cogtools.export.cluster import dask_executor
    from tests.support.servers import dask_cluster

    source = folder / "served" / "run"
    runs = []
    for number in range(JOBS):
        run = folder / "runs" / f"run-{number:02}"
        if not run.exists():
            run.parent.mkdir(exist_ok=True)
            run.symlink_to(source)
        runs.append(str(run / "1000"))
    options = ExportOptions(alpha=1.0)

    def export(executor: Executor | None = None) -> float:
        shutil.rmtree(folder / "loras", ignore_errors=True)
        jobs = plan_batch(runs, folder / "loras", options)
        start = time.perf_counter()
        items = list(export_many(jobs, options, executor))
        if any(item.status != "done" for item in items):
            raise SystemExit(f"not all were done: {next(item.error for item in items if item.error)}")
        return time.perf_counter() - start

    with ThreadPoolExecutor(1) as one:
        export(one)
        alone = export(one)
    print(f"{JOBS} exports of 118 MB each")
    print(f"{'in this process':<52} {alone:7.2f} s {JOBS * 60 / alone:8.0f} jobs a minute")
    pool = export()
    print(f"{'the local pool':<52} {pool:7.2f} s {JOBS * 60 / pool:8.0f} jobs a minute")
    for workers in (1, 2):
        with (
            dask_cluster(folder / f"cluster-{workers}", workers=workers) as cluster,
            dask_executor(cluster.address) as executor,
        ):
            export(executor)
            seconds = export(executor)
            overhead = (seconds * workers - alone) / JOBS
            text = f"Dask, {workers} worker{'s' if workers > 1 else ''}"
            print(
                f"{text:<52} {seconds:7.2f} s {JOBS * 60 / seconds:8.0f} jobs a minute, {1000 * overhead:.0f} ms a job "
                "more than in this process"
            )
            start = time.perf_counter()
            futures = [executor.submit(abs, number) for number in range(1000)]
            for future in futures:
                future.result()
            print(f"{'  empty tasks':<52} {1000 / (time.perf_counter() - start):7.0f} a second")


def main(arguments: Sequence[str]) -> None:
    """Make the checkpoint, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    travel(folder)
    batch(folder)


if __name__ == "__main__":
    main(sys.argv[1:])

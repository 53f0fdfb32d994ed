"""A server on 127.0.0.1 that serves a folder over HTTP, well or badly."""

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[["Request"], None]


@dataclass
class Request:
    """A request for a range of a file that is there, and means to answer it rightly or wrongly."""

    handler: Handler
    path: Path
    start: int
    end: int
    number: int

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def content(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.end - 1}/{self.size}"

    @property
    def version(self) -> str:
        status = self.path.stat()
        return f'"{status.st_size}-{status.st_mtime_ns}"'

    def answer(self, status: int, body: bytes, **headers: str | None) -> None:
        """Answer with these headers, `_` for `-`; None leaves one out that stands in every right answer."""
        usual = {"Content-Length": str(len(body)), "ETag": self.version}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.handler.send_response(status)
        for name, value in (usual | given).items():
            if value is not None:
                self.handler.send_header(name, value)
        self.handler.end_headers()
        self.handler.wfile.write(body)


def good(request: Request) -> None:
    """What a server answers that knows ranges."""
    request.answer(206, request.content, Content_Range=request.content_range)


@dataclass
class HttpServer:
    """A server, and what it was asked for.

    Attributes:
        url: where it is.
        asked: the path, the first byte and the status of every request.
        sent_bytes: what was sent of files.
    """

    url: str = ""
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    sent_bytes: int = 0

    def missing(self) -> list[str]:
        """What was asked for and was not there."""
        return [path for path, _, status in self.asked if status == 404]


@contextmanager
def http_server(folder: Path, answer: Answer = good) -> Iterator[HttpServer]:
    """Serve a folder while the block runs.

    Args:
        folder: what is served; folders are answered with 404, as nothing is listed.
        answer: answers a request for a file that is there.
    """
    served = HttpServer()
    lock = threading.Lock()

    class Handling(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = folder / unquote(urlsplit(self.path).path).lstrip("/")
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert match is not None
            start = int(match[1])
            with lock:
                number = len(served.asked)
                served.asked.append((self.path, start, 206 if path.is_file() else 404))
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            end = min(int(match[2]) + 1, path.stat().st_size)
            with lock:
                served.sent_bytes += end - start
            try:
                answer(Request(self, path, start, end, number))
            except ConnectionError:  # whoever asked has heard enough
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handling)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

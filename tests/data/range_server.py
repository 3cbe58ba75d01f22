"""A real HTTP server on this machine that answers range requests, and can be told to misbehave."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        requests: (path, first byte, last byte + 1) of every GET; None for a whole file.
        ranges: False ignores Range headers, as plain servers do.
        failures: So many of the next requests are answered with 503.
        damage: Shard bytes are changed on the way while this is above 0.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, int | None, int | None]] = []
        self.ranges, self.failures, self.damage = True, 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Say nothing of clients that go away."""


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if self.server.failures > 0:
            self.server.failures -= 1
            self._head(503, 0)
            return
        if not path.is_file():
            self._head(404, 0)
            return
        data = path.read_bytes()
        wanted = self.headers.get("Range") if self.server.ranges else None
        first, stop = None, None
        if wanted:
            low, high = wanted.removeprefix("bytes=").split("-")
            first, stop = int(low), min(int(high) + 1 if high else len(data), len(data))
        self.server.requests.append((self.path, first, stop))
        body = data[first:stop]
        if self.server.damage > 0 and "/shards/" in self.path:
            self.server.damage -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        self._head(206 if wanted else 200, len(body), f"bytes {first}-{(stop or 1) - 1}/{len(data)}" if wanted else "")
        if send:
            self.wfile.write(body)

    def _head(self, status: int, length: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder for as long as the block lasts."""
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

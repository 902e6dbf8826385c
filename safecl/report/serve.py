"""A server of a report's folder on the loopback address, for browsers that read files only from a server."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of one folder. Requests with another host name are refused, so that no web page can read the files."""

    def is_own(self) -> bool:
        """Whether the request names this server. If not, it is answered with error 403."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}"):
            return True
        self.send_error(403, "this server answers to its own address alone")
        return False

    def do_GET(self) -> None:
        if self.is_own():
            super().do_GET()

    def do_HEAD(self) -> None:
        if self.is_own():
            super().do_HEAD()

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def server(folder: Path, port: int = 0, handler: type[Handler] = Handler) -> ThreadingHTTPServer:
    """A server of a folder on the loopback address. Port 0 takes a free port. Call `serve_forever` on it."""
    return ThreadingHTTPServer((HOST, port), partial(handler, directory=str(folder)))


def address(found: ThreadingHTTPServer) -> str:
    return f"http://{HOST}:{found.server_address[1]}/"

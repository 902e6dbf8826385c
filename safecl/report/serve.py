"""A report's folder on this machine's own address, for browsers that read files from a server only."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder. Requests that name another host are refused, so that no page of the web can read them."""

    def is_own(self) -> bool:
        """Whether the request names this server; answers it otherwise."""
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
    """A server of a folder on the loopback address; port 0 takes a free one. Run `serve_forever` on it."""
    return ThreadingHTTPServer((HOST, port), partial(handler, directory=str(folder)))


def address(found: ThreadingHTTPServer) -> str:
    return f"http://{HOST}:{found.server_address[1]}/"

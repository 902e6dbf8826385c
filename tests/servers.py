"""Servers on loopback that tests talk to: an S3 (moto), and PostgreSQL where Debian's is installed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class S3:
    """A server that holds all it is given in memory. `environment`: what makes a driver of s3:// talk to it."""

    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    bucket: str = "bucket"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/safecl"

    def stop(self) -> None:
        """It answers nobody, until `go_on`."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def s3() -> Iterator[S3]:
    """An S3 with an empty bucket; this process's environment is such that it is reached."""
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, **quiet) as process:  # type: ignore[call-overload]
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            served = S3(process, environment)
            _wait(lambda: _put(f"{endpoint}/{served.bucket}"))
            yield served
        finally:
            process.kill()


@contextmanager
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL of its own with three empty databases, `/studies`, `/tracking` and `/server`; skips the test where
    none is installed, and fails it in CI."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is not installed: apt-get install postgresql")
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    port, data = _free_port(), Path(tempfile.mkdtemp(prefix="postgres"))
    as_user: list[str] = []
    if os.getuid() == 0:  # it refuses root
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(data, "postgres", "postgres")
    initdb = [*as_user, str(programs[-1] / "initdb"), "-D", str(data), "-U", "test", "-A", "trust", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True)
    settings = ["listen_addresses=127.0.0.1", f"port={port}", f"unix_socket_directories={data}", "fsync=off"]
    command = [*as_user, str(programs[-1] / "postgres"), "-D", str(data), *(x for s in settings for x in ("-c", s))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"postgresql://test@127.0.0.1:{port}"
            _wait(lambda: _make_databases(f"{url}/postgres"))
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # "fast": it ends its sessions
            process.wait()
            shutil.rmtree(data)


@contextmanager
def mlflow(backend: str, folder: Path) -> Iterator[str]:
    """Address of a tracking server with its tables at `backend`, which takes artifacts in its clients' stead."""
    from safecl.tracking import ui

    port = ui.free_port()
    where = ["--backend-store-uri", backend, "--artifacts-destination", str(folder), "--host", ui.HOST]
    command = [sys.executable, "-m", "mlflow", "server", *where, "--port", str(port), "--workers", "1"]
    with ui.server(command, port, folder / "log.txt") as address:
        yield address


def _make_databases(url: str) -> None:
    import psycopg

    try:
        with psycopg.connect(url, autocommit=True) as connection:
            for name in ("studies", "tracking", "server"):
                connection.execute(f"CREATE DATABASE {name}")
    except psycopg.OperationalError as error:  # it is starting
        raise OSError(str(error)) from None


def _put(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5).close()


def _wait(ready: object) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            ready()  # type: ignore[operator]
            return
        except OSError:
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])

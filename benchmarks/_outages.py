"""What chaos.py does to a sweep beside killing its processes: a disk that is full, a server that does not answer."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

FILLER = "filler"


@contextmanager
def small_disk(image: Path, at: Path, gib: float) -> Iterator[bool]:
    """A file system of that size in a file, mounted at `at`, where this process may; else a plain folder, and False."""
    at.mkdir(parents=True, exist_ok=True)
    made: Any = image.exists()
    if not made:
        with image.open("wb") as file:
            file.truncate(int(gib * 2**30))
        made = shutil.which("mkfs.ext4") and subprocess.run(["mkfs.ext4", "-q", "-F", str(image)]).returncode == 0
    mounted = (
        bool(made) and subprocess.run(["mount", "-o", "loop", str(image), str(at)], capture_output=True).returncode == 0
    )
    filler = at / FILLER
    filler.unlink(missing_ok=True)  # of a program that was ended meanwhile
    try:
        yield mounted
    finally:
        filler.unlink(missing_ok=True)
        if mounted:
            subprocess.run(["umount", "-l", str(at)])


def is_full(at: Path) -> bool:
    return (at / FILLER).exists()


def fill(at: Path, seconds: float) -> Any:
    """A fault: the disk of `at` is full for so long."""

    def fault(log: Any) -> None:
        filler = at / FILLER
        with suppress(OSError), filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(at).free - 2**16)
        with suppress(OSError), filler.open("ab") as file:
            while True:
                file.write(b"0" * 4096)
                file.flush()
        log({"what": "disk full", "seconds": seconds, "free": shutil.disk_usage(at).free})
        threading.Timer(seconds, lambda: filler.unlink(missing_ok=True)).start()

    return fault


def silence(process: subprocess.Popen[bytes], seconds: float, what: str) -> Any:
    """A fault: a server and its children stop for so long."""

    def fault(log: Any) -> None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            one.suspend()
        log({"what": what, "seconds": seconds})

        def wake() -> None:
            for one in family:
                with suppress(psutil.Error):
                    one.resume()

        threading.Timer(seconds, wake).start()

    return fault


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    where = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'tracker.db'}",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        *where,
    ]
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.txt").open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=quiet, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()

"""MLflow's own web pages on the loopback address, and Optuna's if optuna-dashboard is installed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from safecl.base import ConfigError, PrerequisiteError, sqlite_path
from safecl.tracking.messages import EXPERIMENT, VIEW

HOST = "127.0.0.1"
STUDIES = "SAFECL_STUDIES"  # environment variable of the dashboard's process: the URI of the studies, as below
WAIT_S = 120.0  # seconds; MLflow takes ten seconds to start, or minutes on a busy machine


@contextmanager
def opened(uri: str, logs: Path, port: int = 0) -> Iterator[str]:
    """The address of MLflow's table of runs, with the columns of the newest sweep.

    If `uri` is a running server, its address is used. Else a server is started for the length of the block, with its output
    under `logs`.

    Raises:
        ConfigError: nothing was tracked there yet.
        PrerequisiteError: the server ended, or did not answer in time.
    """
    if uri.startswith("http"):
        yield _runs(uri.rstrip("/"))
        return
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        raise ConfigError(
            f"{str(database)!r} is not there: nothing was tracked yet; run a sweep, or name its store by --root"
        )
    if database is None and not _has_tables(uri):
        raise ConfigError("the database of execution.tracking_uri is empty: nothing was tracked yet; run a sweep")
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    # Not as an argument: every user of this machine can read arguments, and the URI may hold a password.
    with server(command, port, logs / "mlflow-ui.txt", {"MLFLOW_BACKEND_STORE_URI": uri}) as address:
        yield _runs(address)


@contextmanager
def dashboard(url: str, logs: Path) -> Iterator[str | None]:
    """The address of Optuna's dashboard for the studies at this URL. None if there are no studies or it is not installed."""
    database = sqlite_path(url)
    if find_spec("optuna_dashboard") is None or (database is not None and not database.exists()):
        yield None
        return
    port = free_port()
    program = (
        f"import os; from optuna_dashboard import run_server; run_server(os.environ[{STUDIES!r}], {HOST!r}, {port})"
    )
    with server([sys.executable, "-c", program], port, logs / "optuna-dashboard.txt", {STUDIES: url}) as address:
        yield address


@contextmanager
def server(command: list[str], port: int, log: Path, told: Mapping[str, str] = {}) -> Iterator[str]:
    """Start a server and yield its address once it answers. The server and its child processes end with the block. `told`:
    its additional environment variables."""
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **quiet, **told}, cwd=log.parent, start_new_session=True
        )
    address = f"http://{HOST}:{port}"
    try:
        deadline = time.monotonic() + WAIT_S
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                how = "did not answer" if process.poll() is None else f"ended with {process.returncode}"
                raise PrerequisiteError(f"{log.stem} {how}; what it printed: {log}")
            time.sleep(0.2)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _has_tables(uri: str) -> bool:
    """Whether MLflow has written to a database. (A server that is started on an empty database would create its tables.)"""
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.exc import SQLAlchemyError

    try:
        engine = create_engine(uri)
        found = bool(inspect(engine).has_table("experiments"))
    except (SQLAlchemyError, ImportError) as error:
        told = (str(error).strip().splitlines() or [""])[0]
        raise PrerequisiteError(f"the database of execution.tracking_uri cannot be read: {told}") from None
    engine.dispose()
    return found


def _answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{address}/", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _runs(address: str) -> str:
    """The address of the experiment's table of runs. MLflow's main address if there is no experiment."""
    asked = urllib.parse.quote(EXPERIMENT)
    with suppress(OSError, ValueError, KeyError):
        url = f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={asked}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            found = json.load(answer)["experiment"]
        has_view = any(tag["key"] == f"mlflow.sharedViewState.{VIEW}" for tag in found.get("tags", ()))
        query = "?workflowType=machine_learning" + (f"&viewStateShareKey={VIEW}" if has_view else "")
        return f"{address}/#/experiments/{found['experiment_id']}/runs{query}"
    return f"{address}/"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

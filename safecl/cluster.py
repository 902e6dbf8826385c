"""Start and leave Ray: a local cluster of our own, or a running cluster that is joined."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safecl import nodes, reclaim
from safecl.base import PrerequisiteError
from safecl.capacity import lacking
from safecl.config import Execution
from safecl.lease import me

AGENTS = (["ray::DashboardAgent"], ["ray::RuntimeEnvAgent"])
OWNER = "SAFECL_CLUSTER_OF"  # environment variable of all processes of a local cluster: its owner, as lease.me names it


def start(execution: Execution, logs: Path, need: int | None = None) -> None:
    """Connect to Ray: start a local cluster of our own, or join the one at `execution.address`.

    The caller must call `stop` (or `ray.shutdown`) afterwards, also when this raises.

    Args:
        logs: folder for `ray.log`.
        need: how many of the scarce resource (capacity.unit: GPUs, CPUs, ...) are held at once. None: enough for one
            trainer or one engine, since these take turns.

    Raises:
        PrerequisiteError: Ray does not start, or the cluster lacks units and autoscaling can never bring them. Nothing is
            held then.
    """
    # Ray and its workers read these at their start. One OpenMP thread, because processes share cores: with two
    # threads each they slow each other down 20 times.
    quiet = {
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # with Ray's default of 15 a sweep gets almost no CPU time beside other programs
        "TOKENIZERS_PARALLELISM": "false",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's handler would end the search as if it were done; ours stops the sweep
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # the default, ten times a second, is for replicas that scale with traffic
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
        "DS_ACCELERATOR": "cuda" if execution.use_gpu else "cpu",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    logs.mkdir(parents=True, exist_ok=True)
    import logging

    logging.getLogger("ray").setLevel(logging.ERROR)
    _keep_messages(logs / "ray.log")
    before = signal.getsignal(signal.SIGTERM)
    if execution.address == "local":
        _start_local({"trial_slot": float(execution.num_trials_at_once)})
    else:
        nodes.join(execution.address, quiet, logs / "ray.log")
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own handler prints a stack and aborts
    if missing := lacking(execution, need):
        raise PrerequisiteError(missing)


def _start_local(resources: dict[str, float]) -> None:
    """Start a cluster on this machine, in up to three tries. A very busy machine may need more than one, because Ray's
    processes do not wait long for each other."""
    import psutil
    import ray

    before = set(psutil.Process().children(recursive=True))
    for tries_left in range(2, -1, -1):
        os.environ[OWNER] = me()
        try:
            ray.init(
                address="local",
                num_cpus=os.cpu_count(),
                resources=resources,
                include_dashboard=False,  # saves eleven processes; we do not use its pages
                log_to_driver=False,
                logging_level="ERROR",
            )
            return
        except Exception as error:
            _kill([child for child in psutil.Process().children(recursive=True) if child not in before])
            if not tries_left:
                raise PrerequisiteError(
                    f"Ray did not start on this machine, three times: {error} Its own logs are under "
                    "/tmp/ray/session_latest/logs"
                ) from None
        finally:
            del os.environ[OWNER]  # processes that we start later do not belong to the cluster


def _keep_messages(path: Path) -> None:
    """Write the warnings of Ray's daemons into a file, also those of before this process joined. Ray prints them into the
    driver's output at any log level, in front of a table in JSON. It has no setting for that, so the function that prints them
    is replaced."""
    from ray._private import worker

    def write(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in data["lines"])

    worker.print_to_stdstream = write


def stop(execution: Execution, owner: str) -> None:
    """Leave Ray. A local cluster ends, with its engines. On a joined cluster only the engines of `owner` are shut down first."""
    import ray

    if execution.address != "local" and ray.is_initialized():
        clear(owner)
    # The search leaves garbage that refers to Ray's objects. If another thread frees one while Ray ends, Ray ends the
    # whole process with code 1.
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def local_processes() -> dict[int, Any]:
    """Return the processes without which our local cluster cannot work (gcs_server, raylet), by their process ids.

    They are found as soon as Ray has started them.
    """
    import psutil

    found = {}
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() in ("gcs_server", "raylet"):
                found[child.pid] = child
    return found


def raylet() -> Any:
    """Return the process of the node that this process has joined; None before it has joined one, or if it is not seen."""
    import psutil
    import ray

    if not ray.is_initialized():
        return None
    with suppress(Exception):
        socket = ray._private.worker.global_worker.node.raylet_socket_name
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() == "raylet" and any(word.endswith(socket) for word in process.cmdline()):
                    return process
    return None


def is_alive(process: Any) -> bool:
    """Return whether a process runs. A zombie (dead, but not yet reaped by its parent) does not count as running."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_local(owner: str) -> None:
    """Kill the processes that are left of the local cluster of `owner` (this driver, or one that is gone).

    Left alone, Ray's agents wait a minute for a head's server that died, and workers without a raylet finish their task.
    """
    import psutil

    for _ in range(5):  # a raylet may start one more while we look
        left = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it is gone, or another user's
                if process.pid != os.getpid() and (process.environ().get(OWNER) == owner or _is_orphan(process)):
                    left.append(process)
        if not left:
            return
        _kill(left)


def _is_orphan(process: Any) -> bool:
    """Whether it is an agent whose raylet is gone, of any owner. An agent's title overwrites its environment, so that its
    owner cannot be read."""
    import psutil

    return process.cmdline()[:1] in AGENTS and psutil.Process(process.ppid()).name() != "raylet"


def _kill(processes: Sequence[Any]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def clear(owner: str) -> None:
    """Free the trainers and engines that a dead Broker left. Only that Broker knew which work they had."""
    from safecl.serving.deploy import shutdown_all

    with suppress(Exception):
        reclaim.free()
    with suppress(Exception):  # Serve may be gone as well; deploying an engine of the same name replaces the old one
        shutdown_all(owner)

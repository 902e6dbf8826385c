"""Engines as Ray Serve applications: deploy them, wait until they are ready, read their state, and shut them down.

Candidates and judges are served by the same deployment class (engine.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from safecl.base import PrerequisiteError
from safecl.identity import Ref
from safecl.serving.engine import Engine
from safecl.serving.messages import Settings
from safecl.store import Store

# Lock for building or reading a Serve config. That registers a module with the pickler and unregisters it again, so two
# threads would undo each other's registration and raise. Serve must also not be started twice at the same time.
_SERVE = threading.Lock()


def deploy(
    settings: Settings,
    base: Ref | str,
    store: Store | None = None,
    *,
    num_replicas: int = 1,
    resources: Mapping[str, float] | None = None,
    wait: bool = True,
) -> None:
    """Serve a model as application `settings.name` on the Ray cluster that this process is connected to.

    `base` is the model: a stage of the store, or a folder that exists on every node. `resources` is what a replica reserves,
    by Ray's names (default: `settings.num_threads` CPUs, and its GPUs). With `wait=False` the call returns at once, so that
    the start overlaps with other work; see `ready`. No HTTP port is opened: engines are reached through Serve handles.
    """
    from ray import serve
    from ray.serve.api import RunTarget
    from ray.serve.schema import LoggingConfig

    reserves = dict(resources or {"CPU": settings.num_threads, "GPU": settings.num_gpus if settings.use_gpu else 0})
    options: dict[str, Any] = {
        "num_cpus": float(reserves.pop("CPU", 0.0)),
        "num_gpus": float(reserves.pop("GPU", 0.0)),
        "resources": reserves,
        "runtime_env": {"env_vars": environment(settings, store is not None)},
    }
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    hush()
    with _SERVE:
        serve.start(proxy_location="Disabled", logging_config=quiet)
        deployment = serve.deployment(
            Engine,
            name="engine",
            num_replicas=num_replicas,
            max_ongoing_requests=4096,  # the engine's own queue does the batching
            ray_actor_options=options,
            health_check_period_s=1.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_timeout_s=3.0,  # do not wait for a replaced replica: its work is lost
            graceful_shutdown_wait_loop_s=0.2,
            logging_config=quiet,
        )
        target = RunTarget(
            deployment.bind(base, settings, store), name=settings.name, route_prefix=None, logging_config=quiet
        )
        serve.run_many([target], wait_for_applications_running=wait, wait_for_ingress_deployment_creation=wait)


def ready(name: str, timeout_s: float = 600.0) -> None:
    """Block until every replica of `name` is running. Raises PrerequisiteError if it cannot start or the timeout passes."""
    deadline = time.monotonic() + timeout_s
    while (now := state(name))[0] != "RUNNING":
        if time.monotonic() > deadline:
            raise PrerequisiteError(f"engine {name!r} was not ready within {timeout_s:.0f} s; state: {now}")
        time.sleep(0.5)


def shutdown(name: str) -> None:
    """Shut application `name` down and free its resources."""
    from ray import serve

    serve.delete(name)


def shutdown_all(owner: str) -> None:
    """Shut down the applications whose names end with `-` and `owner`. Other applications and Serve itself keep running."""
    from ray import serve

    hush()
    for name in serve.status().applications:
        if name.endswith(f"-{owner}"):
            serve.delete(name)


def state(name: str) -> tuple[str, str]:
    """(status, message) of an application. Raises PrerequisiteError if it is not deployed or failed to start."""
    from ray import serve

    with _SERVE:
        application = serve.status().applications.get(name)
    if application is None:
        raise PrerequisiteError(f"engine {name!r} is not deployed on this cluster; deploy it before asking for answers")
    if application.status == "DEPLOY_FAILED":
        raise PrerequisiteError(f"engine {name!r} failed to start: {_message(application)}")
    return str(application.status.value), _message(application)


def _message(application: Any) -> str:
    texts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return " ".join(text for text in texts if text)[-2000:]


def environment(settings: Settings, logs: bool = False) -> dict[str, str]:
    """Environment variables of the replica. Its engine processes inherit them. `logs`: whether the output is kept."""
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # engine and worker talk on this node only
        "VLLM_LOGGING_LEVEL": "INFO" if settings.log_dir or logs else "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.use_gpu and settings.batch_invariant:
        env["VLLM_BATCH_INVARIANT"] = "1"
    if not settings.use_gpu:
        env |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on CPU the engine computes in its own process ("uni")
            "OMP_NUM_THREADS": str(settings.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads of two engines would fight over one core
            "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep: training shares these cores
            "GOMP_SPINCOUNT": "0",
            "KMP_BLOCKTIME": "0",
            "TORCHDYNAMO_DISABLE": "1",  # else vLLM runs a C++ compiler for 20 s for two helpers of the sampler
            # Keep the memory of freed tensors up to 512 MiB for reuse: new pages take a third of the time of a 7B swap.
            "MALLOC_MMAP_THRESHOLD_": str(2**29),
            "MALLOC_TRIM_THRESHOLD_": str(2**29),
        }
    return env


def hush() -> None:
    """Let Serve log only errors to this process's terminal. Everything that matters is raised as an exception."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)

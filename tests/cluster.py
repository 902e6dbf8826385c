"""Ray clusters of several emulated nodes on this machine: a raylet each, with folders and an environment of its own.

    with nodes(tmp_path, {"num_cpus": 1}, {"num_cpus": 1, "num_gpus": 2}) as cluster:
        execution = Execution(address=cluster.address, root=...)
        one = cluster.add(num_cpus=1); cluster.kill(one)

A process of a node that opens a file below another node's folder, or below one of `hidden` (what lies on the driver's
machine alone), gets PermissionError, and the attempt is kept: `cluster.strays` must be empty. So a path that was passed
from one node to another is found even where all of them are one machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Imported by every Python process of a node as it starts, by its name, from PYTHONPATH.
_GUARD = textwrap.dedent("""
    import os, sys

    def guard():
        own, others, strays = (os.environ[f"TEST_NODE_{name}"] for name in ("OWN", "OTHERS", "STRAYS"))
        others = tuple(others.split(os.pathsep))

        def watch(event, args):
            if event == "open" and isinstance(args[0], (str, bytes)):
                path = os.path.abspath(os.fsdecode(args[0]))
                if path.startswith(others) and not path.startswith(own):
                    stray = os.open(strays, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.write(stray, f"{own} opens {path}\\n".encode())
                    os.close(stray)
                    raise PermissionError(f"{path} is another node's")

        sys.addaudithook(watch)

    if "TEST_NODE_OWN" in os.environ:
        guard()
    if os.environ.get("TEST_NODE_NAME"):  # a driver: of the nodes, which all are this machine, it joins this one
        import ray._private.services as services

        def there(client, choose=services.get_node_to_connect_for_driver, **wanted):
            return choose(client, **{**wanted, "node_name": os.environ["TEST_NODE_NAME"]})

        services.get_node_to_connect_for_driver = there
""")
QUIET = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore",
         "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}  # fmt: skip


@dataclass
class Nodes:
    """A cluster that runs. `made`: Ray's nodes by the folder that each may use, the head first."""

    folder: Path
    ray: Any
    environment: dict[str, str]
    hidden: tuple[Path, ...]
    sockets: str
    driver: int = -1  # none has what is hidden
    made: dict[Path, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """What `execution.address` is to join it."""
        return str(self.ray.address)

    @property
    def strays(self) -> list[str]:
        """Files that a process of one node opened in another's folder, or in a hidden one."""
        file = self.folder / "strays"
        return file.read_text().splitlines() if file.exists() else []

    def add(self, **resources: Any) -> Path:
        """Start a node with these resources (`num_cpus`, `num_gpus`, `resources`, ...); its folder."""
        own = self.folder / "nodes" / f"{len(self.made)}"
        own.mkdir(parents=True)
        number = len(self.made)
        environment = {**QUIET, **self.environment, **self._guarded(own, number)}
        options = {"num_cpus": 1, "object_store_memory": 78 * 2**20, "include_dashboard": False, **resources}
        options["node_name"] = f"{number}"
        # Ports are given here, since on a busy machine a raylet does not wait long enough for its agents to choose their
        # own; and there a node may be given up that only starts slowly.
        ports = dict(
            zip(
                ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port"),
                _free_ports(3),
                strict=True,
            )
        )
        for tries_left in (2, 1, 0):
            try:
                self.made[own] = self.ray.add_node(env_vars=environment, temp_dir=self.sockets, **ports, **options)
                break
            except Exception as error:
                if not tries_left or "timed out during startup" not in str(error):
                    raise
        return own

    def _guarded(self, own: Path, number: int) -> dict[str, str]:
        """Environment of the processes of a node."""
        hidden = self.hidden if number != self.driver else ()
        others = [f"{self.folder / 'nodes'}{os.sep}", *(f"{path}{os.sep}" for path in hidden)]
        return {
            "SAFECL_CACHE": str(own),
            "PYTHONPATH": os.pathsep.join([str(self.folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
            "TEST_NODE_OWN": f"{own}{os.sep}",
            "TEST_NODE_OTHERS": os.pathsep.join(others),
            "TEST_NODE_STRAYS": str(self.folder / "strays"),
            "TEST_NODE_NAME": "",
        }

    def of_driver(self) -> dict[str, str]:
        """Environment of a command that is typed on the driver's node: it joins that one, and is watched like the rest."""
        own = list(self.made)[self.driver]
        return {**self._guarded(own, self.driver), "TEST_NODE_NAME": f"{self.driver}"}

    def drop(self, node: Path) -> None:
        """Take a node away as one is that its owner stops."""
        self.ray.remove_node(self.made[node])

    def kill(self, node: Path) -> None:
        """Kill -9 a node's raylet, and with it what runs there."""
        for info in self.made[node].all_processes["raylet"]:
            os.kill(info.process.pid, signal.SIGKILL)
        self.ray.remove_node(self.made[node], allow_graceful=False)

    def node_id(self, node: Path) -> str:
        """Ray's name of a node."""
        return str(self.made[node].node_id)


@contextmanager
def nodes(
    folder: Path,
    *resources: dict[str, Any],
    environment: dict[str, str] | None = None,
    hidden: tuple[Path, ...] = (),
    driver: int | None = None,
) -> Iterator[Nodes]:
    """A cluster with a node for each of `resources`, the first its head. This process is a driver on the head's machine: it
    shares its cache. It joins as a sweep does, by `address`; whoever joined leaves before this ends. `driver`: the node
    whose machine has what is `hidden`, and where commands run that this process starts."""
    import pytest
    import ray
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_GUARD)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        # Paths of sockets may be 107 characters long.
        sockets = tempfile.mkdtemp(prefix="r", dir=os.environ.get("RAY_TMPDIR"))
        Path(get_ray_address_file(None)).parent.mkdir(exist_ok=True)  # Ray makes none beside the one named
        cluster = Nodes(folder, Cluster(), environment or {}, hidden, sockets, -1 if driver is None else driver)
        try:
            for each in resources:
                head = cluster.add(**each)
                patch.setenv("SAFECL_CACHE", str(next(iter(cluster.made), head)))
            for name, value in (cluster.of_driver() if driver is not None else {}).items():
                patch.setenv(name, value)
            yield cluster
        finally:
            ray.shutdown()
            cluster.ray.shutdown()
            shutil.rmtree(sockets, ignore_errors=True)


def _free_ports(num: int) -> list[int]:
    with ExitStack() as held:
        opened = [held.enter_context(socket.socket()) for _ in range(num)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]

"""What tests/cluster.py promises: nodes with folders of their own, that see no other's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from safecl import cluster
from safecl.cluster import raylet
from safecl.config import Execution
from tests.cluster import nodes


def _look(path: str) -> tuple[str, str]:
    try:
        return os.environ["SAFECL_CACHE"], Path(path).read_text()
    except PermissionError as error:
        return os.environ["SAFECL_CACHE"], str(error)


@pytest.mark.slow
def test_each_node_has_its_own_folder_and_sees_no_other(tmp_path: Path) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("rows")
    with nodes(tmp_path / "cluster", {}, {"num_gpus": 1}, hidden=(tmp_path / "data",)) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        head, other = cluster.made
        mine = raylet()
        assert mine is not None and mine.pid == cluster.made[head].all_processes["raylet"][0].process.pid
        (other / "file").write_text("its own")
        look: Any = ray.remote(num_cpus=0)(_look)

        def on(node: Path, path: Path) -> Any:
            there = NodeAffinitySchedulingStrategy(cluster.node_id(node), soft=False)
            return ray.get(look.options(scheduling_strategy=there).remote(str(path)))

        assert on(other, other / "file") == (str(other), "its own")
        assert not cluster.strays
        assert on(head, other / "file") == (str(head), f"{other / 'file'} is another node's")
        assert on(other, tmp_path / "data" / "rows.jsonl")[1].endswith("is another node's")
        assert len(cluster.strays) == 2
        assert ray.cluster_resources()["GPU"] == 1
        assert os.environ["SAFECL_CACHE"] == str(head)  # the driver's machine is the head's
        cluster.kill(other)
        third = cluster.add(num_cpus=1)
        (third / "file").write_text("a new one's")
        assert on(third, third / "file") == (str(third), "a new one's")


def test_what_ray_says_as_a_run_joins_is_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That a node died before it joined, say. It stood in front of the table of `safecl run --json`."""
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    monkeypatch.setattr(cluster, "lacking", lambda *_: "")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what it sets is not for other tests
    said = {"lines": ["a node is dead"], "is_err": False, "pid": "raylet", "ip": "", "job": None, "actor_name": None}
    monkeypatch.setattr(cluster.nodes, "join", lambda *_: worker.print_to_stdstream(said))
    cluster.start(Execution(address="auto"), tmp_path)
    assert (tmp_path / "ray.log").read_text() == "a node is dead\n"
    assert capsys.readouterr() == ("", "")

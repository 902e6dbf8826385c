"""Nodes that differ, and clusters that let nobody in: what is said."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from safecl import nodes
from safecl.base import PrerequisiteError
from tests.cluster import nodes as cluster_of

OURS = {"python": "3.11", "torch": "2.14.0", "ray": "2.60.0", "vllm": "0.33.0"}


def test_nodes_that_differ_are_named_library_by_library() -> None:
    theirs = {
        "a": OURS,
        "b": {**OURS, "torch": "2.13.0"},
        "c": {**OURS, "torch": "2.13.0", "ray": "2.59.0"},
        "head": {name: number for name, number in OURS.items() if name != "vllm"},  # without a device it serves nothing
    }
    assert nodes.differences(OURS, theirs) == [
        "ray is 2.60.0 here, 2.59.0 on c",
        "torch is 2.14.0 here, 2.13.0 on b, c",
    ]
    assert nodes.differences(OURS, {"d": {"python": "3.11"}}) == ["ray is 2.60.0 here, absent on d"]


def test_a_node_that_comes_later_compares_itself_before_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.check_here()  # told nothing
    monkeypatch.setenv(nodes.VERSIONS, json.dumps(nodes.versions()))
    nodes.check_here()
    monkeypatch.setenv(nodes.VERSIONS, json.dumps({**nodes.versions(), "ray": "1.0"}))
    with pytest.raises(PrerequisiteError, match=r"ray .*, the driver has 1\.0"):
        nodes.check_here()


def test_every_process_of_a_run_is_told_what_this_terminal_says_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "this terminal's")
    told = nodes.environment({"MINE": "a default", "OTHER": "1"})
    assert (told["MINE"], told["OTHER"]) == ("this terminal's", "1") and json.loads(told[nodes.VERSIONS])["ray"]


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, "there is none here"),
        ({"RAY_AUTH_TOKEN": "x"}, "RAY_AUTH_MODE is not set, so none is shown"),
        ({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_MODE": "token"}, "the one in RAY_AUTH_TOKEN is not the cluster's"),
    ],
)
def test_what_is_wrong_with_a_token_is_said_with_the_remedy(
    env: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", f"{tmp_path}/none")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    told = nodes.token_help()
    assert says in told and "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in told


def test_an_address_at_which_nothing_answers_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' cluster
    began = time.monotonic()
    with pytest.raises(
        PrerequisiteError, match=r"nothing answers at execution\.address '127\.0\.0\.1:9': is the cluster"
    ):
        nodes.join("127.0.0.1:9", {}, tmp_path / "ray.log")
    assert time.monotonic() - began < 10  # Ray alone waits for minutes


def _told(name: str) -> str | None:
    return os.environ.get(name)


@pytest.mark.slow
def test_a_cluster_that_is_joined_gets_the_runs_environment_and_one_odd_node_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with cluster_of(tmp_path / "cluster", {}, {}) as cluster:
        nodes.join(cluster.address, {"SAFECL_TEST": "of the driver"}, tmp_path / "ray.log")
        told: Any = ray.remote(num_cpus=0)(_told)
        head, other = cluster.made
        marker = head / "root" / "notes" / "lease-x.json"
        marker.parent.mkdir(parents=True)
        marker.touch()
        with pytest.raises(PrerequisiteError, match=r"root' is not one folder on all nodes: 1 of 2 do not see it"):
            nodes.check_folder(ray, marker)
        there = NodeAffinitySchedulingStrategy(cluster.node_id(other), soft=False)
        seen = [
            ray.get(told.options(scheduling_strategy=there).remote(name)) for name in ("SAFECL_TEST", nodes.VERSIONS)
        ]
        assert seen == ["of the driver", json.dumps(nodes.versions())]
        ray.shutdown()
        odd = tmp_path / "odd" / "torch-0.0.1.dist-info"
        odd.mkdir(parents=True)
        (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
        monkeypatch.setenv("PYTHONPATH", str(odd.parent))
        third = cluster.add(num_cpus=1)
        with pytest.raises(PrerequisiteError) as caught:
            nodes.join(cluster.address, {}, tmp_path / "ray.log")
        assert f"torch is {nodes.versions()['torch']} here, 0.0.1 on" in str(caught.value)
        assert cluster.node_id(third)[:8] in str(caught.value) and "\n" not in str(caught.value)
        assert not ray.is_initialized()
        # A node that is lost while nodes are compared is none of them any more.
        ray.init(address=cluster.address, log_to_driver=False)
        listed, now = [ray.nodes()], ray.nodes
        cluster.kill(third)
        while len([node for node in now() if node["Alive"]]) > 2:
            time.sleep(0.1)
        monkeypatch.setattr(ray, "nodes", lambda: listed.pop() if listed else now())
        nodes.check(ray)

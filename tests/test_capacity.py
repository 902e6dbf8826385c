"""What a run holds, in which units, and what the file of an autoscaler says that it may bring. What Ray itself is told of it:
test_execute.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from safecl.capacity import capacity, node_types
from safecl.config import Execution

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("execution", "have", "free_gib", "expected"),
    [
        # Two cores and 30 GiB: trainers of a worker each, two at once; 30 - 3 trials of .4
        ({}, {"CPU": 2}, 30.0, ("GiB", 28.8, 2.5, 4.0, 2)),
        ({"num_workers": 2}, {"CPU": 2}, 30.0, ("GiB", 28.8, 5.0, 4.0, 1)),
        ({}, {"CPU": 2}, 3.0, ("GiB", 4.0, 2.5, 4.0, 2)),  # an engine at least, whatever is free
        ({"use_gpu": True}, {"GPU": 1, "CPU": 8}, 9.0, ("GPU", 1.0, 1.0, 1.0, 3)),
        ({"use_gpu": True, "num_workers": 4, "engine_units": 2}, {"GPU": 8}, 9.0, ("GPU", 8.0, 4.0, 2.0, 3)),
        ({"use_gpu": True, "worker_units": 0.25, "engine_units": 0.25}, {"GPU": 2}, 9.0, ("GPU", 2.0, 0.25, 0.25, 3)),
        ({"address": "auto"}, {"CPU": 6}, 9.0, ("CPU", 6.0, 1.0, 1.0, 3)),
        ({"address": "auto", "unit": "slot"}, {"CPU": 6, "slot": 1}, 9.0, ("slot", 1.0, 1.0, 1.0, 3)),
    ],
)
def test_units_by_where_a_run_is(
    execution: dict[str, Any], have: dict[str, float], free_gib: float, expected: tuple[Any, ...]
) -> None:
    assert capacity(Execution(**execution), have, free_gib) == pytest.approx(expected)


def test_the_file_of_the_cluster_launcher_says_what_it_may_bring() -> None:
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    found = node_types(config, "GPU")
    kinds = [kind for kind in config["available_node_types"].values() if kind["resources"].get("GPU")]
    assert found == [(kind["resources"]["GPU"], kind["max_workers"]) for kind in kinds] and found
    head = {"available_node_types": {"h": {"resources": {"GPU": 2}}}, "head_node_type": "h", "max_workers": 0}
    assert node_types(head, "GPU") == [(2, 1)]  # it is there whatever `max_workers` says

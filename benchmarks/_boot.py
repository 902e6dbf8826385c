"""What an engine's boot consists of, seen from outside: its processes and what vLLM writes. For fixed_cost.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

# In the order in which vLLM writes them: the replica has imported it; so has the engine's own process; weights are there;
# the cache is there and a first batch was run.
WRITES = ("Resolved architecture", "Initializing a V1 LLM engine", "Loading weights took", "init engine (profile")
TOKENS = 16


def boots(folder: Path, base: Path, adapters: list[Path], cpu_s: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Two boots of one engine, Serve's own start in the first: seconds by part, of its first requests, of weights that are
    put into it, and CPU seconds of all processes."""
    from safecl.serving import deploy
    from safecl.serving.client import Engines
    from safecl.serving.messages import Request, Sampling, Settings, WeightsRef
    from safecl.store import Store

    store, asked = Store(str(folder / "engine-root")), [Request("one", list(range(3, 20)))]
    for number, start in enumerate(("first", "second")):
        name, logs = f"boot-{number}", folder / f"engine-logs-{number}"
        settings = Settings(name=name, dtype="float32", max_model_len=128, memory_gib=0.1, log_dir=str(logs))
        began, cpu = time.time(), cpu_s()
        deploy.deploy(settings, str(base), store, resources={"CPU": 0.0}, wait=False)
        seen = _watch(logs / f"engine-{name}.log", began, lambda name=name: deploy.state(name)[0] == "RUNNING")
        booted = cpu_s() - cpu
        ends = [seen["replica"], seen[WRITES[0]], seen["core"], *(seen[said] for said in WRITES[1:]), seen["up"]]
        parts = ("Serve, replica's process", "its imports", "its set-up", "engine process, its imports", "load model",
                 "cache, warm-up", "seen to be ready")  # fmt: skip
        found: dict[str, Any] = {"boot": start}
        for part, since, until in zip(parts, (began, *ends), ends, strict=False):
            found[part] = until - since
        found |= {"whole boot": seen["up"] - began, "its cpu": booted}
        engines = Engines()
        weights = [("first request", None), ("another", None), ("adapter, request", adapters[0]),
                   ("other adapter, request", adapters[1]), ("its next request", adapters[1])]  # fmt: skip
        for what, adapter in weights:
            ref = WeightsRef(str(adapter), str(base), None if adapter is None else str(adapter))
            before = time.time()
            engines.generate(name, ref, asked, Sampling(max_tokens=TOKENS))
            found[what] = time.time() - before
        deploy.shutdown(name)
        yield found


def _watch(log: Path, began: float, is_up: Callable[[], bool]) -> dict[str, float]:
    """When each thing was first seen, of what was started since `began`."""
    seen: dict[str, float] = {}
    asked = 0.0
    while "up" not in seen:
        text = log.read_text() if log.exists() else ""
        seen |= {said: time.time() for said in WRITES if said not in seen and said in text}
        for process in psutil.Process().children(recursive=True) if "core" not in seen else ():
            try:
                title = "".join(process.cmdline()[:1])
                if process.create_time() > began - 5 and title.startswith("ray::ServeReplica"):
                    seen.setdefault("replica", time.time())
                    if any("spawn_main" in " ".join(child.cmdline()) for child in process.children()):
                        seen["core"] = time.time()
            except psutil.Error:
                continue
        if WRITES[-1] in seen and time.time() - asked > 0.2:
            asked = time.time()
            seen |= {"up": asked} if is_up() else {}
        time.sleep(0.1)
    return seen

"""Which dtype the devices that compute multiply natively, and how fast they are.

`dtype: auto` is resolved from these functions, before any stage's identity is formed. The first estimate of a run's time
uses `speed`. Only `speed` (torch) and `nodes` (Ray) import something heavy, when they are called.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from safecl.base import ConfigError, PrerequisiteError

Dtype = Literal["bfloat16", "float32"]

AMPERE = 8.0  # GPUs of this CUDA compute capability and above multiply bfloat16 matrices natively
NATIVE_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # on x86, x86 and ARM, as named in /proc/cpuinfo
# Values of ONEDNN_MAX_CPU_ISA with which oneDNN, PyTorch's library for matrix products, does not use those instructions.
ISAS_WITHOUT = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
SHAPES = ((576, 1536), (1536, 576))  # the two linear layers of a small model's MLP (SmolLM2-135M)


class Cpu(NamedTuple):
    """A CPU. `flags`: the instruction sets that decide how fast it multiplies matrices, sorted."""

    name: str
    flags: tuple[str, ...]


class Speed(NamedTuple):
    """GFLOP/s of one CPU thread, or of one GPU, in linear layers with frozen weights."""

    forward: float
    backward: float  # of the gradient of the input alone; a LoRA finetune computes no other gradient of a base layer

    @property
    def both(self) -> float:
        """GFLOP/s of a forward and a backward, one after the other."""
        return 2 / (1 / self.forward + 1 / self.backward)


@lru_cache
def cpu() -> Cpu:
    """Return this machine's CPU. Its flags are read on Linux only; elsewhere it counts as a CPU without bfloat16."""
    name, flags = "", list[str]()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            name = value if key == "model name" else name
            flags = value.split() if key in ("flags", "Features") else flags
    wanted = ("avx", "amx", "fma", "bf16", "asimd", "sve", "i8mm")
    return Cpu(
        name or platform.processor() or platform.machine(), tuple(sorted(f for f in flags if f.startswith(wanted)))
    )


def native_bfloat16(use_gpu: bool = False) -> bool:
    """Return whether this machine's CPU, or with `use_gpu` each of its visible GPUs, multiplies bfloat16 natively.

    A CPU needs AVX512_BF16 or AMX_BF16, on ARM BF16. ONEDNN_MAX_CPU_ISA=AVX2 simulates a machine without them. A GPU needs
    compute capability 8.0.
    """
    if use_gpu:
        found = gpus()
        return bool(found) and all(capability >= AMPERE for _, capability in found)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    if limit.upper() in ISAS_WITHOUT:
        return False
    return any(flag in NATIVE_FLAGS for flag in cpu().flags)


def native(use_gpu: bool = False) -> Dtype:
    """Return the dtype that `dtype: auto` means on this machine."""
    return "bfloat16" if native_bfloat16(use_gpu) else "float32"


@lru_cache
def gpus() -> list[tuple[str, float]]:
    """Return (name, CUDA compute capability) of every visible GPU; empty without one. Takes no GPU memory in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    only = [f"--id={visible}"] if visible else []  # empty: Ray hides the GPUs from a process that reserves none
    told = _output(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", *only])
    if not told:
        code = (
            "import torch\nfor i in range(torch.cuda.device_count()):\n"
            " print(torch.cuda.get_device_name(i), '%d.%d' % torch.cuda.get_device_capability(i), sep=', ')"
        )
        told = _output([sys.executable, "-c", code])
    parts = [line.rpartition(",") for line in told.splitlines()]
    return [(name.strip(), float(capability)) for name, _, capability in parts]


def _output(command: list[str]) -> str:
    """What a command prints; "" if the command is absent or fails."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES" or value}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def speed(dtype: Dtype, device: str = "cpu") -> Speed:
    """Measure the speed of one CPU thread, or of a whole GPU, in the linear layers of a small model. Takes about 0.2 s.

    `device`: "cpu" or "cuda".
    """
    import torch

    # A thread's own time does not include the time that other programs took meanwhile.
    now = time.thread_time if device == "cpu" else time.perf_counter
    kind, threads = getattr(torch, dtype), torch.get_num_threads()
    weights = [torch.linspace(-1, 1, i * o).reshape(o, i).to(device, kind) for i, o in SHAPES]

    def run(num_rows: int, width: int, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        rows = [
            torch.linspace(-1, 1, num_rows * w.shape[width]).reshape(num_rows, -1).to(device, kind) for w in weights
        ]
        start = now()
        for row, weight in zip(rows, weights, strict=True):
            multiply(row, weight)
        if device != "cpu":
            torch.cuda.synchronize()
        return now() - start

    def best(width: int, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        run(8, width, multiply)  # the first call of a kernel sets it up
        stop = time.perf_counter() + 0.1
        num_rows = 128 if device == "cpu" else 4096
        if run(8, width, multiply) > 0.01:
            num_rows = 64  # bfloat16 is emulated: twice as many rows would take half a second
        seconds = run(num_rows, width, multiply)
        while time.perf_counter() < stop:
            seconds = min(seconds, run(num_rows, width, multiply))
        return 2 * num_rows * sum(w.numel() for w in weights) / seconds / 1e9

    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            return Speed(best(1, torch.nn.functional.linear), best(0, torch.matmul))
    finally:
        torch.set_num_threads(threads)


def measured(use_gpu: bool = False) -> dict[Dtype, Speed] | None:
    """Return `speed` in both dtypes; None if it cannot be measured, for instance without torch.

    It is measured in a process of its own, so that the caller's process loads no torch and takes no GPU.
    """
    device = "cuda" if use_gpu else "cpu"
    code = (
        "import json\nfrom safecl.hardware import speed\n"
        f"print(json.dumps({{name: speed(name, {device!r}) for name in ('float32', 'bfloat16')}}))"
    )
    told = _output([sys.executable, "-c", code]).splitlines()
    return {name: Speed(*both) for name, both in json.loads(told[-1]).items()} if told else None


def slowdown(speeds: Mapping[Dtype, Speed]) -> float:
    """Return the time of bfloat16 divided by that of float32, forward and backward together."""
    return speeds["float32"].both / speeds["bfloat16"].both


def times(factor: float) -> str:
    """Return a factor as text, as `1.4 times` or `23 times`."""
    return f"{factor:.{0 if factor >= 10 else 1}f} times"


def device(use_gpu: bool = False) -> str:
    """Return the name of the device that computes on this machine: the CPU, or with `use_gpu` its visible GPUs."""
    if not use_gpu:
        return cpu().name
    return ", ".join(dict.fromkeys(f"{name} (compute capability {c:g})" for name, c in gpus())) or "no visible GPU"


# -- a cluster --------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A node that can train.

    Attributes:
        name: the node's name and the first digits of its id.
        device: its CPU or GPUs, in words.
        native: the dtype that `auto` means on it.
        slowdown: time of bfloat16 / time of float32; None if bfloat16 is native, or if this was not or could not be measured.
    """

    name: str
    device: str
    native: Dtype
    slowdown: float | None = None


def this_node(name: str, use_gpu: bool, measure: bool) -> Node:
    """Return what this machine has, as a Node. `measure`: also measure how slow bfloat16 is, if it is emulated."""
    found = native(use_gpu)
    speeds = measured(use_gpu) if measure and found == "float32" else None
    return Node(name, device(use_gpu), found, None if speeds is None else slowdown(speeds))


def nodes(use_gpu: bool, measure: bool, timeout_s: float = 120.0) -> list[Node]:
    """Ask every node that can train of the Ray cluster that this process is connected to.

    A node can train if it is alive and has a GPU (without `use_gpu`: a CPU).

    Args:
        measure: also measure how slow bfloat16 is, where it is emulated.
        timeout_s: seconds to wait for the answers.

    Raises:
        PrerequisiteError: there is no such node, or one does not answer in time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    unit = "GPU" if use_gpu else "CPU"
    able = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get(unit, 0) >= 1}
    if not able:
        raise PrerequisiteError(
            f"no node of this cluster has a {unit}, so none says what `dtype: auto` means: set dtype"
        )
    asked = {}
    for id, node in able.items():
        there = NodeAffinitySchedulingStrategy(id, soft=False)
        name = f"{node['NodeName']} ({id[:8]})"  # several nodes may stand on one host
        task = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=there)(this_node)
        asked[task.remote(name, use_gpu, measure)] = name
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    if late:
        names = ", ".join(asked[task] for task in late)
        raise PrerequisiteError(f"no answer in {timeout_s:g} s from {names}: set dtype, or leave these nodes out")
    return sorted(ray.get(done))


def agreed(found: Sequence[Node]) -> Dtype:
    """Return what `auto` means on all these nodes.

    Raises:
        ConfigError: the nodes disagree. The message names the device and dtype of each.
    """
    if len({node.native for node in found}) == 1:
        return found[0].native
    having = "\n".join(f"  {node.name}: {node.device}, {node.native}" for node in found)
    raise ConfigError(
        "dtype: auto means bfloat16 on some nodes of this cluster and float32 on others, and a result must not depend on "
        f"which of them it comes from:\n{having}\nset dtype for each model, e.g. --set models.0.dtype=float32"
    )

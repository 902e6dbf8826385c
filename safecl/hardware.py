"""What the device that computes multiplies natively, and how fast it is.

`dtype: auto` is resolved from here, before any identity is formed; the ETA's first estimate rests on `speed`. Looking at
the machine imports nothing heavy; `speed` and `slowdown` import torch when they are called.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

Dtype = Literal["bfloat16", "float32"]

AMPERE = 8.0  # CUDA compute capability from which on bfloat16 matrices are multiplied natively
NATIVE_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM: as /proc/cpuinfo calls them
# What ONEDNN_MAX_CPU_ISA may say so that oneDNN, which multiplies for PyTorch, does without those instructions.
ISAS_WITHOUT = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
SHAPES = ((576, 1536), (1536, 576))  # the two linear layers of a small model's MLP (SmolLM2-135M)


class Cpu(NamedTuple):
    """`flags`: those instruction sets that decide how fast matrices are multiplied, sorted."""

    name: str
    flags: tuple[str, ...]


class Speed(NamedTuple):
    """GFLOP/s of one thread in linear layers with frozen weights."""

    forward: float
    backward: float  # gradient of the input alone, which is what a LoRA finetune computes of a base layer

    @property
    def both(self) -> float:
        """GFLOP/s of a forward and a backward, one after the other."""
        return 2 / (1 / self.forward + 1 / self.backward)


@lru_cache
def cpu() -> Cpu:
    """This machine's CPU."""
    name, flags = "", list[str]()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            name = value if key == "model name" else name
            flags = value.split() if key in ("flags", "Features") else flags
    elif sys.platform != "darwin":
        try:
            found = import_module("cpuinfo").get_cpu_info()  # py-cpuinfo; deepspeed brings it
            name, flags = found.get("brand_raw", ""), found.get("flags", [])
        except ImportError:
            pass
    wanted = ("avx", "amx", "fma", "bf16", "asimd", "sve", "i8mm")
    return Cpu(
        name or platform.processor() or platform.machine(), tuple(sorted(f for f in flags if f.startswith(wanted)))
    )


def native_bfloat16(use_gpu: bool = False) -> bool:
    """Whether the device that computes on this machine multiplies bfloat16 natively: with `use_gpu` every visible GPU.

    CPUs: AVX512_BF16 or AMX_BF16, on ARM BF16; not on macOS, where PyTorch does not use what the CPU has. A machine
    without them is simulated by ONEDNN_MAX_CPU_ISA=AVX2.
    """
    if use_gpu:
        found = gpus()
        return bool(found) and all(capability >= AMPERE for _, capability in found)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    if limit.upper() in ISAS_WITHOUT:
        return False
    return any(flag in NATIVE_FLAGS for flag in cpu().flags)


def native(use_gpu: bool = False) -> Dtype:
    """What `dtype: auto` means on this machine."""
    return "bfloat16" if native_bfloat16(use_gpu) else "float32"


def gpus() -> list[tuple[str, float]]:
    """(name, CUDA compute capability) of every visible GPU; empty without one. Holds no memory of theirs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    only = [f"--id={visible}"] if visible else []  # empty: Ray hides GPUs from whoever reserves none
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
    """What a command prints; nothing where it is absent or fails."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES" or value}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def speed(dtype: Dtype) -> Speed:
    """What one thread of this CPU does in linear layers of a small model, measured in about 0.2 s."""
    import torch

    kind, threads = getattr(torch, dtype), torch.get_num_threads()
    weights = [torch.linspace(-1, 1, i * o).reshape(o, i).to(kind) for i, o in SHAPES]

    def run(num_rows: int, width: int, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        rows = [torch.linspace(-1, 1, num_rows * w.shape[width]).reshape(num_rows, -1).to(kind) for w in weights]
        start = time.perf_counter()
        for row, weight in zip(rows, weights, strict=True):
            multiply(row, weight)
        return time.perf_counter() - start

    def best(width: int, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        run(8, width, multiply)  # the first call of a kernel sets it up
        stop = time.perf_counter() + 0.1
        num_rows = 128 if run(8, width, multiply) < 0.01 else 64  # emulated, 128 take half a second
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


def slowdown() -> float:
    """How many times as long bfloat16 takes as float32 on this CPU (forward and backward), measured in half a second."""
    return speed("float32").both / speed("bfloat16").both

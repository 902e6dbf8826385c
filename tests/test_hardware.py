"""What a device multiplies natively, from what the machine says of itself."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from safecl import doctor, hardware
from safecl.base import ConfigError
from safecl.hardware import Cpu, Node, Speed

SIMULATED = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SIMULATED, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    hardware.gpus.cache_clear()


def with_flags(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(hardware, "cpu", lambda: Cpu("a CPU", flags))


@pytest.mark.parametrize(
    ("flags", "is_native"),
    [
        (("avx", "avx2", "fma"), False),  # EPYC Zen 3
        (("avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"), False),  # Ice Lake
        (("avx2", "avx512f", "avx512_bf16"), True),  # EPYC Zen 4
        (("avx2", "avx512f", "amx_bf16", "amx_tile"), True),
        (("avx2", "amx_int8", "amx_tile"), False),
        (("asimd", "sve", "bf16"), True),  # Graviton 3
        (("asimd",), False),
        ((), False),
    ],
)
def test_a_cpu_is_native_by_its_flags(flags: tuple[str, ...], is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_flags(monkeypatch, *flags)
    assert hardware.native_bfloat16() is is_native
    assert hardware.native() == ("bfloat16" if is_native else "float32")


@pytest.mark.parametrize(
    ("limit", "is_native"),
    [
        ("AVX2", False),
        ("avx512_core_vnni", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("ALL", True),
    ],
)
@pytest.mark.parametrize("name", SIMULATED)
def test_a_limit_on_onednn_counts_as_the_cpus_own(
    name: str, limit: str, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_flags(monkeypatch, "avx2", "avx512_bf16", "amx_bf16")
    monkeypatch.setenv(name, limit)
    assert hardware.native_bfloat16() is is_native


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "processor\t: 0\nmodel name\t: A  Xeon\nflags\t\t: fpu avx2 sse fma amx_bf16\n\nprocessor\t: 1\nflags: avx\n",
            Cpu("A  Xeon", ("amx_bf16", "avx2", "fma")),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 aes\nCPU part\t: 0xd40\n", Cpu("aarch64", ("asimd", "bf16"))),
    ],
)
def test_flags_are_read_where_linux_tells_them(text: str, wanted: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(hardware.platform, "processor", lambda: "aarch64")
    assert hardware.cpu.__wrapped__() == wanted


@pytest.mark.parametrize(
    ("told", "is_native"),
    [
        ("NVIDIA A100-SXM4-80GB, 8.0\n", True),
        ("NVIDIA H100 80GB HBM3, 9.0\nNVIDIA H100 80GB HBM3, 9.0\n", True),
        ("NVIDIA RTX PRO 6000, 12.0\n", True),
        ("Tesla T4, 7.5\n", False),
        ("NVIDIA A100-SXM4-80GB, 8.0\nTesla V100-SXM2-16GB, 7.0\n", False),  # all must be
        ("", False),
    ],
)
def test_a_gpu_is_native_from_ampere_on(told: str, is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(hardware, "_output", lambda command: asked.append(command) or told)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with_flags(monkeypatch, "avx512_bf16")  # which does not compute here
    assert hardware.native_bfloat16(use_gpu=True) is is_native
    assert "--id=0,1" in asked[0] and [name for name, _ in hardware.gpus()] == [
        line.partition(",")[0] for line in told.splitlines()
    ]


def test_speeds_are_counted_in_both_dtypes_and_the_callers_threads_stay() -> None:
    import torch

    before = torch.get_num_threads(), torch.get_rng_state()
    for dtype in ("float32", "bfloat16"):
        assert min(hardware.speed(dtype)) > 0  # type: ignore[arg-type]
    assert torch.get_num_threads() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_slowdown_weighs_both_directions_by_their_time() -> None:
    """40 forward and 60 backward take 1/40 + 1/60 = 1/24; 8 and 2: 1/8 + 1/2 = 5/8. So 24 * 5/8 = 15 times as long."""
    assert hardware.slowdown({"float32": Speed(40, 60), "bfloat16": Speed(8, 2)}) == pytest.approx(15)
    assert [hardware.times(x) for x in (1.25, 15.2)] == ["1.2 times", "15 times"]


def test_what_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **more: Any) -> Any:
        raise subprocess.CalledProcessError(1, "python")

    monkeypatch.setattr(subprocess, "run", fails)
    assert hardware.measured() is None


def test_nodes_that_disagree_are_named_with_what_each_has() -> None:
    one, other = Node("a (1)", "a Xeon", "bfloat16"), Node("b (2)", "an EPYC", "float32")
    assert hardware.agreed([one, one]) == "bfloat16" and hardware.agreed([other]) == "float32"
    with pytest.raises(ConfigError, match=r"a \(1\): a Xeon, bfloat16\n  b \(2\): an EPYC, float32\nset dtype for"):
        hardware.agreed([one, other])


@pytest.mark.parametrize(("flags", "says"), [(("amx_bf16",), "bfloat16 (bfloat16 is native)"),
                                              (("avx2",), "float32 (bfloat16 is emulated, 15 times slower than")])  # fmt: skip
def test_doctor_says_what_auto_means_and_what_was_measured(
    flags: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_flags(monkeypatch, *flags)
    monkeypatch.setattr(hardware, "measured", lambda: {"float32": Speed(40, 60), "bfloat16": Speed(8, 2)})
    found = {finding.what: finding for finding in doctor.examine(str(tmp_path), None)}
    assert found["CPU"].found == "a CPU" and found["dtype: auto"].ok
    assert (
        found["dtype: auto"].found.startswith(says) and "float32 40 / 60, bfloat16 8 / 2" in found["dtype: auto"].found
    )

"""What `make venv` looks at before it downloads anything."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / ".ci" / "machine.py"


@pytest.fixture
def machine() -> Any:
    spec = spec_from_file_location("machine", FILE)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _proc(folder: Path, flags: str, kib: int) -> Path:
    folder.mkdir()
    (folder / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags} sse\n")
    (folder / "meminfo").write_text(f"MemTotal:       {kib} kB\n")
    return folder


def test_what_is_lacking_is_named_a_line_each(machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISK_GIB", 0)
    rich = _proc(tmp_path / "rich", "avx avx2", 16 << 20)
    assert machine.lacking(tmp_path, rich, tmp_path) == []
    poor = _proc(tmp_path / "poor", "avx avx2x", 8 << 20)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine.os, "getuid", lambda: 0)
    monkeypatch.setattr(machine, "DISK_GIB", 10**9)
    monkeypatch.setattr(machine, "GLIBC", (99, 0))
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    found = machine.lacking(tmp_path, poor, tmp_path / "absent")
    essential = ["virtual environments", "glibc 99.0", "AVX2", "GiB of disk"]
    for (is_essential, line), words in zip(found, [*essential, "has 8.0", "share memory", "setpriv"], strict=True):
        assert is_essential == (words in essential) and words in line
        assert "\n" not in line


def test_the_script_needs_no_package_and_this_machine_lacks_nothing_essential(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", FILE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr

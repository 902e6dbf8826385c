"""What `make venv` needs of the machine, looked at before anything is downloaded: a line for each thing it lacks.

    python3.11 .ci/machine.py FOLDER    FOLDER: where the environment will lie

Needs no package. Exits 2 where something lacks without which the environment cannot be made or used.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

DISK_GIB = 7  # the environment takes 4.2 and what is downloaded for it 1.5
MEMORY_GIB = 12
SHARED_GIB = 1
GLIBC = (2, 34)  # the newest that a pinned wheel asks for


def lacking(folder: Path, proc: Path = Path("/proc"), shared: Path = Path("/dev/shm")) -> list[tuple[bool, str]]:
    """(whether nothing works without it, what is lacking and the remedy)."""
    found: list[tuple[bool, str]] = []
    if sys.platform != "linux" or platform.machine() != "x86_64":
        found.append(
            (True, f"the pinned packages are for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
        )
        return found
    if sys.version_info[:2] != (3, 11):
        version = platform.python_version()
        found.append(
            (True, f"the pinned packages are for Python 3.11, this is {version}: make PYTHON=/path/to/python3.11")
        )
    if find_spec("ensurepip") is None:
        found.append((True, "this Python makes no virtual environments; run: apt-get install -y python3.11-venv"))
    name, glibc = platform.libc_ver()
    if name != "glibc" or tuple(map(int, glibc.split(".")[:2])) < GLIBC:
        found.append(
            (
                True,
                f"vLLM's package needs glibc {GLIBC[0]}.{GLIBC[1]} (Debian 12, Ubuntu 22.04), this is {name} {glibc}",
            )
        )
    if not re.search(r"^flags\s*:.*\bavx2\b", (proc / "cpuinfo").read_text(), re.MULTILINE):
        found.append((True, "vLLM's engine needs a CPU with AVX2"))
    disk = shutil.disk_usage(folder).free / 2**30
    if disk < DISK_GIB:
        found.append((True, f"the environment needs {DISK_GIB} GiB of disk, {folder} has {disk:.1f} free"))
    total = re.search(r"^MemTotal:\s*(\d+)", (proc / "meminfo").read_text(), re.MULTILINE)
    memory = int(total[1]) / 2**20 if total else 0.0
    if memory < MEMORY_GIB:
        found.append(
            (False, f"`make demo` and `make test` need about {MEMORY_GIB} GiB of memory, this machine has {memory:.1f}")
        )
    room = shutil.disk_usage(shared).free / 2**30 if shared.is_dir() else 0.0
    if room < SHARED_GIB:
        found.append(
            (False, f"Ray and vLLM share memory through {shared}, which has {room:.1f} GiB; docker run --shm-size=4g")
        )
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        found.append(
            (False, "programs that a model wrote are not run by root without setpriv; apt-get install -y util-linux")
        )
    return found


if __name__ == "__main__":
    lines = lacking(Path(sys.argv[1]))
    for essential, line in lines:
        print(f"{'error' if essential else 'warning'}: {line}", file=sys.stderr)
    sys.exit(2 if any(essential for essential, _ in lines) else 0)
